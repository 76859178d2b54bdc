"""The rows of an optimiser step, split into micro-batches: the split that takes the least time and fits.

A step of so many rows has the same gradient however they are split, as each token has the same weight; what is left to
choose is memory against time. Memory grows with the rows of a micro-batch, so of the divisors of the rows the first
that does not fit ends the search; time is what the plan of each says.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from planner.errors import PlanError
from planner.optimizations.base import Scalar

if TYPE_CHECKING:
    from planner.planning import Request, Solved

MOST_ROWS = 65_536


def rows_mistakes(rows: int | None, train: Mapping[str, Scalar]) -> list[PlanError]:
    """What contradicts a number of rows: sizes that it would be split into."""
    set_by_hand = [f"--set train.{name}={train[name]}" for name in ("batch", "accumulation") if name in train]
    if rows is None or not set_by_hand:
        return []
    why = "rows of a step are micro-batch times accumulation, and the plan splits them."
    return [PlanError(f"--set train.rows={rows} {' '.join(set_by_hand)}", why, "Drop one or the other.")]


def rows_at_many_lengths(rows: int | None) -> list[PlanError]:
    """What is wrong with rows that are to be split where many lengths are looked at, with one micro-batch for all."""
    if rows is None:
        return []
    why = "is split at one length, and here many are looked at."
    return [PlanError(f"--set train.rows={rows}", why, "Set train.batch and train.accumulation, or plan one length.")]


def divisors(rows: int) -> list[int]:
    """All of them, the least first."""
    return [size for size in range(1, rows + 1) if rows % size == 0]


def split_rows(request: Request, solve: Callable[[Request], Solved]) -> Solved:
    """What is found for the fastest split of ``request.rows`` that fits at the length that one row at a time has.

    Args:
        solve: plans a request that says how rows are split.
    """
    assert request.rows is not None
    best = solve(_with(request, 1))
    want = best.found.wanted[best.found.index]
    if not _fits(best) or (want.tier is None and request.total_tokens is None):
        return best  # the longest at all is that of one row at a time
    same_length = request if request.total_tokens is not None else replace(request, tier=want.tier)
    for size in divisors(request.rows)[1:]:
        found = solve(_with(same_length, size))
        if not _fits(found):
            break
        if _seconds(found) < _seconds(best):
            best = found
    return best


def _with(request: Request, batch: int) -> Request:
    assert request.rows is not None
    train = {**request.train, "batch": batch, "accumulation": request.rows // batch}
    return replace(request, rows=None, train=train)


def _fits(solved: Solved) -> bool:
    return bool(solved.found.best.fits[solved.found.index])


def _seconds(solved: Solved) -> float:
    """Seconds of a step as they are ranked, to three digits: less is noise, and fewer rows take less memory."""
    return float(f"{float(solved.found.best.time.rank[solved.found.index]):.3g}")
