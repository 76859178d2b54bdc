"""The rows of an optimiser step, split into micro-batches: the split that takes the least time and fits.

However the rows of a step are split its gradient is the same, as each token has the same weight; what is left to choose
is memory against time. (An epoch ends with what rows are left: where they do not fill a micro-batch, its last step has
fewer.) Memory grows with the rows of a micro-batch, so of the divisors of the rows the first for which there is too
little memory ends the search; time is what the plan of each says.
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
    """What is found for the best split of ``request.rows`` that fits at the length that one row at a time has.

    Args:
        solve: plans a request that says how rows are split.
    """
    assert request.rows is not None
    one = solve(_with(request, 1))
    want = one.found.wanted[one.found.index]
    if not _has_memory(one) or (want.tier is None and request.total_tokens is None):
        return one  # the longest at all is that of one row at a time
    same_length = request if request.total_tokens is not None else replace(request, tier=want.tier)
    splits = [one]
    for size in divisors(request.rows)[1:]:
        found = solve(_with(same_length, size))
        if not _has_memory(found):
            break
        splits.append(found)
    fitting = [found for found in splits if bool(found.found.best.fits[found.found.index])]
    return min(fitting or splits, key=_cost)


def _with(request: Request, batch: int) -> Request:
    assert request.rows is not None
    train = {**request.train, "batch": batch, "accumulation": request.rows // batch}
    return replace(request, rows=None, train=train)


def _has_memory(solved: Solved) -> bool:
    """Whether card, host and disk have enough; that a step takes too long may be another with more rows at a time."""
    best, index, limits = solved.found.best, solved.found.index, solved.limits
    return bool(
        best.high[index] <= limits.gpu_bytes
        and best.host[index] <= limits.host_bytes
        and best.disk[index] <= limits.disk_bytes
    )


def _cost(solved: Solved) -> tuple[float, ...]:
    """What a split is chosen by: three digits of its time, as less is noise, or the memory that was asked for first."""
    best, index = solved.found.best, solved.found.index
    seconds, memory = float(f"{float(best.time.rank[index]):.3g}"), float(best.high[index])
    return (memory, seconds) if solved.request.objective == "memory" else (seconds, memory)
