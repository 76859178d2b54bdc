"""Everything there is to choose from, evaluated together: bytes once for all cards of a kind, limits afterwards."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np

from planner.bounds import Bounded, Field, Product, Sum, may_fit
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
from planner.weighing import KNOB_ORDER, ORDER, Clock, Key, Scale, share

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
        self._sums: dict[tuple[object, ...], Values] = {}
        self._levels: dict[tuple[object, ...], Level] = {}
        table = space.table
        # Places count once for times at the card's rates, and once more for times at nominal ones.
        self._clocks: list[tuple[Clock | None, Clock | None]] = []
        products: list[Product] = []
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
            products += _products(number, groups, blurred, clocks, table.many)
        self.products = tuple(products)

    def sums(self, candidates: Candidates) -> Values:
        """The columns of every place (``planner.weighing``): place × column × candidate."""
        if candidates.key in self._sums:
            return self._sums[candidates.key]
        table, added, parts = self.space.table, self.space.at(candidates, self._workspace), []
        for which in (0, 1):
            if not any(clocks[which] for clocks in self._clocks):
                continue
            for number, clocks in enumerate(self._clocks):
                span = slice(table.groups[number][0][0].first, _end(table, number))
                clock = clocks[which] or clocks[1 - which]  # a branch of one clock stands by it, first of all
                assert clock is not None
                parts.append(clock.columns(added[span], table.inexact[span]))
        self._sums[candidates.key] = np.concatenate(parts)
        return self._sums[candidates.key]

    def at(self, candidates: Candidates, index: int) -> Level:
        """All there is at one of some candidates."""
        key = (candidates.key, index)
        if key not in self._levels:
            self._levels[key] = Level(self, np.ascontiguousarray(self.sums(candidates)[:, :, index]))
        return self._levels[key]

    def last_fitting(
        self, candidates: Candidates, limits: Limits, *, wish: Wish | None = None, below: int | None = None
    ) -> int | None:
        """The last candidate at which anything fits, of those below one; None where there is none."""
        products = [met for each in self.products if (met := self.meeting(each, wish)) is not None]
        hopeful = np.flatnonzero(may_fit(products, self.sums(candidates), self.scale, limits)[:below])
        key = (share(limits),)
        return next(
            (
                int(i)
                for i in hopeful[::-1]
                if self.at(candidates, int(i)).having(wish).cheapest(limits, key, first=True)
            ),
            None,
        )

    def meeting(self, of: Product, wish: Wish | None) -> Product | None:
        """A product with those of its combinations that hold a name, or lack it; None where there are none."""
        if wish is None:
            return of
        number, places = self.restricted(of, wish)
        if number is None:
            return of if len(places) else None
        return of.with_groups([*of.groups[:number], places, *of.groups[number + 1 :]]) if len(places) else None

    def restricted(self, of: Product, wish: Wish) -> tuple[int | None, Array]:
        """The group of a product that a wish is decided by, and its places that meet it.

        Where no group decides, they are those of the trunk, or none.
        """
        name, on = wish
        trunk = of.groups[0]
        if name in self.space.branches[of.branch].ids:
            return None, trunk if on else trunk[:0]
        for number, group in enumerate(self.space.table.groups[of.branch]):
            if held := {place for places in group if name in places.option.ids for place in places.range}:
                meets = np.array([(int(place) in held) is on for place in of.groups[number]], dtype=bool)
                return number, of.groups[number][meets]
        return None, trunk[:0] if on else trunk


class Level:
    """A space on one card at one candidate. ``sums``: place × column."""

    def __init__(self, on_card: SpaceOnCard, sums: Values) -> None:
        self.on_card, self.sums = on_card, sums
        self._found: dict[Wish | None, Bounded] = {}

    @cached_property
    def fields(self) -> tuple[Field, ...]:
        """Every product with all its places."""
        return tuple(Field(each, self.sums, self.on_card.scale) for each in self.on_card.products)

    @cached_property
    def _shrunk(self) -> tuple[Product, ...]:
        """Every product without those places of a group that another of the group beats in all respects."""
        return tuple(
            field.of.with_groups([field.of.places[kept] - field.of.offset for kept in field.unbeaten(RESPECTS)])
            for field in self.fields
        )

    def having(self, wish: Wish | None) -> Bounded:
        """The sets with an optimisation, or those without; all of them where nothing is wished."""
        if wish not in self._found:
            products = self._shrunk if wish is None else tuple(self._meeting(wish))
            self._found[wish] = Bounded(products, self.sums, self.on_card.scale)
        return self._found[wish]

    def _meeting(self, wish: Wish) -> Iterator[Product]:
        for field, shrunk in zip(self.fields, self._shrunk, strict=True):
            number, places = self.on_card.restricted(field.of, wish)
            if number is None and len(places):
                yield shrunk
            elif number is not None and len(places):
                groups = [*shrunk.groups[:number], places, *shrunk.groups[number + 1 :]]
                yield shrunk.with_groups(groups)

    def with_first_knobs(self, limits: Limits, key: Key, found: Sum) -> tuple[int, ...]:
        """The same set with the knobs it names first, of those that fit and cost no more by a key."""
        order = knob_order(self.on_card.space, found.places)
        if len(order) == len(found.places):
            return found.places
        of = next(each for each in self.on_card.products if {*found.places} <= {*map(int, np.concatenate(each.groups))})
        groups = [np.array([place for place in group if int(place) in order]) for group in of.groups]
        sums = self.sums.copy()
        for place, position in order.items():
            sums[place + of.offset, ORDER] = position
        best = Bounded([of.with_groups(groups)], sums, self.on_card.scale).cheapest(limits, (*key, KNOB_ORDER))
        assert best is not None
        return best.places


RESPECTS = ("high", "host", "seconds", "inexact")


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
