"""The training loop: batches in their order, forward and backward, optimiser steps, learning rate."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR

from planner.errors import PlanError
from planner.ledger import Phase
from planner.plan import Plan, Train
from trainer.beginning import Place
from trainer.built import BuiltRun
from trainer.data import Batch, Data, epochs
from trainer.measure import BETWEEN, Recorder
from trainer.saving import Inside, Saved, Saver
from trainer.stages import cut_by_stage
from trainer.step import Update, update

_MOST_SKIPS = 25  # the loss scale begins at 2**16; halved this often it is below every useful value

Announce = Callable[[str, Sequence[int]], None]
"""Told what begins, and how many tokens each of its micro-batches has."""


def nobody(what: str, tokens: Sequence[int]) -> None:
    """Nobody listens."""


def train_steps(
    plan: Plan,
    built: BuiltRun,
    data: Data,
    recorder: Recorder,
    announce: Announce = nobody,
    saver: Saver | None = None,
    saved: Saved | None = None,
    place: Place | None = None,
) -> Iterator[dict[str, Any]]:
    """Train; each optimiser step gives what is worth writing down about it.

    Args:
        announce: hears of each step before it begins, and how many tokens its micro-batches have.
        saver: stores the run while it is under way.
        saved: what was stored of a run that goes on.
        place: is told where training is.

    Raises:
        PlanError: the loss or the gradients are no numbers any more.
    """
    train = plan.train
    steps, batches = planned_steps(train, len(data.train.rows)), batches_of(plan, built.stages, data)
    schedule = LambdaLR(built.optimizer, lambda done: built.rates.factor(train, done, steps))
    done = skips_in_a_row = 0
    inside: Inside | None = None
    if saved is not None:
        saved.restore(built)  # the optimiser's own learning rate, too, which the schedule has just set
        schedule.load_state_dict(saved.state["schedule"])
        done, skips_in_a_row, inside = saved.step, saved.skips, saved.inside
        batches = islice(batches, done * train.accumulation, None)
    place = place or Place()
    place.step, place.skips, place.schedule = done, skips_in_a_row, schedule
    if saver is not None:
        saver.begin(schedule, done, skips_in_a_row, saved)

    trained, first = built.trained, built.first_matrices

    def shape(before: int) -> float:
        return built.shaping.shape(trained, first, before, train.max_grad_norm)

    for step in range(done + 1, steps + 1):
        began, rate = time.perf_counter() - (inside.seconds if inside else 0.0), schedule.get_last_lr()[0]
        parts = list(islice(batches, train.accumulation))
        announce(f"step {step} of {steps}", [part.tokens for part in parts[inside.part if inside else 0 :]])
        if saver is not None:
            saver.step_begins(began)
        if inside is None:  # of a step that goes on, only the rest would be timed
            recorder.clock.begin()
        loss = forward_backward(built, parts, recorder, saver, saved if inside else None)
        inside = None
        recorder.mark(Phase.OPTIMIZER)
        place.changing = True
        went_back = _went_back(built, step, loss)
        if went_back is None and built.scaler is None and not math.isfinite(loss):
            why = f"the loss of step {step} is {loss}."
            raise PlanError("training", why, "A smaller learning rate is the first thing to try: --set train.lr=…")
        if went_back is None:
            made = update(built.optimizer, built.scaler, partial(shape, step - 1))
        else:
            made = Update(math.nan, taken=False)
        recorder.mark(BETWEEN)
        if made.taken or went_back is not None:
            schedule.step()
        if made.taken and built.averages is not None:
            built.averages.update(step, steps)
        skips_in_a_row = 0 if made.taken or went_back is not None else skips_in_a_row + 1
        if skips_in_a_row > _MOST_SKIPS:
            why = f"float16 overflowed in {skips_in_a_row} steps in a row, whatever the loss scale."
            raise PlanError("training", why, "The model may need bfloat16, which is a matter of the card.")
        wait_for(built.device)
        place.step, place.skips, place.changing = step, skips_in_a_row, False
        recorder.clock.end()
        seconds, tokens = time.perf_counter() - began, sum(part.tokens for part in parts)
        yield {
            "step": step,
            "loss": loss,
            "lr": rate,
            "gradient_norm": None if went_back is not None else made.gradient_norm,
            "taken": made.taken,
            "tokens": tokens,
            "trained_tokens": sum(part.trained for part in parts),
            "seconds": seconds,
            "tokens_per_second": tokens / seconds,
            "allocated_bytes": recorder.peak("allocated_bytes"),
        } | ({} if went_back is None else {"went_back_to": went_back})
        if saver is not None:
            saver.step_done(step, skips_in_a_row)


def _went_back(built: BuiltRun, step: int, loss: float) -> int | None:
    """After which step the state is that a spike made it go back to; None where there was none.

    Where a loss scale is to be found, losses that are no numbers are its business.
    """
    spikes = built.spikes
    if spikes is None or (built.scaler is not None and not math.isfinite(loss)):
        return None
    if spikes.is_spike(loss):
        return spikes.back(step, loss, built)
    if math.isfinite(loss):
        spikes.good(step, loss, built)
    return None


def forward_backward(
    built: BuiltRun,
    parts: list[Batch],
    recorder: Recorder,
    saver: Saver | None = None,
    saved: Saved | None = None,
) -> float:
    """Gradients of the mean loss per trained token over all parts; gives that loss.

    Args:
        saver: hears of each part; ``saved``: the step is under way, and goes on from there.
    """
    divisor = torch.tensor(float(sum(part.trained for part in parts)), device=built.device)
    total, first = torch.zeros((), device=built.device), 0
    if saved is not None and saved.inside is not None:
        total, first = saved.inside.total.to(built.device), saved.inside.part
        if (halfway := saved.halfway(built.device)) is not None:
            assert built.streamed is not None
            built.streamed.go_on(halfway)
    for index in range(first, len(parts)):
        recorder.mark(Phase.FORWARD)
        loss = built.loss(parts[index].to(built.device), divisor, recorder.mark)  # it marks the backward pass, too
        if saver is not None:
            saver.part_begins(index, total, loss.detach())
        # Streamed in this thread: the interruption of a pass that lasts hours has to reach Python before its end. The
        # resident one as torch has it, and as it was measured: with a second thread, and that one's cuBLAS workspace.
        with torch.autograd.set_multithreading_enabled(built.streamed is None):
            (built.scaler.scale(loss) if built.scaler else loss).backward()
        total += loss.detach()
        if saver is not None and index < len(parts) - 1:
            saver.part_done(index, total)
    return float(total)


def planned_steps(train: Train, rows: int) -> int:
    """Optimiser steps of a run: as many as asked for, else as the epochs need."""
    return train.steps or math.ceil(_micro_batches(train, rows) / train.accumulation)


def _micro_batches(train: Train, rows: int) -> int:
    return max(1, round(train.epochs * math.ceil(rows / train.batch)))


def batches_of(plan: Plan, stages: int, data: Data) -> Iterator[Batch]:
    """Without end where steps are counted; where epochs are, exactly as many as they hold."""
    train, rows = plan.train, data.train.rows
    steps = planned_steps(train, len(rows))
    cut = cut_by_stage(plan.total_tokens, stages, steps, train.accumulation) if stages > 1 else None
    stream = epochs(rows, train.batch, train.seed, cut)
    return stream if train.steps else islice(stream, _micro_batches(train, len(rows)))


def wait_for(device: torch.device) -> None:
    """Return once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
