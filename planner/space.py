"""Everything there is to choose from, evaluated together: bytes once for all cards of a kind, limits afterwards."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from planner.branches import Branch, Option
from planner.calibration import Calibration
from planner.compose import Configuration, compose
from planner.evaluate import Array, Candidates, Limits, Outcome, masks
from planner.fronts import nondominated
from planner.hardware import HardwareProfile
from planner.ledger import Ledger, Phase, Resource, Term
from planner.optimizations import all_optimizations
from planner.optimizations.base import Situation
from planner.rows import Rows, Values
from planner.sets import PinnedKnobs
from planner.timecost import StepTime, step_time

PHASES, KINDS = len(Phase), 4  # kinds: on the card, exactly known there, pinned, in the host
LIMITED = [*range(PHASES), *range(3 * PHASES, 4 * PHASES)]  # rows of a kind and phase that a limit looks at
Wish = tuple[str, bool]  # a name, and whether it is to be on


@dataclass(frozen=True)
class Trunk:
    """Rows of a branch's trunk: of its terms and of its work, for each value of its knobs."""

    sizes: Array  # value × term
    mask: Values  # (kind, phase) × term
    work: Mapping[str, Array]


@dataclass(frozen=True)
class Leaf:
    """Rows of an option: of the terms that come and go, and of the work that changes, after and before."""

    option: Option
    rows: Array
    mask: Values  # (kind, phase) × term, negative for what goes
    work: Mapping[str, tuple[int, int | None]]
    inexact: int
    resources: Array  # of each resource, how many pieces of work it adds


