"""A run from plan to adapter: build, probe, evaluate, train, save, evaluate, record."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch.optim.lr_scheduler import LambdaLR

from planner.documents import Reading, read_documents
from planner.errors import PlanError
from planner.ledger import Phase
from planner.plan import Plan, Train
from planner.units import format_bytes
from trainer.data import Batch, Data, epochs, evaluation_batches, prepare, synthetic_batch
from trainer.loading import find_source
from trainer.measure import BETWEEN, Recorder, exact_terms, resident_tensors
from trainer.merging import merge
from trainer.output import RunFolder
from trainer.progress import Progress
from trainer.record import Run, measurement
from trainer.report import closing_lines, memory_table
from trainer.session import BuiltRun, build, take_device
from trainer.step import Evaluation, evaluate, update

INTERRUPTED = 130
_MOST_SKIPS = 25  # the loss scale begins at 2**16; halved this often it is below every useful value


def execute(plan: Plan, *, resume: bool = False, layers_run: int | None = None) -> int:
    """Train exactly what was planned; gives the exit code (0, or 130 where it was interrupted).

    Args:
        layers_run: run the first layers of a streamed model alone, to measure what each takes; the record says so.

    Raises:
        PlanError: the plan cannot be run here, the probe step took more than the plan's bound, or the data,
            the model or the output folder are not usable.
    """
    if resume:
        why = "a run is not stored while it is under way, so there is nothing to go on from."
        raise PlanError("--resume", why, "Without it the run starts from its first step.")
    if plan.verdict == "does-not-fit":
        raise PlanError("the plan", f"says of itself that it does not fit: {plan.summary}", " ".join(plan.nearest))
    if plan.train.data is None:
        raise PlanError("train.data", "is empty, so there is nothing to train on.", "--data FOLDER names some.")
    console, folder, device = Console(), RunFolder(plan), take_device(plan)
    reading = read_documents(Path(plan.train.data))  # its mistakes come to light before minutes of loading
    built = None
    try:
        with Recorder(device) as recorder:
            recorder.mark(Phase.LOAD)
            built = build(plan)
            give_back_unused(device)
            recorder.mark(BETWEEN)
            recorder.pinned_bytes = built.host.pinned_bytes if built.host else 0
            with built.first_layers(layers_run or plan.model.layers):
                return _run(plan, built, reading, recorder, folder, console)
    except KeyboardInterrupt:
        console.print("Interrupted; what was saved before is whole.")
        return INTERRUPTED
    except RuntimeError as error:
        if not (isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)):
            raise
        high = format_bytes(plan.memory.gpu.peak_bytes.high)
        why = f"ran out of memory, though the plan's bound is {high}: {str(error).splitlines()[0]}"
        raise PlanError(f"{plan.total_tokens:,} tokens on {plan.gpu.name}", why, _SHORTER) from error
    finally:
        if built is not None:
            built.close()


PROBED = 2  # layers of a streamed model; the first alone would not do, since nobody needs its input's gradient
_SHORTER = "Plan a shorter context, and please report this: the plan was wrong."


def _run(plan: Plan, built: BuiltRun, reading: Reading, recorder: Recorder, folder: RunFolder, console: Console) -> int:
    train = plan.train
    data = prepare(
        reading,
        built.tokenise,
        length=plan.total_tokens,
        target=None if plan.target == plan.total_tokens else plan.target,
        validation=train.validation,
        seed=train.seed,
        most_documents=built.most_documents,
    )
    _tell_data(console, data, built)
    terms, probe_seconds = probe(plan, built, recorder)
    console.print(memory_table(plan, recorder, terms))
    folder.begin()
    try:
        check_bound(plan, recorder)
    except PlanError:
        run = Run([], probe_seconds, [], 0, terms, None, None, _data_counts(data))
        folder.save_record(measurement(plan, built, recorder, run))
        raise
    judged = evaluation_batches(data.validation, train.evaluation_rows, train.batch, train.seed)
    before = _judge("before", built, judged, recorder, folder, console)
    progress = Progress(console, folder, planned_steps(train, len(data.train.rows)))
    try:
        with progress:
            for step in train_steps(plan, built, data, recorder):
                progress.show(step)
    except KeyboardInterrupt:
        put_averages(built)
        saved = folder.save_adapter(built, progress.done)
        console.print(f"Interrupted after step {progress.done}; the adapter of that moment is in {saved}.")
        return INTERRUPTED
    put_averages(built)
    recorder.mark(Phase.SAVE)
    saved = folder.save_adapter(built, progress.done)  # before the evaluation, whatever may go wrong in it
    recorder.mark(BETWEEN)
    after = _judge("after", built, judged, recorder, folder, console)
    run = Run(
        step_seconds=progress.seconds,
        probe_seconds=probe_seconds,
        losses=progress.losses,
        skipped_steps=progress.skipped,
        terms=terms,
        before=before,
        after=after,
        data=_data_counts(data),
    )
    record = measurement(plan, built, recorder, run)
    written, lines = folder.save_record(record), closing_lines(record)
    folder.complete_card(progress.done, " ".join(lines))
    if train.merge:
        merged = _merge(plan, built, recorder, folder)
        folder.save_record(measurement(plan, built, recorder, run))  # once more, with what merging took
        lines.append(f"Merged model: {merged}")
    console.print(memory_table(plan, recorder, terms))
    for line in [*lines, f"Adapter: {saved}", f"Record: {written}"]:
        console.print(line, highlight=False)
    return 0


def put_averages(built: BuiltRun) -> None:
    """From here on the adapters are their averages over the steps, where these are kept: saved, evaluated, merged."""
    if built.averages is not None:
        built.averages.put()


def _merge(plan: Plan, built: BuiltRun, recorder: Recorder, folder: RunFolder) -> Path:
    """Write the merged model; the host memory that held checkpoints makes room for it."""
    built.close()
    recorder.mark(Phase.MERGE)
    merged = merge(built.model, find_source(plan.model.source), built.tokenizer, folder.path / "merged", built.dtype)
    recorder.mark(BETWEEN)
    return merged


def probe(plan: Plan, built: BuiltRun, recorder: Recorder) -> tuple[dict[str, int], float]:
    """One step and one evaluation on the largest batch of the plan, then everything as it was.

    Streamed layers take the same one by one, and a step of theirs can take hours: of these the first two are run.
    Gives the exact bytes of what stays, and the step's seconds. Optimiser state is made first, from zero
    gradients, so that the step finds memory as every later step does.
    """
    train, vocab = plan.train, built.base.config.vocab_size
    size = (train.batch, plan.total_tokens, plan.target)
    batch = synthetic_batch(*size, vocab, train.seed, built.most_documents).to(built.device)
    adapters = [parameter.detach().to("cpu", copy=True) for parameter in built.trained]
    optimizer = copy.deepcopy(built.optimizer.state_dict())
    scaler = built.scaler.state_dict() if built.scaler else None
    with torch.random.fork_rng(devices=[built.device] if built.device.type == "cuda" else []):
        built.optimizer.step()
        stays = [*resident_tensors(built), batch.inputs, batch.targets]
        with recorder.counting(stays), built.first_layers(PROBED):
            began = time.perf_counter()
            _forward_backward(built, [batch] * min(2, train.accumulation), recorder)
            recorder.mark(Phase.OPTIMIZER)
            if built.scaler is not None:
                built.scaler.unscale_(built.optimizer)
            torch.nn.utils.clip_grad_norm_(built.trained, train.max_grad_norm)
            built.optimizer.step()  # past the scaler, which might skip it; the result is thrown away
            _wait(built.device)
            seconds = time.perf_counter() - began
            terms = exact_terms(built)
            evaluate(built.loss, [batch], built.device, recorder.mark)
            recorder.mark(BETWEEN)
    with torch.no_grad():
        for parameter, value in zip(built.trained, adapters, strict=True):
            parameter.copy_(value)
    built.optimizer.load_state_dict(optimizer)
    built.optimizer.zero_grad(set_to_none=False)
    if built.scaler is not None and scaler is not None:
        built.scaler.update()  # ends the step that unscaling began
        built.scaler.load_state_dict(scaler)
    give_back_unused(built.device)
    return terms, seconds


def give_back_unused(device: torch.device) -> None:
    """Hand back what the allocator holds unused, so that no phase pays for the sizes of the one before."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def check_bound(plan: Plan, recorder: Recorder) -> None:
    """Stop where tensors took more than the plan's bound, although the card may have had it.

    What the allocator reserves is held to the budget by ``take_device``.

    Raises:
        PlanError: by how much.
    """
    taken, high = recorder.peak("allocated_bytes"), plan.memory.gpu.peak_bytes.high
    if taken is not None and taken > high:
        asked = f"{plan.total_tokens:,} tokens on {plan.gpu.name}"
        over = f"{format_bytes(taken - high)} ({100 * (taken / high - 1):.1f} %)"
        why = f"the probe step took {format_bytes(taken)}, {over} more than the plan's bound of {format_bytes(high)}."
        raise PlanError(asked, why, _SHORTER)


