"""The data once through: how many rows and steps that is, and how long it takes.

Rows are cut and dealt as the trainer does it (``trainer/data.py``). Short documents give short rows, which take less
than the planned step: each row is timed at its own length.
"""

from __future__ import annotations

import numpy as np

from planner.data_profile import DataProfile
from planner.documents import validation_places
from planner.errors import PlanError
from planner.plan import Epoch, Train
from planner.plan_time import StepClock, significant


def row_lengths(tokens: np.ndarray, length: int) -> np.ndarray:
    """Inputs of every row of documents of so many tokens, cut at ``length``; both are arrays of whole numbers."""
    inputs = np.maximum(tokens - 1, 0)  # the last token of a document is a target alone
    full, rest = np.divmod(inputs, length)
    return np.concatenate([np.full(int(full.sum()), length, dtype=np.int64), rest[rest > 0]])


def epoch(data: DataProfile, train: Train, clock: StepClock) -> Epoch:
    """One epoch of a plan's data.

    Approximate: with several rows in a batch, which rows meet is decided by chance here and in the trainer.

    Raises:
        PlanError: there are too few documents to train on some and judge by others, or none is long enough.
    """
    kept = validation_places(len(data.sizes), train.validation, train.seed)
    trained = np.array([count for place, count in enumerate(data.tokens) if place not in kept], dtype=np.int64)
    want = clock.found.wanted[clock.found.index]
    rows = row_lengths(trained, want.total)
    if not len(rows):
        raise PlanError("the data", "leaves nothing to train on: no document has two tokens or more.")
    micro_batches = -(-len(rows) // train.batch)
    steps = -(-micro_batches // train.accumulation)
    seconds = _seconds(rows, train, clock)
    update = clock.update()
    hours = None if seconds is None or update is None else significant((seconds + steps * update) / 3600)
    return Epoch(
        documents=len(data.sizes),
        validation_documents=len(kept),
        bytes=sum(data.sizes),
        tokens=sum(data.tokens),
        tokens_basis="exact" if data.exact else "estimated",
        rows=len(rows),
        steps=steps,
        hours=hours,
        basis=data.basis,
    )


def _seconds(rows: np.ndarray, train: Train, clock: StepClock) -> float | None:
    """Expected seconds of all micro-batches, each as long as its longest row."""
    want = clock.found.wanted[clock.found.index]
    if train.batch > 1:
        rows = np.random.default_rng(train.seed).permutation(rows)
    places = np.arange(0, len(rows), train.batch)
    longest = np.maximum.reduceat(rows, places)
    sizes = np.diff(np.append(places, len(rows)))
    shapes, counts = np.unique(np.stack([sizes, longest]), axis=1, return_counts=True)
    lengths = shapes[1].astype(np.float64)
    # Trained tokens of a row: as many as the plan trains, or all of a shorter row.
    targets = lengths if want.target == want.total else np.minimum(lengths, want.target)
    each = clock.micro_batches(shapes[0].astype(np.float64), lengths, targets)
    return None if each is None else float(np.sum(each * counts))
