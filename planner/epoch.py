"""The data once through: how many rows and steps that is, and how long it takes.

Rows are cut, packed and dealt as the trainer does it (``trainer/data.py``). Short documents give short rows, which take
less than the planned step: each row is timed at its own length, and attention at that of each document in it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from planner.data_profile import DataProfile
from planner.documents import validation_places
from planner.errors import PlanError
from planner.packing import pack
from planner.plan import Epoch, Train
from planner.plan_time import StepClock, significant
from planner.stages import NAME, cuts


def row_lengths(tokens: np.ndarray, length: int) -> np.ndarray:
    """Inputs of every row of documents of so many tokens, cut at ``length``; both are arrays of whole numbers."""
    inputs = np.maximum(tokens - 1, 0)  # the last token of a document is a target alone
    full, rest = np.divmod(inputs, length)
    return np.concatenate([np.full(int(full.sum()), length, dtype=np.int64), rest[rest > 0]])


@dataclass(frozen=True)
class PackedRows:
    """Inputs of every row, and its pairs: s (s + 1) summed over the s inputs of each document in it."""

    lengths: np.ndarray
    pairs: np.ndarray


def packed_rows(pieces: np.ndarray, room: int, most: int) -> PackedRows:
    """Rows of pieces of documents, as many as ``most`` of which may share one."""
    if most == 1:
        return PackedRows(pieces, pieces * (pieces + 1))
    together = pack(pieces.tolist(), room, most)
    order = np.array([piece for row in together for piece in row], dtype=np.int64)
    starts = np.cumsum([0, *map(len, together[:-1])]) if together else np.zeros(0, dtype=np.int64)
    sizes = pieces[order]
    if not len(sizes):
        return PackedRows(sizes, sizes)
    return PackedRows(np.add.reduceat(sizes, starts), np.add.reduceat(sizes * (sizes + 1), starts))


def packing_hint(data: DataProfile, train: Train, clock: StepClock) -> str | None:
    """A word on how much fuller rows could be; None where they are at least half full, or packed already."""
    want = clock.found.wanted[clock.found.index]
    pieces = row_lengths(np.array(data.tokens, dtype=np.int64), want.total)
    if clock.configuration.letters["d_r"] > 1 or not len(pieces):
        return None
    full = pieces.sum() / (len(pieces) * want.target)
    if full > 0.5:
        return None
    return (
        f"Documents are shorter than what is planned to be trained in a row: rows are {100 * full:.2g} % full. "
        "--with sequence_packing lets documents share a row, so that an epoch has fewer steps."
    )


def epoch(data: DataProfile, train: Train, clock: StepClock) -> Epoch:
    """One epoch of a plan's data.

    Approximate: with several rows in a batch, which rows meet is decided by chance here and in the trainer.

    Raises:
        PlanError: there are too few documents to train on some and judge by others, or none is long enough.
    """
    kept = validation_places(len(data.sizes), train.validation, train.seed)
    trained = np.array([count for place, count in enumerate(data.tokens) if place not in kept], dtype=np.int64)
    want = clock.found.wanted[clock.found.index]
    rows = packed_rows(row_lengths(trained, want.total), want.target, clock.configuration.letters["d_r"])
    if not len(rows.lengths):
        raise PlanError("the data", "leaves nothing to train on: no document has two tokens or more.")
    micro_batches = -(-len(rows.lengths) // train.batch)
    steps = -(-micro_batches // train.accumulation)
    stages = int(clock.configuration.knobs[NAME]["stages"]) if NAME in clock.configuration.ids else 1
    in_each = [_seconds(rows, train, clock, most=want.total // pieces) for pieces in cuts(stages)]
    known = [each for each in in_each if each is not None]
    seconds = sum(known) / stages if len(known) == stages else None  # each has the same share of the steps
    update = clock.update()
    hours = None if seconds is None or update is None else significant((seconds + steps * update) / 3600)
    return Epoch(
        documents=len(data.sizes),
        validation_documents=len(kept),
        bytes=sum(data.sizes),
        tokens=sum(data.tokens),
        tokens_basis="exact" if data.exact else "estimated",
        rows=len(rows.lengths),
        steps=steps,
        hours=hours,
        basis=data.basis,
    )


def _seconds(rows: PackedRows, train: Train, clock: StepClock, most: int) -> float | None:
    """Expected seconds of all micro-batches, each as long as its longest row.

    Args:
        most: inputs of a row; longer ones are cut from their trained end on, and stay in their micro-batch.
    """
    want = clock.found.wanted[clock.found.index]
    packing = clock.configuration.letters["d_r"] > 1
    inputs, pairs = rows.lengths, rows.pairs
    trained = np.minimum(inputs, want.target)
    pieces = -(-trained // most) if most < want.total else np.ones_like(inputs)
    inputs = np.minimum(inputs, most)
    if train.batch > 1:
        order = np.random.default_rng(train.seed).permutation(len(inputs))
        inputs, pairs, pieces, trained = inputs[order], pairs[order], pieces[order], trained[order]
    places = np.arange(0, len(inputs), train.batch)
    longest = np.maximum.reduceat(inputs, places)
    sizes = np.add.reduceat(pieces, places)
    # Padding is a document of its own where rows are packed; else each row is as long as the longest.
    padding = np.repeat(longest, np.diff(np.append(places, len(inputs)))) - inputs
    attended = np.add.reduceat(pairs + padding * (padding + 1), places) if packing else sizes * longest * (longest + 1)
    # Of a row that is cut, its pieces train as many on average.
    each_trains = -(-np.add.reduceat(trained, places) // sizes) if most < want.total else longest
    shapes, counts = np.unique(np.stack([sizes, longest, attended, each_trains]), axis=1, return_counts=True)
    lengths = shapes[1].astype(np.float64)
    share = shapes[2] / (shapes[0] * lengths * (lengths + 1))
    # Trained tokens of a row: as many as the plan trains, or all of a shorter row.
    targets = lengths if want.target == want.total else np.minimum(shapes[3].astype(np.float64), want.target)
    each = clock.micro_batches(shapes[0].astype(np.float64), lengths, targets, attended=share)
    return None if each is None else float(np.sum(each * counts))
