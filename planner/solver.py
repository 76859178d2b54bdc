"""Complete search: every valid set of optimisations at every candidate, none left out that could be the best.

``planner.branches`` says which sets there are, ``planner.space`` evaluates them, leaving out only what another beats
in every respect; so the search needs no heuristic, and can say of every loser why it lost.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import numpy as np

from planner.branches import branches
from planner.calibration import Calibration
from planner.compose import compose, problems
from planner.errors import PlanError, raise_all
from planner.evaluate import Array, Candidates, Evaluator, Limits, Outcome
from planner.ledger import Device, Phase
from planner.optimizations import all_optimizations
from planner.optimizations.base import Scalar, Situation
from planner.sets import PinnedKnobs
from planner.space import Space, Weighed

Objective = Literal["context", "speed", "memory"]
MANY = 1000  # configurations from which on it is quicker to look at fewer lengths more often
COARSEST, FINEST = 64, 64  # tokens: the least sequence that is looked at, and the step of the longest


def space_of(
    situation: Situation, required: Sequence[str] = (), excluded: Sequence[str] = (), knobs: PinnedKnobs | None = None
) -> Space:
    """Everything there is to choose from; cards of one kind have the same (``Situation``).

    Raises:
        PlanError: no valid set holds what is required and lacks what is excluded.
    """
    found = branches(situation, required, excluded, knobs or {})
    if not found:
        asked = " ".join([*(f"--with {name}" for name in required), *(f"--without {name}" for name in excluded)])
        why = _why_no_set(situation, required, excluded)
        raise PlanError(asked or "a plan", why, "`plan optimizations` says what each needs.")
    space = Space(found, situation, knobs)
    raise_all(_never_used(knobs or {}, space.names, situation))
    return space


def _cost(ids: Iterable[str], time: float, memory: float, objective: Objective) -> tuple[float, ...]:
    """What to choose by among configurations that fit, smallest first.

    Time first (three digits of it), then how many optimisations change the result, then memory; for the objective
    ``memory`` memory comes before all.
    """
    known = all_optimizations()
    rounding, seconds = sum(not known[name].exact for name in ids), float(f"{time:.3g}")
    return (memory, seconds, rounding) if objective == "memory" else (seconds, rounding, memory)


def longest(
    space: Space,
    situation: Situation,
    limits: Limits,
    constants: Calibration,
    *,
    rank: int,
    target: int | None,
    batch: int = 1,
    least: int = COARSEST,
    among: Iterable[int] | None = None,
) -> int | None:
    """The longest sequence any configuration of the space can train; None where not even ``least`` tokens fit.

    Memory and time grow with the sequence, so the answer is bracketed on a grid that is refined around it.

    Args:
        target: trained tokens, or None where every token is trained.
        among: the branches to look at; all, unless they are given.
    """
    low, high = max(least, COARSEST), 2**24
    remaining = tuple(range(len(space.branches)) if among is None else among)
    best: int | None = None
    while True:
        grid = grid_between(low, high, 65 if space.size <= MANY else 9)
        targets = grid if target is None else np.minimum(grid, target)
        at = Candidates(grid, targets, np.full_like(grid, rank), batch)
        weighed = weigh(space, at, situation, limits, constants, among=remaining)
        together = weighed.fits.any(axis=0)
        if not together.any():
            return best
        last = int(np.flatnonzero(together)[-1])
        best = int(grid[last])
        if last == len(grid) - 1 or grid[last + 1] - grid[last] <= FINEST:
            return best
        # What does not fit here does not fit further on.
        remaining = weighed.branches(last)
        low, high = best, int(grid[last + 1])


def grid_between(low: int, high: int, count: int = 65) -> Array:
    """At most so many lengths from one to the other, in steps of ``FINEST`` or of equal shares."""
    steps = np.geomspace(low, high, count).astype(np.int64) // FINEST * FINEST
    return np.array(sorted({int(total) for total in steps if total >= COARSEST} | {low}))


def weigh(
    space: Space,
    candidates: Candidates,
    situation: Situation,
    limits: Limits,
    constants: Calibration,
    *,
    wish: tuple[str, bool] | None = None,
    among: tuple[int, ...] | None = None,
    every: bool = False,
) -> Weighed:
    """The space at some candidates on the situation's card (see ``Space.at``)."""
    gpu = situation.gpu
    workspace = constants.workspace_bytes(gpu.compute_capability if gpu.kind == "gpu" else None)
    return space.at(candidates, workspace, wish=wish, among=among, every=every).on(gpu, constants, limits)


@dataclass(frozen=True)
class Wanted:
    """One length that a plan is wanted for; ``tier`` is None where it is no tier."""

    tier: int | None
    total: int
    target: int
    rank: int


