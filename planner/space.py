"""Everything there is to choose from, evaluated together: bytes once for all cards of a kind, limits afterwards."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from planner.branches import Branch, Option
from planner.calibration import Calibration
from planner.compose import Configuration, compose
from planner.evaluate import Array, Candidates, Limits, Outcome
from planner.folds import KINDS, PHASES, Bare, Fold, Table, Wish, work_of
from planner.hardware import HardwareProfile
from planner.ledger import Ledger
from planner.optimizations.base import Situation
from planner.rows import Rows, Values
from planner.sets import PinnedKnobs
from planner.timecost import StepTime, step_time


@dataclass(frozen=True)
class Timed:
    """Work of combinations that keep the same lanes busy."""

    like: Configuration
    amounts: Mapping[str, Values]  # combination × value × candidate
    rows: Array


@dataclass(frozen=True)
class Evaluated:
    """Bytes and work at some candidates, whatever the limits; arrays are configuration × candidate.

    ``made`` says of each configuration its branch, which of the trunk's values, and the options on it.
    """

    space: Space
    made: tuple[tuple[int, int, tuple[Option, ...]], ...]
    expected: Array
    low: Array
    pinned: Array
    host: Array
    timed: tuple[Timed, ...]

    def on(self, gpu: HardwareProfile, constants: Calibration, limits: Limits) -> Weighed:
        """The same on one card, within its limits."""
        high = self.expected + constants.reserve_bytes(self.expected, gpu.kind)
        # With the CPU alone there is one memory: what the card would hold lies in the host too.
        host = self.host + constants.host_process_bytes(gpu.kind) + (high if gpu.kind == "cpu" else 0)
        bound, estimate, rank = (np.full(high.shape, np.nan) for _ in range(3))
        for part in self.timed:
            time = step_time(part.like, part.amounts, gpu, constants).times(limits.accumulation)
            if time.bound is not None:
                bound[part.rows] = time.bound
            if time.estimate is not None:
                estimate[part.rows] = time.estimate
            rank[part.rows] = time.rank
        fits = (high <= limits.gpu_bytes) & (host <= limits.host_bytes) & ~(estimate > limits.step_seconds)
        return Weighed(self, high, host, bound, estimate, rank, fits)


@dataclass(frozen=True)
class Weighed:
    """Configurations on one card; arrays are configuration × candidate, NaN where a time is unknown."""

    evaluated: Evaluated
    high: Array
    host: Array
    bound: Any
    estimate: Any
    rank: Any
    fits: Any

    def ids(self, row: int) -> tuple[str, ...]:
        """The optimisations of one configuration."""
        branch, _, options = self.evaluated.made[row]
        hubs = self.evaluated.space.branches[branch].ids
        return tuple(sorted((*hubs, *(name for option in options for name in option.ids))))

    def having(self, name: str, on: bool) -> Array:
        """The rows of the sets with an optimisation, or of those without."""
        hubs = [name in branch.ids for branch in self.evaluated.space.branches]
        made = enumerate(self.evaluated.made)
        return np.array(
            [
                row
                for row, (branch, _, options) in made
                if (hubs[branch] or any(name in option.ids for option in options)) is on
            ],
            dtype=np.int64,
        )

    def branches(self, index: int) -> tuple[int, ...]:
        """The branches that have a configuration which fits at a candidate."""
        return tuple(sorted({self.evaluated.made[row][0] for row in np.flatnonzero(self.fits[:, index])}))

    def outcome(self, row: int) -> Outcome:
        """One configuration at all candidates."""
        at, space = self.evaluated, self.evaluated.space
        bound, estimate = (None if np.isnan(time).any() else time for time in (self.bound[row], self.estimate[row]))
        time = StepTime(bound, estimate, self.rank[row])
        peaks = (at.low[row], at.expected[row], self.high[row], self.host[row], at.pinned[row])
        return Outcome(self.ids(row), lambda: space.configuration(*at.made[row]), *peaks, time, self.fits[row])

    def outcomes(self) -> Iterator[Outcome]:
        """Each configuration at all candidates."""
        return map(self.outcome, range(len(self.high)))


class Space:
    """The branches of one question, with every formula evaluated once at each set of candidates."""

    def __init__(self, branches: Sequence[Branch], situation: Situation, knobs: PinnedKnobs | None = None) -> None:
        self.branches, self.situation, self.knobs = tuple(branches), situation, knobs or {}
        options = (option for branch in self.branches for group in branch.groups for option in group)
        self._leaves = frozenset(name for option in options for name in option.ids)
        self.rows = Rows(situation.model)
        self._found: dict[tuple[object, ...], Evaluated] = {}
        self._bare: dict[tuple[object, ...], list[Bare | None]] = {}
        self._tables = [Table(branch, self.rows) for branch in self.branches]

    @classmethod
    def of(cls, configurations: Iterable[Configuration], situation: Situation) -> Space:
        """A space of these configurations, each a branch of its own."""
        return cls([Branch((configuration,), ()) for configuration in configurations], situation)

    @property
    def names(self) -> frozenset[str]:
        """Every optimisation that is in any set."""
        return self._leaves.union(name for branch in self.branches for name in branch.ids)

    @property
    def size(self) -> int:
        """How many configurations there are."""
        return sum(len(branch.trunk) * prod(map(len, branch.groups)) for branch in self.branches)

    def is_leaf(self, name: str) -> bool:
        """Whether an optimisation is chosen in a group of a branch, and not by the branch itself."""
        return name in self._leaves

    def configuration(self, branch: int, value: int, options: Iterable[Option]) -> Configuration:
        """One of the trunk's configurations with options on it."""
        trunk = self.branches[branch].trunk[value]
        ids = (*trunk.ids, *(name for option in options for name in option.ids))
        return compose(ids, self.knobs, self.situation, onto=trunk)

    def at(
        self,
        candidates: Candidates,
        workspace: int,
        *,
        wish: Wish | None = None,
        among: tuple[int, ...] | None = None,
        every: bool = False,
    ) -> Evaluated:
        """Evaluate the space.

        Args:
            workspace: bytes of the cuBLAS workspace on this kind of card.
            wish: only sets with a name, or only those without it.
            among: only these branches.
            every: all sets; else only options that no other beats at all candidates in bytes, work and exactness.
        """
        key = (candidates.key, workspace, wish, among, every)
        if key not in self._found:
            numbers = range(len(self.branches)) if among is None else among
            self._found[key] = self._evaluated(self._bares(candidates, workspace, numbers), wish, every)
        return self._found[key]

    def _bares(self, candidates: Candidates, workspace: int, numbers: Iterable[int]) -> list[tuple[int, Bare]]:
        """The branches at the candidates, each made when it is first asked for."""
        kept = self._bare.setdefault((candidates.key, workspace), [None] * len(self.branches))
        found = []
        for number in numbers:
            bare = kept[number]
            if bare is None:
                bare = kept[number] = self._tables[number].at(self.rows.at(candidates, workspace))
            found.append((number, bare))
        return found

    def _evaluated(self, bares: Sequence[tuple[int, Bare]], wish: Wish | None, every: bool) -> Evaluated:
        made: list[tuple[int, int, tuple[Option, ...]]] = []
        timed: list[Timed] = []
        width = bares[0][1].sizes.shape[-1]
        sizes = [np.zeros((0, KINDS, width))]
        for number, bare in bares:
            fold, many = bare.fold(wish, every), len(bare.branch.trunk)
            if fold is None:
                continue
            together = bare.sizes[None] + fold.sizes[:, None]
            sizes.append(together.reshape(-1, KINDS, PHASES, width).max(axis=2))
            timed += _timed(bare, fold, len(made))
            made += [(number, value, options) for options in fold.chosen for value in range(many)]
        peak, exact, pinned, host = np.concatenate(sizes).astype(np.int64).transpose(1, 0, 2)
        return Evaluated(self, tuple(made), peak, exact, pinned, host, tuple(timed))


def _timed(bare: Bare, fold: Fold, start: int) -> Iterator[Timed]:
    first, many = bare.branch.trunk[0], len(bare.branch.trunk)
    alike: dict[tuple[int, ...], list[int]] = {}
    for place, busy in enumerate(bare.busy | (fold.adds > 0)):
        alike.setdefault(tuple(np.flatnonzero(busy).tolist()), []).append(place)
    for lanes, places in alike.items():
        work = {lane: work_of(lane) for lane in lanes}
        ledger = Ledger({}, {piece.name: piece for piece in work.values()})
        like = Configuration(first.ids, first.knobs, ledger, first.letters, first.settings, first.model)
        amounts = {work[lane].name: bare.work[None, :, lane] + fold.work[places, None, lane] for lane in lanes}
        yield Timed(like, amounts, np.array(places)[:, None] * many + np.arange(many) + start)
