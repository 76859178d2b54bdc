"""Rows of a run in stages: each step's rows, cut as its stage has them."""

from __future__ import annotations

from collections.abc import Sequence

from planner.stages import cuts, stage_of
from trainer.data import AnyRow, Cut, Row


def shortened(row: Row, most: int) -> list[Row]:
    """One row as several of at most ``most`` inputs, from its end on as far as anything of it is trained.

    Each target is trained in one of them, so together they train what the row does.
    """
    pieces, end, left = [], row.inputs, row.trained
    while left > 0:
        begin = max(0, end - most)
        pieces.append(Row(row.tokens[begin : end + 1], min(left, end - begin)))
        left -= end - begin
        end = begin
    return pieces[::-1]


def stage_begun(done: int, steps: int, stages: int) -> int | None:
    """The stage, from 0, that begins once so many steps are done; None where none does, or no step is left."""
    if done >= steps or done == 0:
        return None
    before, now = (stage_of(step, steps, stages) for step in (done - 1, done))
    return now if now > before else None


def by_stage(seconds: Sequence[float], steps: int, stages: int) -> list[list[float]]:
    """What each step took, by its stage.

    Args:
        steps: of the whole run, which may have ended before.
    """
    found: list[list[float]] = [[] for _ in range(stages)]
    for step, took in enumerate(seconds):
        found[stage_of(step, steps, stages)].append(took)
    return found


def cut_by_stage(total: int, stages: int, steps: int, accumulation: int) -> Cut:
    """What makes the rows of a micro-batch, by its number from 0, those of its stage.

    Args:
        total: inputs of a row in the last stage, at most.
        steps: of the run; ``accumulation``: micro-batches in each.
    """
    lengths = [total // pieces for pieces in cuts(stages)]

    def cut(number: int, rows: Sequence[AnyRow]) -> Sequence[AnyRow]:
        most = lengths[stage_of(number // accumulation, steps, stages)]
        # A row of several documents is one piece after the other; none is here beside stages.
        return [short for row in rows for piece in row.pieces for short in shortened(piece, most)]

    return cut