@dataclass(frozen=True)
class Part:
    """Some of the configurations that were weighed."""

    weighed: Weighed
    rows: Array

    def least_high(self, index: int) -> int:
        """The least of their bounds on the card, at a wanted length."""
        return int(self.weighed.high[self.rows, index].min())

    def least_host(self, index: int) -> int:
        """The least that any of them takes of the host, at a wanted length."""
        return int(self.weighed.host[self.rows, index].min())

    def reached(self, below: int) -> int | None:
        """The last wanted length below one at which any of them fits."""
        fitting = np.flatnonzero(self.weighed.fits[self.rows, :below].any(axis=0))
        return int(fitting[-1]) if len(fitting) else None


@dataclass(frozen=True)
class Search:
    """What a search found: the one chosen, and of every other why it was not.

    ``best`` at ``index`` fits, unless nothing fits at any wanted length; then it is what comes nearest there.
    """

    wanted: tuple[Wanted, ...]
    candidates: Candidates
    space: Space
    weighed: Weighed
    best: Outcome
    index: int
    situation: Situation
    constants: Calibration
    limits: Limits
    objective: Objective
    _among: dict[tuple[str, bool], Part] = field(default_factory=dict, repr=False)

    @cached_property
    def outcomes(self) -> tuple[Outcome, ...]:
        """Every valid set with every value of its knobs, at each wanted length."""
        return tuple(self._weigh(every=True).outcomes())

    @cached_property
    def leading(self) -> tuple[Outcome, ...]:
        """The same without those that another beats in every respect, at all wanted lengths."""
        return tuple(self.weighed.outcomes())

    def best_at(self, index: int) -> Outcome:
        """What would be chosen at one wanted length: the best that fits, or what comes nearest."""
        return self.weighed.outcome(_chosen(self.weighed, index, self.objective, self.limits))

    @cached_property
    def longest_with_target(self) -> int | None:
        """The longest sequence with as many trained tokens as wanted."""
        return self._longest(self.wanted[self.index].target)

    @cached_property
    def longest_all_trained(self) -> int | None:
        """The longest sequence with every token trained."""
        return self._longest(None)

    def _longest(self, target: int | None) -> int | None:
        want, fitting = self.wanted[self.index], self.weighed.branches(self.index)
        rest = (self.space, self.situation, self.limits, self.constants)
        batch = self.candidates.batch
        # What fits a longer sequence fits this one too; only where that finds nothing are all sets looked at.
        found = None
        if fitting:
            found = longest(*rest, rank=want.rank, target=target, batch=batch, least=want.total, among=fitting)
        return found or longest(*rest, rank=want.rank, target=target, batch=batch)

    def _weigh(self, wish: tuple[str, bool] | None = None, every: bool = False) -> Weighed:
        return weigh(self.space, self.candidates, self.situation, self.limits, self.constants, wish=wish, every=every)

    def among(self, name: str, on: bool) -> Part:
        """The sets with an optimisation, or those without, that no other of them beats in every respect."""
        if (name, on) not in self._among:
            # Of sets of hubs none is left out, so they are among the leading ones; leaves may be missing there.
            weighed = self._weigh((name, on)) if self.space.is_leaf(name) else self.weighed
            self._among[name, on] = Part(weighed, weighed.having(name, on))
        return self._among[name, on]

    def best_among(self, objective: Objective, name: str, on: bool) -> Outcome | None:
        """The best with an optimisation, or without, that fits the wanted length; None where there is none."""
        part = self.among(name, on)
        fitting = part.rows[part.weighed.fits[part.rows, self.index]]
        return part.weighed.outcome(_cheapest(part.weighed, fitting, self.index, objective)) if len(fitting) else None

    def phases(self, devices: Sequence[Device]) -> dict[Phase, dict[str, int]]:
        """Bytes of the chosen configuration: each term alive in each phase on the devices, none that is empty."""
        want = self.wanted[self.index]
        total, target, rank = (np.array([size]) for size in (want.total, want.target, want.rank))
        one = Candidates(total, target, rank, self.candidates.batch)
        letters = Evaluator(one, self.situation, self.constants, self.limits).letters(self.best.configuration)
        by_phase = self.best.configuration.ledger.by_phase(letters, devices)
        return {
            phase: {name: int(np.ravel(size)[0]) for name, size in terms.items() if np.any(size)}
            for phase, terms in by_phase.items()
        }

    def without(self, name: str) -> Outcome | None:
        """The chosen configuration with one optimisation taken out; None where that is no valid set."""
        ids = [other for other in self.best.ids if other != name]
        if not ids or problems(ids, self.situation):
            return None
        configuration = compose(ids, self.best.configuration.knobs, self.situation)
        return Evaluator(self.candidates, self.situation, self.constants, self.limits)(configuration)