def train_steps(plan: Plan, built: BuiltRun, data: Data, recorder: Recorder) -> Iterator[dict[str, Any]]:
    """Train; each optimiser step gives what is worth writing down about it.

    Raises:
        PlanError: the loss or the gradients are no numbers any more.
    """
    train = plan.train
    steps, batches = planned_steps(train, len(data.train.rows)), _batches(train, data)
    schedule = LambdaLR(built.optimizer, lambda done: learning_rate_factor(train, done, steps))
    skips_in_a_row = 0
    for step in range(1, steps + 1):
        began, rate = time.perf_counter(), schedule.get_last_lr()[0]
        parts = list(islice(batches, train.accumulation))
        loss = _forward_backward(built, parts, recorder)
        recorder.mark(Phase.OPTIMIZER)
        if built.scaler is None and not math.isfinite(loss):
            why = f"the loss of step {step} is {loss}."
            raise PlanError("training", why, "A smaller learning rate is the first thing to try: --set train.lr=…")
        made = update(built.optimizer, built.scaler, built.trained, train.max_grad_norm)
        recorder.mark(BETWEEN)
        if made.taken:
            schedule.step()
            if built.averages is not None:
                built.averages.update(step, steps)
        skips_in_a_row = 0 if made.taken else skips_in_a_row + 1
        if skips_in_a_row > _MOST_SKIPS:
            why = f"float16 overflowed in {skips_in_a_row} steps in a row, whatever the loss scale."
            raise PlanError("training", why, "The model may need bfloat16, which is a matter of the card.")
        _wait(built.device)
        seconds, tokens = time.perf_counter() - began, sum(part.tokens for part in parts)
        yield {
            "step": step,
            "loss": loss,
            "lr": rate,
            "gradient_norm": made.gradient_norm,
            "taken": made.taken,
            "tokens": tokens,
            "trained_tokens": sum(part.trained for part in parts),
            "seconds": seconds,
            "tokens_per_second": tokens / seconds,
            "allocated_bytes": recorder.peak("allocated_bytes"),
        }


