"""A run from plan to adapter: what is checked before it, how it is built, and what answers too little memory."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path

import torch
from rich.console import Console

from planner.documents import Reading, read_documents
from planner.errors import PlanError
from planner.ledger import Phase
from planner.plan import Plan
from trainer.built import BuiltRun
from trainer.data import evaluation_batches, prepare
from trainer.data_told import tell_data
from trainer.device import hold, take_device
from trainer.disk_room import check_disk, scratch_folder
from trainer.host_room import check_host
from trainer.kernel_choice import choose_kernel
from trainer.measure import BETWEEN, Recorder
from trainer.out_of_memory import explained, is_out_of_memory
from trainer.output import RunFolder
from trainer.probing import SHORTER, give_back_unused
from trainer.progress import Progress
from trainer.replanning import MOST, Asked, Replan, Short, TooLittle, answered, going_on, lacked_of, let_go
from trainer.running import INTERRUPTED, Running, listen
from trainer.saving import FOLDER, Saved, load
from trainer.session import build
from trainer.token_file import TokenFile
from trainer.training import planned_steps


def execute(
    plan: Plan,
    *,
    resume: bool = False,
    layers_run: int | None = None,
    choose: bool = False,
    last_held: int | None = None,
    replan: Replan = "late",
) -> int:
    """Train exactly what was planned; gives the exit code (0, or 130 where it was interrupted).

    Args:
        resume: go on with the run that was stopped in the plan's folder.
        layers_run: run the first layers of a streamed model alone, to measure what each takes; the record says so.
        choose: measure which attention kernel is the fastest here, and plan anew with it where that fits.
        last_held: bytes of the card that the last ``HELD_STEPS`` steps, saving and evaluation get, to see whether
            they suffice; before them the run has what it always has, and its seconds are those of then.
        replan: where memory runs out, go on by the next smaller plan: in training, or in the probe step, too.

    Raises:
        PlanError: the plan cannot be run here, the probe step took more than the plan's bound, or the data,
            the model or the output folder are not usable.
    """
    if plan.verdict == "does-not-fit":
        raise PlanError("the plan", f"says of itself that it does not fit: {plan.summary}", " ".join(plan.nearest))
    if plan.train.data is None:
        raise PlanError("train.data", "is empty, so there is nothing to train on.", "--data FOLDER names some.")
    console, folder, device = Console(), RunFolder(plan, resume=resume), take_device(plan)
    if choose:
        plan, told = choose_kernel(plan, device)
        if told:
            console.print(told, highlight=False)
            folder = RunFolder(plan)
    saved = load(folder.path, plan) if resume else None
    # Its mistakes come to light before minutes of loading.
    reading = read_documents(Path(plan.train.data), keep="mapped_tokens" not in {choice.id for choice in plan.choices})
    asked, tell = Asked(layers_run, last_held, replan), partial(console.print, highlight=False, markup=False)
    for number in range(1, MOST + 1):
        try:
            check_host(plan)
            check_disk(plan)
            ended = _attempt(plan, reading, device, folder, console, saved, asked)
        except PlanError as error:
            if saved is None or not saved.elsewhere:
                raise
            raise PlanError(error.asked, error.why, going_on(saved, plan)) from error
        if isinstance(ended, int):
            if ended == 0:
                shutil.rmtree(folder.path / FOLDER, ignore_errors=True)  # nothing is left to go on with
            return ended
        try:
            plan, folder = answered(ended, plan, device, folder, tell, last=number == MOST)
        except KeyboardInterrupt:
            tell("Interrupted. " + (going_on(ended.saved, plan) if ended.saved else "Nothing had been trained."))
            return INTERRUPTED
        saved = ended.saved
    raise AssertionError("the last plan that is tried has none after it")


def _attempt(
    plan: Plan,
    reading: Reading,
    device: torch.device,
    folder: RunFolder,
    console: Console,
    saved: Saved | None,
    asked: Asked,
) -> int | Short:
    """One plan from loading to its end, or until it has too little memory."""
    let_go(device)  # what hangs on runs before in this process, which the probe step would take for its own
    hold(device, plan.memory.gpu.budget_bytes)
    built, recorder, short = None, Recorder(device), None
    try:
        with recorder:
            recorder.mark(Phase.LOAD)
            built = build(plan)
            give_back_unused(device)
            recorder.mark(BETWEEN)
            recorder.pinned_bytes = sum(arena.pinned_bytes for arena in built.arenas)
            with built.first_layers(asked.layers_run or plan.model.layers):
                return _run(plan, built, reading, recorder, folder, console, saved, asked)
    except KeyboardInterrupt:
        console.print("Interrupted; what was saved before is whole.")
        return INTERRUPTED
    except TooLittle as little:
        short = little.short
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        allowed = asked.last_held if recorder.before else None
        why = explained(error, plan, recorder.phase, allowed)
        if built is not None or not asked.answers(saved):
            adapter = folder.path / "adapter"
            nearest = f"The adapter was saved before, in {adapter}." if adapter.is_dir() else SHORTER
            raise PlanError(f"{plan.total_tokens:,} tokens on {plan.gpu.name}", why, nearest) from error
        short = Short(why, lacked_of(error), saved)
    finally:
        if built is not None:
            built.close()
    return short


def _run(
    plan: Plan,
    built: BuiltRun,
    reading: Reading,
    recorder: Recorder,
    folder: RunFolder,
    console: Console,
    saved: Saved | None,
    asked: Asked,
) -> int:
    train = plan.train
    data = prepare(
        reading,
        built.tokenise,
        length=plan.total_tokens,
        target=None if plan.target == plan.total_tokens else plan.target,
        validation=train.validation,
        seed=train.seed,
        most_documents=built.most_documents,
        store=(lambda: TokenFile(scratch_folder(plan))) if built.map_tokens else None,
    )
    tell_data(console, data, built)
    judged = evaluation_batches(data.validation, train.evaluation_rows, train.batch, train.seed)
    stages = [stage.step_seconds or 1.0 for stage in plan.stages] or [1.0]
    with Progress(console, folder, planned_steps(train, len(data.train.rows)), stages=stages) as progress:
        announce = listen(plan, built, progress)
        running = Running(plan, built, data, judged, recorder, folder, console, progress, announce, asked)
        return running.go(saved)