def search(
    situation: Situation,
    limits: Limits,
    constants: Calibration,
    wanted: Sequence[Wanted],
    *,
    objective: Objective,
    required: Sequence[str] = (),
    excluded: Sequence[str] = (),
    knobs: Mapping[str, Mapping[str, Scalar]] | None = None,
    batch: int = 1,
    space: Space | None = None,
) -> Search:
    """Search every valid set at every wanted length; the last length that fits wins.

    Args:
        space: what there is to choose from, where that is known already.

    Raises:
        PlanError: no valid set holds what is required and lacks what is excluded.
    """
    candidates = Candidates(
        np.array([want.total for want in wanted]),
        np.array([want.target for want in wanted]),
        np.array([want.rank for want in wanted]),
        batch,
    )
    if space is None:
        space = space_of(situation, required, excluded, knobs)
    weighed = weigh(space, candidates, situation, limits, constants)
    fitting = np.flatnonzero(weighed.fits.any(axis=0))
    index = int(fitting[-1]) if len(fitting) else 0
    best = weighed.outcome(_chosen(weighed, index, objective, limits))
    return Search(tuple(wanted), candidates, space, weighed, best, index, situation, constants, limits, objective)


def _chosen(weighed: Weighed, index: int, objective: Objective, limits: Limits) -> int:
    """The best of what fits, or where nothing does what comes nearest."""
    return _best(weighed, index, objective) if weighed.fits[:, index].any() else _nearest(weighed, limits, index)


def _best(weighed: Weighed, index: int, objective: Objective) -> int:
    """The cheapest that fits, with the knobs it names first as long as they fit: knobs are ordered best first."""
    rows = np.flatnonzero(weighed.fits[:, index])
    best = _cheapest(weighed, rows, index, objective)
    if objective == "memory":
        return best
    made = weighed.evaluated.made
    branch, _, options = made[best]
    return next(row for row in map(int, rows) if made[row][0] == branch and made[row][2] == options)


def _cheapest(weighed: Weighed, rows: Array, index: int, objective: Objective) -> int:
    """The first of those that cost least."""
    time, memory = weighed.rank[rows, index], weighed.high[rows, index]
    # Times that are alike in three digits differ by less than one in a hundred.
    near = memory == memory.min() if objective == "memory" else time <= 1.011 * time.min()
    return min(
        map(int, rows[near]),
        key=lambda row: _cost(
            weighed.ids(row), float(weighed.rank[row, index]), float(weighed.high[row, index]), objective
        ),
    )


def _nearest(weighed: Weighed, limits: Limits, index: int) -> int:
    """What misses the limits by least, as the largest share of any of them."""
    shares = [weighed.high[:, index] / max(1, limits.gpu_bytes), weighed.host[:, index] / max(1, limits.host_bytes)]
    time = weighed.estimate[:, index] / limits.step_seconds
    return int(np.argmin(np.maximum.reduce([*shares, np.where(np.isnan(time), 0, time)])))


def _why_no_set(situation: Situation, required: Sequence[str], excluded: Sequence[str]) -> str:
    """Why nothing is left to choose from: nothing trains, or what is required lacks something."""
    known = all_optimizations()
    trainers = [name for name, each in known.items() if "adapters/weights" in each.makes]
    able = [name for name in trainers if name not in excluded]
    if not able:
        return f"nothing would be trained: {' or '.join(trainers)} makes the adapters."
    if unable := [reason for name in able for reason in known[name].reasons(situation)]:
        return f"nothing can be trained: {'; '.join(unable)}."
    lacking = problems({*required, able[0]}, situation)
    told = [f"{name}: {reason}" for name, reasons in lacking.items() for reason in reasons]
    if told:
        return f"no valid set of optimisations is left. {'; '.join(told)}."
    return "no valid set of optimisations is left that has the knobs as they were set."


def _never_used(
    knobs: Mapping[str, Mapping[str, Scalar]], used: frozenset[str], situation: Situation
) -> list[PlanError]:
    """Knobs set of an optimisation that no set holds with them; none of one that cannot be used here at all."""
    known = all_optimizations()
    lost = [(owner, values) for owner, values in knobs.items() if owner not in used]
    return [
        PlanError(
            " ".join(f"--set {owner}.{name}={value}" for name, value in values.items()),
            f"no set of optimisations that is left has {owner} with it.",
            f"It is off unless --with {owner} asks for it."
            if known[owner].asked
            else f"`plan explain {owner}` says what it needs.",
        )
        for owner, values in lost
        if not known[owner].reasons(situation)
    ]