def _forward_backward(built: BuiltRun, parts: list[Batch], recorder: Recorder) -> float:
    """Gradients of the mean loss per trained token over all parts; gives that loss."""
    divisor = torch.tensor(float(sum(part.trained for part in parts)), device=built.device)
    total = torch.zeros((), device=built.device)
    for part in parts:
        recorder.mark(Phase.FORWARD)
        loss = built.loss(part.to(built.device), divisor, recorder.mark)  # it marks the backward pass, too
        (built.scaler.scale(loss) if built.scaler else loss).backward()
        total += loss.detach()
    return float(total)


def planned_steps(train: Train, rows: int) -> int:
    """Optimiser steps of a run: as many as asked for, else as the epochs need."""
    return train.steps or math.ceil(_micro_batches(train, rows) / train.accumulation)


def _micro_batches(train: Train, rows: int) -> int:
    return max(1, round(train.epochs * math.ceil(rows / train.batch)))


def _batches(train: Train, data: Data) -> Iterator[Batch]:
    """Without end where steps are counted; where epochs are, exactly as many as they hold."""
    rows = data.train.rows
    stream = epochs(rows, train.batch, train.seed)
    return stream if train.steps else islice(stream, _micro_batches(train, len(rows)))


def learning_rate_factor(train: Train, done: int, steps: int) -> float:
    """The share of ``train.lr`` after ``done`` steps: a linear rise, then the schedule down to zero."""
    warm = math.ceil(train.warmup * steps)
    if done < warm:
        return (done + 1) / warm
    share = min(1.0, (done - warm) / max(1, steps - warm))
    return {"constant": 1.0, "linear": 1 - share, "cosine": 0.5 * (1 + math.cos(math.pi * share))}[train.schedule]


def _judge(
    when: str, built: BuiltRun, judged: list[Batch], recorder: Recorder, folder: RunFolder, console: Console
) -> Evaluation | None:
    if not judged:
        return None
    made = evaluate(built.loss, judged, built.device, recorder.mark)
    recorder.mark(BETWEEN)
    folder.log(evaluation=when, loss=made.loss, perplexity=made.perplexity, tokens=made.tokens)
    console.print(
        f"Held-out loss {when} training: {made.loss:.4f} (perplexity {made.perplexity:.3f}).", highlight=False
    )
    return made


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _data_counts(data: Data) -> dict[str, Any]:
    parts = {"train": data.train, "validation": data.validation}
    return {
        name: {
            "documents": part.documents,
            "rows": len(part.rows),
            "tokens": part.tokens,
            "lost": part.lost,
            "longest_row": part.longest,
        }
        for name, part in parts.items()
    } | {"skipped": {reason: len(names) for reason, names in data.reading.skipped.items()}}


def _tell_data(console: Console, data: Data, built: BuiltRun) -> None:
    for name, part in (("Training", data.train), ("Validation", data.validation)):
        console.print(
            f"{name}: {part.documents:,} documents, {part.tokens:,} tokens ({part.lost:,} of them never a "
            f"target), {len(part.rows):,} rows, the longest of {part.longest:,} tokens.",
            highlight=False,
        )
    for reason, names in data.reading.skipped.items():
        more = f" and {len(names) - 3:,} more" if len(names) > 3 else ""
        console.print(f"Left out, {reason}: {', '.join(names[:3])}{more}.", highlight=False)
    vocab, largest = (
        built.base.config.vocab_size,
        max(data.train.largest_token, data.validation.largest_token),
    )
    if largest >= vocab:
        why = f"gives token {largest:,}, and the model's vocabulary has {vocab:,} rows."
        raise PlanError("the tokenizer", why, "Tokenizer and model have to come from the same place.")
