"""What a longer sequence costs: the settings that no others beat in length, time for a token and host memory at once.

Each set of optimisations, with each value of its knobs, stands at the longest sequence that it can train. A setting
is left out where another trains that sequence or a longer one, in no more time for a token, with no more host memory.
Whoever takes no less of anything, whatever the length, is not even looked at. What waits between the passes of streamed
layers waits in host memory, unless the request says otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from planner.calibration import calibration
from planner.compose import Configuration
from planner.errors import PlanError, raise_all
from planner.evaluate import Array, Candidates, Evaluator
from planner.fronts import nondominated
from planner.lengths import NO_TIER_RANK
from planner.longest import COARSEST, FINEST, LONGEST, grid_between
from planner.micro_batch import rows_at_many_lengths
from planner.optimizations.base import Scalar
from planner.plan_time import seconds_at
from planner.planning import Request, Solved, solved
from planner.products import Product
from planner.rows import Values
from planner.tier_table import knobs_of
from planner.weighing import SPENT, Weights


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


def pareto(request: Request, tell: Callable[[int, int], None] = lambda settled, of: None) -> Pareto:
    """The front of a card and a model.

    Every token is trained, unless the request says how many are; the rank is its own, or 8.

    Args:
        tell: hears of how many settings the longest sequence is known, and how many there are.

    Raises:
        PlanError: as ``make_plan``, and where the request names a length.
    """
    if request.tier is not None or request.total_tokens is not None:
        raise PlanError("plan pareto", "finds lengths, so it takes none.", "`plan --context TOKENS` plans one.")
    raise_all(rows_at_many_lengths(request.rows))
    made = solved(request, below=False)
    rank = int(request.knobs.get("lora", {}).get("rank", NO_TIER_RANK))
    settings = Settings(made, rank)
    longest = settings.longest(tell)
    lengths = np.unique(longest[longest > 0])
    told = (made.situation.gpu.id, made.situation.model.id, rank, request.target)
    if not len(lengths):
        return Pareto(*told, len(longest), 0, ())
    weights = settings.weigh(lengths)
    tokens = float(made.found.candidates.batch * made.limits.accumulation) * lengths
    # Where a rate is unknown so is the time, and only settings whose time is unknown too are compared.
    unknown = np.logical_not(np.broadcast_to(weights.known, weights.high.shape))
    columns = (-lengths, np.where(unknown, 0, weights.seconds / tokens), weights.host, unknown, ~unknown)
    points = np.stack([np.broadcast_to(column, weights.high.shape).astype(np.float64) for column in columns], axis=2)
    row, at = np.nonzero(weights.fits(made.limits))
    front = np.array([row, at]).T[nondominated(points[row, at])]
    found = [
        _point(made, settings, int(row), int(lengths[at]), rank) for row, at in front if longest[row] == lengths[at]
    ]
    order = sorted(found, key=lambda point: (-point.total_tokens, point.host_bytes))
    return Pareto(*told, len(longest), int((longest > 0).sum()), tuple(order))


def _point(made: Solved, settings: Settings, row: int, total: int, rank: int) -> ParetoPoint:
    evaluate = Evaluator(settings.candidates(np.array([total])), made.situation, calibration(), made.limits)
    outcome = evaluate(settings.configuration(row))
    seconds = seconds_at(outcome, 0, rank, made.situation.gpu, made.found.constants)
    tokens = made.found.candidates.batch * made.limits.accumulation * total
    return ParetoPoint(
        total,
        seconds,
        None if seconds is None else float(f"{seconds / tokens:.6g}"),
        int(outcome.host[0]),
        int(outcome.high[0]),
        outcome.ids,
        knobs_of(outcome, rank),
    )


class Settings:
    """The sets with values of their knobs that no other beats in every respect at every length of a coarse grid."""

    def __init__(self, made: Solved, rank: int) -> None:
        self.made, self.rank, self.on_card = made, rank, made.found.on_card
        grid = grid_between(self.shortest, self.most, 9)
        # With what waits between passes in both places there are some hundred points that differ by little host memory.
        place = made.request.knobs.get("streamed", {}).get("staging", "host")
        trunks = [branch.trunk for branch in self.on_card.space.branches]
        there = [trunk.knobs.get("streamed", {}).get("staging", place) == place for trunk in trunks]
        at = self.candidates(grid)
        levels = [self.on_card.level(at, index) for index in range(len(grid))]
        self.parts = [
            (each, _unbeaten(each, np.stack([level.sums(each) for level in levels], axis=2)))
            for each in self.on_card.products
            if there[each.branch]
        ]

    @property
    def shortest(self) -> int:
        """Tokens of the shortest sequence that is looked at."""
        return min(max(COARSEST, self.made.request.target or 0), self.most)

    @property
    def most(self) -> int:
        """Tokens of the longest sequence that is looked at."""
        return self.made.situation.model.most_tokens or LONGEST

    def candidates(self, lengths: Array) -> Candidates:
        """Runs of these lengths."""
        target = self.made.request.target
        targets = lengths if target is None else np.minimum(lengths, target)
        return Candidates(lengths, targets, np.full_like(lengths, self.rank), self.made.found.candidates.batch)

    def configuration(self, row: int) -> Configuration:
        """One of the settings."""
        for of, taken in self.parts:
            if row < len(taken):
                return self.on_card.space.configuration(of.branch, taken[row])
            row -= len(taken)
        raise IndexError(row)

    @property
    def everyone(self) -> Array:
        """Every setting, by its row."""
        return np.arange(sum(len(taken) for _, taken in self.parts))

    def weigh(self, lengths: Array, rows: Array | None = None) -> Weights:
        """Every setting at every length; or those of some rows, which go up."""
        at = self.candidates(lengths)
        levels = [self.on_card.level(at, index) for index in range(len(lengths))]
        rows, found, before = self.everyone if rows is None else rows, [], 0
        for of, every in self.parts:
            taken = every[rows[(before <= rows) & (rows < before + len(every))] - before]
            before += len(every)
            if not len(taken):
                continue
            sums = np.stack([level.sums(of) for level in levels])
            together = np.zeros((len(sums), len(taken), sums.shape[2]))
            for places in taken.T:
                together += sums[:, np.searchsorted(of.places, places)]
            found.append(self.on_card.scale.weigh(together, of.clock))
        known = np.concatenate([np.full((each.high.shape[1], 1), each.known) for each in found])
        high, host, disk, seconds, inexact, order = (
            np.concatenate([getattr(each, name).T for each in found])
            for name in ("high", "host", "disk", "seconds", "inexact", "order")
        )
        return Weights(high, host, disk, seconds, inexact, order, known)

    def longest(self, tell: Callable[[int, int], None] = lambda settled, of: None) -> Array:
        """The longest sequence of every setting, 0 where it can train none; ``tell`` hears how many are known.

        The answer is bracketed on a grid that is refined, here for all that share one.
        """
        longest = np.zeros(len(self.everyone), dtype=np.int64)
        waiting = [(self.shortest, self.most, self.everyone)]
        while waiting:
            low, high, rows = waiting.pop()
            grid = grid_between(low, high)
            fits = self.weigh(grid, rows).fits(self.made.limits)
            last = fits.shape[1] - 1 - np.argmax(fits[:, ::-1], axis=1)
            able = fits.any(axis=1)
            longest[rows[able]] = grid[last[able]]
            for place in np.unique(last[able]):
                if place < len(grid) - 1 and grid[place + 1] - grid[place] > FINEST:
                    waiting.append((int(grid[place]), int(grid[place + 1]), rows[able & (last == place)]))
            tell(len(longest) - sum(len(each) for *_, each in waiting), len(longest))
        return longest


def _unbeaten(of: Product, sums: Values) -> Array:
    """Combinations of places that no other of the product beats in bytes and seconds at every length.

    Args:
        sums: place × column × length.
    """
    together, taken = np.zeros((1, *sums.shape[1:])), np.zeros((1, 0), dtype=np.int64)
    for group in of.groups:
        together = (together[:, None] + sums[np.searchsorted(of.places, group)]).reshape(-1, *sums.shape[1:])
        taken = np.column_stack([np.repeat(taken, len(group), axis=0), np.tile(group, len(taken))])
        left = nondominated(together[:, : SPENT.stop].reshape(len(together), -1))
        together, taken = together[left], taken[left]
    return taken
