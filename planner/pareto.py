"""What a longer sequence costs: the settings that no others beat in length, time for a token and host memory at once.

Each set of optimisations, with each value of its knobs, stands at the longest sequence that it can train. A setting
is left out where another trains as long a sequence or longer, in no more time for a token, with no more host memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from planner.calibration import calibration
from planner.errors import PlanError
from planner.evaluate import Array, Candidates
from planner.fronts import nondominated
from planner.lengths import NO_TIER_RANK
from planner.optimizations.base import Scalar
from planner.planning import Request, Solved, solved
from planner.solver import COARSEST, FINEST, LONGEST, grid_between, weigh
from planner.space import Weighed
from planner.tier_table import knobs_of, seconds_at


@dataclass(frozen=True)
class ParetoPoint:
    """One setting at the longest sequence that it can train; seconds are None where the card's rates are unknown."""

    total_tokens: int
    step_seconds: float | None
    seconds_per_token: float | None
    host_bytes: int
    gpu_high_bytes: int
    optimizations: tuple[str, ...]
    knobs: Mapping[str, Mapping[str, Scalar]]


@dataclass(frozen=True)
class Pareto:
    """The front, the longest first. ``settings`` is how many were compared, ``fitting`` how many train anything."""

    gpu: str
    model: str
    rank: int
    target: int | None
    settings: int
    fitting: int
    points: tuple[ParetoPoint, ...]

    def document(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)


def pareto(request: Request) -> Pareto:
    """The front of a card and a model.

    Every token is trained, unless the request says how many are; the rank is its own, or 8.

    Raises:
        PlanError: as ``make_plan``, and where the request names a length.
    """
    if request.tier is not None or request.total_tokens is not None:
        raise PlanError("plan pareto", "finds lengths, so it takes none.", "`plan --context TOKENS` plans one.")
    made = solved(request, below=False)
    rank = int(request.knobs.get("lora", {}).get("rank", NO_TIER_RANK))
    longest = longest_of_each(made, rank)
    lengths = np.unique(longest[longest > 0])
    settings = (
        made.situation.gpu.id,
        made.situation.model.id,
        rank,
        request.target,
        len(longest),
        int((longest > 0).sum()),
    )
    if not len(lengths):
        return Pareto(*settings, ())
    weighed = _weigh(made, lengths, rank)
    rows = np.flatnonzero(longest > 0)
    at = np.searchsorted(lengths, longest[rows])
    tokens = float(made.found.candidates.batch * made.limits.accumulation) * longest[rows]
    time = weighed.estimate[rows, at] / tokens
    # Where a rate is unknown so is the time, and only settings whose time is unknown too are compared.
    unknown = np.isnan(time)
    columns = [-longest[rows], np.where(unknown, 0, time), weighed.host[rows, at], unknown, ~unknown]
    points = np.column_stack([column.astype(np.float64) for column in columns])
    front = [int(place) for place in nondominated(points)]
    found = [
        _point(made, weighed, int(rows[place]), int(at[place]), int(longest[rows[place]]), rank, float(tokens[place]))
        for place in front
    ]
    return Pareto(*settings, tuple(sorted(found, key=lambda point: (-point.total_tokens, point.host_bytes))))


def _point(made: Solved, weighed: Weighed, row: int, index: int, total: int, rank: int, tokens: float) -> ParetoPoint:
    outcome = weighed.outcome(row)
    seconds = seconds_at(outcome, index, rank, made.situation.gpu, made.found.constants)
    return ParetoPoint(
        total,
        seconds,
        None if seconds is None else float(f"{seconds / tokens:.6g}"),
        int(outcome.host[index]),
        int(outcome.high[index]),
        outcome.ids,
        knobs_of(outcome, rank),
    )


def longest_of_each(made: Solved, rank: int) -> Array:
    """The longest sequence of every configuration of the space, 0 where it can train none.

    As in ``planner.solver.longest`` the answer is bracketed on a grid that is refined, here for all that share one.
    """
    high = made.situation.model.most_tokens or LONGEST
    low = min(max(COARSEST, made.request.target or 0), high)
    everyone = np.arange(len(_weigh(made, np.array([low]), rank).high))
    longest = np.zeros(len(everyone), dtype=np.int64)
    waiting = [(low, high, everyone)]
    while waiting:
        low, high, rows = waiting.pop()
        grid = grid_between(low, high)
        fits = _weigh(made, grid, rank).fits[rows]
        last = fits.shape[1] - 1 - np.argmax(fits[:, ::-1], axis=1)
        able = fits.any(axis=1)
        longest[rows[able]] = grid[last[able]]
        for place in np.unique(last[able]):
            if place < len(grid) - 1 and grid[place + 1] - grid[place] > FINEST:
                waiting.append((int(grid[place]), int(grid[place + 1]), rows[able & (last == place)]))
    return longest


def _weigh(made: Solved, lengths: Array, rank: int) -> Weighed:
    targets = lengths if made.request.target is None else np.minimum(lengths, made.request.target)
    at = Candidates(lengths, targets, np.full_like(lengths, rank), made.found.candidates.batch)
    return weigh(made.found.space, at, made.situation, made.limits, calibration(), every=True)
