"""The training loop: batches in their order, forward and backward, optimiser steps, learning rate."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR

from planner.errors import PlanError
from planner.ledger import Phase
from planner.plan import Plan, Train
from trainer.data import Batch, Data, epochs
from trainer.measure import BETWEEN, Recorder
from trainer.session import BuiltRun
from trainer.step import update

_MOST_SKIPS = 25  # the loss scale begins at 2**16; halved this often it is below every useful value

Announce = Callable[[str, Sequence[int]], None]
"""Told what begins, and how many tokens each of its micro-batches has."""


def nobody(what: str, tokens: Sequence[int]) -> None:
    """Nobody listens."""


def train_steps(
    plan: Plan, built: BuiltRun, data: Data, recorder: Recorder, announce: Announce = nobody
) -> Iterator[dict[str, Any]]:
    """Train; each optimiser step gives what is worth writing down about it.

    Args:
        announce: hears of each step before it begins, and how many tokens its micro-batches have.

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
        announce(f"step {step} of {steps}", [part.tokens for part in parts])
        loss = forward_backward(built, parts, recorder)
        recorder.mark(Phase.OPTIMIZER)
        if built.scaler is None and not math.isfinite(loss):
            why = f"the loss of step {step} is {loss}."
            raise PlanError("training", why, "A smaller learning rate is the first thing to try: --set train.lr=…")
        made = update(built.optimizer, built.scaler, built.trained, train.max_grad_norm)
        recorder.mark(BETWEEN)
        if made.taken:
            schedule.step()
        skips_in_a_row = 0 if made.taken else skips_in_a_row + 1
        if skips_in_a_row > _MOST_SKIPS:
            why = f"float16 overflowed in {skips_in_a_row} steps in a row, whatever the loss scale."
            raise PlanError("training", why, "The model may need bfloat16, which is a matter of the card.")
        wait_for(built.device)
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


def forward_backward(built: BuiltRun, parts: list[Batch], recorder: Recorder) -> float:
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


def wait_for(device: torch.device) -> None:
    """Return once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
