"""Everything there is to choose from, evaluated together: bytes once for all cards of a kind, limits afterwards."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np

from planner.bounds import Bounded, Product, Sum
from planner.branches import Branch
from planner.calibration import Calibration
from planner.compose import Configuration, compose
from planner.evaluate import Array, Candidates, Limits
from planner.groups import Dial
from planner.hardware import HardwareProfile
from planner.optimizations.base import Scalar, Situation
from planner.rates import KINDS
from planner.rows import Values
from planner.sets import PinnedKnobs
from planner.table import Table
from planner.timecost import rates_for
from planner.weighing import COUNT, Clock, Key, Scale, count

Wish = tuple[str, bool]  # a name, and whether it is to be on


class Space:
    """The branches of one question, with every formula evaluated once at each set of candidates."""

    def __init__(self, branches: Sequence[Branch], situation: Situation, knobs: PinnedKnobs | None = None) -> None:
        self.branches, self.situation, self.knobs = tuple(branches), situation, knobs or {}
        self.table = Table(self.branches)
        self._kept: dict[tuple[object, ...], Values] = {}

    @classmethod
    def of(cls, configurations: Iterable[Configuration], situation: Situation) -> Space:
        """A space of these configurations, each a branch of its own."""
        return cls([Branch(configuration, (), ()) for configuration in configurations], situation)

    @cached_property
    def names(self) -> frozenset[str]:
        """Every optimisation that is in any set."""
        leaves = {name for places in self.table.options for name in places.option.ids}
        return frozenset(leaves.union(name for branch in self.branches for name in branch.ids))

    def is_leaf(self, name: str) -> bool:
        """Whether an optimisation is chosen in a group of a branch, and not by the branch itself."""
        return any(name in places.option.ids for places in self.table.options)

    def ids(self, branch: int, places: Iterable[int]) -> tuple[str, ...]:
        """The optimisations of a combination."""
        leaves = (name for place in places for name in self.table.option_at(place).option.ids)
        return tuple(sorted((*self.branches[branch].ids, *leaves)))

    def configuration(self, branch: int, places: Iterable[int]) -> Configuration:
        """A combination of a place from each group of a branch."""
        values = [(self.table.option_at(place), place) for place in places]
        dials: dict[Dial, int] = {d: value for option, place in values for d, value in option.values(place).items()}
        trunk = self.branches[branch].trunk
        ids = (*trunk.ids, *(name for option, _ in values for name in option.option.ids))
        whole = compose(ids, self.knobs, self.situation, onto=trunk)
        knobs: dict[str, dict[str, Scalar]] = {name: dict(chosen) for name, chosen in whole.knobs.items()}
        for dial, value in dials.items():
            knobs[dial.owner][dial.knob] = value
        # A knob with a letter does no more than give the letter its value.
        letters = {**whole.letters, **{dial.letter: value for dial, value in dials.items()}}
        return replace(whole, knobs=knobs, letters=letters)

    def configurations(self) -> Iterator[Configuration]:
        """Every one there is."""
        for number in range(len(self.branches)):
            for places in self.table.combinations(number):
                yield self.configuration(number, places)

    def at(self, candidates: Candidates, workspace: int) -> Values:
        """What each place adds to bytes and work (``Table.at``); kept, since cards of a kind share it.

        Args:
            workspace: bytes of the cuBLAS workspace on this kind of card.
        """
        key = (candidates.key, workspace)
        if key not in self._kept:
            self._kept[key] = self.table.at(candidates, workspace)
        return self._kept[key]


class SpaceOnCard:
    """A space on one card: which products there are, and what they come to at any candidates."""

    def __init__(self, space: Space, gpu: HardwareProfile, constants: Calibration, accumulation: int) -> None:
        self.space, self.scale = space, Scale(gpu, constants, accumulation)
        self._workspace = constants.workspace_bytes(gpu.compute_capability if gpu.kind == "gpu" else None)
        self._restricted: dict[Wish | None, tuple[Product, ...]] = {}
        self._sums: dict[tuple[object, ...], Values] = {}
        table = space.table
        # Places count once for times at the card's rates, and once more for times at nominal ones.
        self._clocks: list[tuple[Clock | None, Clock | None]] = []
        products = []
        for number, branch in enumerate(space.branches):
            rates = rates_for(branch.trunk, gpu, constants).likely
            unknown = np.array([rates[kind] is None for kind in KINDS])
            groups = [np.array([p for places in group for p in places.range]) for group in table.groups[number]]
            blurred = [(table.kinds[group] & unknown).any(axis=1) for group in groups]
            clocks = [
                Clock.of(branch.trunk, gpu, constants, known=known) if needed else None
                for known, needed in ((True, not blurred[0].any()), (False, any(each.any() for each in blurred)))
            ]
            self._clocks.append((clocks[0], clocks[1]))
            products += list(_products(number, groups, blurred, clocks, table.many))
        self._restricted[None] = tuple(products)

    def products(self, wish: Wish | None = None) -> tuple[Product, ...]:
        """The products that hold a name, or those that lack it."""
        if wish not in self._restricted:
            assert wish is not None
            found = (self._meeting(each, wish) for each in self._restricted[None])
            self._restricted[wish] = tuple(each for each in found if each is not None)
        return self._restricted[wish]

    def _meeting(self, of: Product, wish: Wish) -> Product | None:
        name, on = wish
        if name in self.space.branches[of.branch].ids:
            return of if on else None
        table = self.space.table
        for number, group in enumerate(table.groups[of.branch]):
            holders = [places.range for places in group if name in places.option.ids]
            if holders:
                held = {place for places in holders for place in places}
                meets = np.array([(int(place) in held) is on for place in of.groups[number]])
                return of.restricted(number, of.groups[number][meets])
        return None if on else of

    def sums(self, candidates: Candidates) -> Values:
        """The columns of every place (``planner.weighing``): place × column × candidate."""
        if candidates.key in self._sums:
            return self._sums[candidates.key]
        table, space = self.space.table, self.space
        added, parts = space.at(candidates, self._workspace), []
        for which in (0, 1):
            if not any(clocks[which] for clocks in self._clocks):
                continue
            for number, clocks in enumerate(self._clocks):
                span = slice(table.groups[number][0][0].first, _end(table, number))
                clock = clocks[which] or clocks[1 - which]  # a branch of one clock stands by it, first of all
                assert clock is not None
                parts.append(clock.columns(added[span], table.inexact[span], table.counts[span]))
        self._sums[candidates.key] = np.concatenate(parts)
        return self._sums[candidates.key]

    def at(self, candidates: Candidates, wish: Wish | None = None) -> Bounded:
        """The products at some candidates."""
        return Bounded(self.products(wish), self.sums(candidates), self.scale)

    def with_first_knobs(self, at: Bounded, index: int, limits: Limits, key: Key, found: Sum) -> tuple[int, ...]:
        """The same set with the knobs it names first, of those that fit and cost no more by a key."""
        order = knob_order(self.space, found.places)
        if len(order) == len(found.places):
            return found.places
        of = next(each for each in at.products if each.branch == found.branch and each.holds(found.places))
        groups = [np.array([place for place in group if int(place) in order]) for group in of.groups]
        # The count is the same for all of them, so the order stands in its place.
        sums = at.sums[:, :, index, None].copy()
        for place, position in order.items():
            sums[place + of.offset, COUNT] = position
        same = Bounded([Product(of.branch, of.clock, groups, of.offset)], sums, self.scale)
        best = same.cheapest(0, limits, (*key, count))
        assert best is not None
        return best.places


def _end(table: Table, branch: int) -> int:
    return table.groups[branch + 1][0][0].first if branch + 1 < len(table.groups) else table.many


def _products(
    branch: int, groups: Sequence[Array], blurred: Sequence[Any], clocks: Sequence[Clock | None], many: int
) -> Iterator[Product]:
    """The products of a branch, each with one clock.

    Whoever adds work whose rate is unknown makes the time of the whole unknown. Such combinations are ranked by nominal
    rates, so they are products of their own: those that have their first such place in one group or in another.
    """
    known, nominal = clocks
    if known is not None and nominal is None:
        yield Product(branch, known, groups)
        return
    assert nominal is not None
    if known is None:
        yield Product(branch, nominal, groups)
        return
    clear = [group[~unclear] for group, unclear in zip(groups, blurred, strict=True)]
    yield Product(branch, known, clear)
    for number, unclear in enumerate(blurred):
        if unclear.any():
            mine = [*clear[:number], groups[number][unclear], *groups[number + 1 :]]
            yield Product(branch, nominal, mine, offset=many)


def knob_order(space: Space, places: Sequence[int]) -> Mapping[int, float]:
    """Where each place of these places' options stands if their dials' values are gone through in order, best first.

    Positions of the groups add up to the position of the combination: the dials are the digits of a number.
    """
    options = [space.table.option_at(place) for place in places]
    dials = sorted((dial for each in options for dial in each.option.dials), key=lambda dial: dial.name)
    weight, step = {}, 1
    for dial in reversed(dials):
        weight[dial], step = step, step * len(dial.values)
    return {
        place: float(sum(weight[dial] * dial.values.index(value) for dial, value in each.values(place).items()))
        for each in options
        for place in each.range
    }