@dataclass(frozen=True)
class Timed:
    """Work of combinations that are alike in which pieces of work there are."""

    like: Configuration
    amounts: Mapping[str, Any]  # combination × value × candidate
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
            if time.estimate is not None:
                bound[part.rows], estimate[part.rows] = time.bound, time.estimate
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

    def branches(self, index: int) -> tuple[int, ...]:
        """The branches that have a configuration which fits at a candidate."""
        return tuple(sorted({self.evaluated.made[row][0] for row in np.flatnonzero(self.fits[:, index])}))

    def outcome(self, row: int) -> Outcome:
        """One configuration at all candidates."""
        at, space = self.evaluated, self.evaluated.space
        bound, estimate = self.bound[row], self.estimate[row]
        known = not np.isnan(estimate).any()
        time = StepTime(bound, estimate, self.rank[row]) if known else StepTime(None, None, self.rank[row])
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
        self.rows = Rows()
        self._found: dict[tuple[object, ...], Evaluated] = {}
        self._trunks = [self._trunk(branch) for branch in self.branches]
        self._groups = [
            [[self._leaf(option, branch.trunk[0]) for option in group] for group in branch.groups]
            for branch in self.branches
        ]

    @classmethod
    def of(cls, configurations: Iterable[Configuration], situation: Situation) -> Space:
        """A space of these configurations, each a branch of its own."""
        return cls([Branch((configuration,), ()) for configuration in configurations], situation)

    @property
    def names(self) -> frozenset[str]:
        """Every optimisation that is in any set."""
        return self._leaves.union(name for branch in self.branches for name in branch.ids)

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
            self._found[key] = self._evaluated(self.rows.at(candidates, workspace), wish, among, every)
        return self._found[key]

    def _evaluated(self, values: Values, wish: Wish | None, among: tuple[int, ...] | None, every: bool) -> Evaluated:
        made: list[tuple[int, int, tuple[Option, ...]]] = []
        timed: list[Timed] = []
        width = values.shape[1]
        sizes = [np.zeros((0, KINDS, width))]
        for number in range(len(self.branches)) if among is None else among:
            trunk, many = self._trunks[number], len(self.branches[number].trunk)
            folded = self._folded(number, values, wish, every)
            if not folded:
                continue
            more = np.array([size for _, size in folded])
            together = (trunk.mask @ values[trunk.sizes])[None] + more[:, None]
            sizes.append(together.reshape(-1, KINDS, PHASES, width).max(axis=2))
            timed += self._timed(number, [leaves for leaves, _ in folded], values, len(made))
            made += [
                (number, value, tuple(leaf.option for leaf in each)) for each, _ in folded for value in range(many)
            ]
        peak, exact, pinned, host = np.concatenate(sizes).astype(np.int64).transpose(1, 0, 2)
        return Evaluated(self, tuple(made), peak, exact, pinned, host, tuple(timed))

    def _folded(
        self, number: int, values: Values, wish: Wish | None, every: bool
    ) -> list[tuple[tuple[Leaf, ...], Array]]:
        """Combinations of one option from each group, with the bytes they add; empty where the wish is not met."""
        groups = self._groups[number]
        if wish is not None:
            name, on = wish
            mine = [any(name in leaf.option.ids for leaf in group) for group in groups]
            if not any(mine) and (name in self.branches[number].ids) is not on:
                return []
            groups = [
                [leaf for leaf in group if (name in leaf.option.ids) is on] if here else group
                for group, here in zip(groups, mine, strict=True)
            ]
        names = sorted({name for group in groups for leaf in group for name in leaf.work})
        width = values.shape[1]
        chosen: list[tuple[Leaf, ...]] = [()]
        sizes = np.zeros((1, KINDS * PHASES, width))
        points = np.zeros((1, (len(LIMITED) + len(names)) * width + 1 + 2 * len(Resource)))
        for group in groups:
            more = np.array([leaf.mask @ values[leaf.rows] for leaf in group])
            here = np.array([_point(leaf, size, names, values) for leaf, size in zip(group, more, strict=True)])
            best = np.arange(len(group)) if every else nondominated(here)
            chosen = [(*before, group[place]) for before in chosen for place in best]
            sizes = (sizes[:, None] + more[best][None]).reshape(-1, KINDS * PHASES, width)
            points = (points[:, None] + here[best][None]).reshape(len(chosen), -1)
            if not every and 1 < len(best) < len(chosen):
                best = nondominated(points)
                chosen, sizes, points = [chosen[place] for place in best], sizes[best], points[best]
        order = sorted(range(len(chosen)), key=lambda place: sum(len(leaf.option.ids) for leaf in chosen[place]))
        return [(chosen[place], sizes[place]) for place in order]

    def _timed(self, number: int, folded: Sequence[tuple[Leaf, ...]], values: Values, start: int) -> Iterator[Timed]:
        first, work = self.branches[number].trunk[0], self._trunks[number].work
        many = len(self.branches[number].trunk)
        changes = [{name: leaf for leaf in leaves for name in leaf.work} for leaves in folded]
        alike: dict[tuple[object, ...], list[int]] = {}
        for place, changed in enumerate(changes):
            alike.setdefault(tuple(sorted(changed)), []).append(place)
        for places in alike.values():
            pieces = {name: leaf.option.work[name] for name, leaf in changes[places[0]].items()}
            like = Configuration(
                first.ids, first.knobs, Ledger({}, {**first.ledger.work, **pieces}), first.letters, first.settings
            )
            amounts: dict[str, Any] = {name: values[rows][None] for name, rows in work.items() if name not in pieces}
            for name in pieces:
                amounts[name] = values[[changes[place][name].work[name][0] for place in places]][:, None]
            rows = np.array(places)[:, None] * many + np.arange(many) + start
            shape = (*rows.shape, values.shape[1])  # of all alike: times are added up in place
            yield Timed(like, {name: np.broadcast_to(each, shape) for name, each in amounts.items()}, rows)

    def _trunk(self, branch: Branch) -> Trunk:
        sizes = [[self.rows.size(t, one.letters) for t in one.ledger.terms.values()] for one in branch.trunk]
        work = {
            name: np.array([self.rows.amount(piece.amount, one.letters) for one in branch.trunk])
            for name, piece in branch.trunk[0].ledger.work.items()
        }
        return Trunk(np.array(sizes), _mask(branch.trunk[0].ledger.terms.values()), work)

    def _leaf(self, option: Option, trunk: Configuration) -> Leaf:
        letters, before, known = trunk.letters, trunk.ledger.work, all_optimizations()
        rows = [self.rows.size(term, letters) for term in (*option.come, *option.gone)]
        work = {
            name: (
                self.rows.amount(piece.amount, letters),
                self.rows.amount(before[name].amount, letters) if name in before else None,
            )
            for name, piece in option.work.items()
        }
        added = [piece.resource for name, piece in option.work.items() if name not in before]
        return Leaf(
            option,
            np.array(rows, dtype=np.int64),
            np.hstack([_mask(option.come), -_mask(option.gone)]),
            work,
            sum(not known[name].exact for name in option.ids),
            np.array([added.count(resource) for resource in Resource]),
        )


def _mask(terms: Iterable[Term]) -> Values:
    found = tuple(terms)
    return np.vstack(masks(found)).astype(np.float64) if found else np.zeros((KINDS * PHASES, 0))


def _point(leaf: Leaf, size: Array, names: Sequence[str], values: Values) -> Values:
    """What an option is compared by: bytes under a limit, work, exactness; each is better smaller.

    A rate that is unknown makes the time unknown, so only options that keep the same things busy are compared.
    """
    nothing = np.zeros(values.shape[1])
    work = []
    for name in names:
        after, before = leaf.work.get(name, (None, None))
        work.append((nothing if after is None else values[after]) - (nothing if before is None else values[before]))
    busy = (leaf.resources, -leaf.resources)
    return np.concatenate([size[LIMITED].ravel(), *work, [leaf.inexact], *busy])
