"""Stages of a run whose rows grow: how many there are, which steps belong to each, and how long rows are in it.

All stages have as many steps, and every step as many tokens to train: where a row is cut in k, a micro-batch has k
times the rows. ``s`` is the number of stages, and rows of stage i, from 0, are cut in 2**(s - 1 - i).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from planner.plan import Stage

NAME = "context_stages"


@dataclass(frozen=True)
class Shape:
    """The largest micro-batch of a stage: ``rows`` of ``total`` tokens, the last ``target`` of each trained.

    Where a row's trained end does not fill its pieces, ``target`` is the mean over them, rounded up.
    """

    rows: int
    total: int
    target: int


def cuts(stages: int) -> list[int]:
    """In how many pieces each stage cuts a row."""
    return [2 ** (stages - 1 - index) for index in range(stages)]


def stage_of(step: int, steps: int, stages: int) -> int:
    """The stage, from 0, of one of ``steps`` steps, which are counted from 0; a run of fewer steps leaves some out."""
    return min(step, steps - 1) * stages // steps


def steps_in(steps: int, stages: int) -> list[int]:
    """How many of the steps each stage has."""
    begins = [-(-stage * steps // stages) for stage in range(stages + 1)]
    return [end - begin for begin, end in pairwise(begins)]


def shapes(total: int, target: int, batch: int, stages: int) -> list[Shape]:
    """The largest micro-batch of each stage."""
    found = []
    for pieces in cuts(stages):
        length = total // pieces
        rows = -(-target // length)
        found.append(Shape(batch * rows, length, -(-target // rows)))
    return found


def mean_seconds(stages: Sequence[Stage]) -> float | None:
    """Seconds of a step on average over a run; None where they are unknown, or there are no stages."""
    seconds = [stage.step_seconds for stage in stages if stage.step_seconds is not None]
    return sum(seconds) / len(seconds) if seconds and len(seconds) == len(stages) else None
