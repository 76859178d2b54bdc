"""A space on one card: what its combinations come to, at any lengths, with an optimisation or without."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property

import numpy as np

from planner.bounds import Bounded, Field, Product, Sum, may_fit
from planner.calibration import Calibration
from planner.evaluate import Array, Candidates, Limits
from planner.hardware import HardwareProfile
from planner.rates import KINDS
from planner.rows import Values
from planner.space import Space
from planner.timecost import rates_for
from planner.weighing import KNOB_ORDER, ORDER, Clock, Key, Scale, share

Wish = tuple[str, bool]  # a name, and whether it is to be on
RESPECTS = ("high", "host", "seconds", "inexact")


class SpaceOnCard:
    """A space on one card: which products there are, and what they come to at any candidates."""

    def __init__(self, space: Space, gpu: HardwareProfile, constants: Calibration, accumulation: int) -> None:
        self.space, self.scale = space, Scale(gpu, constants, accumulation)
        self._workspace = constants.workspace_bytes(gpu.compute_capability if gpu.kind == "gpu" else None)
        self._sums: dict[tuple[object, ...], Values] = {}
        self._levels: dict[tuple[object, ...], Level] = {}
        self._clocks: dict[bytes, Clock] = {}
        self.products = tuple(each for number in range(len(space.branches)) for each in self._products(number))

    def _products(self, number: int) -> Iterator[Product]:
        """The products of a branch, each with one clock.

        Whoever adds work whose rate is unknown makes the time of the whole unknown. Such combinations are ranked by
        nominal rates, so they are products of their own: those that have their first such place in one group or in
        another.
        """
        table, trunk, card = self.space.table, self.space.branches[number].trunk, (self.scale.gpu, self.scale.constants)
        rates = rates_for(trunk, *card).likely
        unknown = np.array([rates[kind] is None for kind in KINDS])
        groups = [np.array([p for places in group for p in places.range]) for group in table.groups[number]]
        blurred = [(table.kinds[group] & unknown).any(axis=1) for group in groups]
        clear = [group[~unclear] for group, unclear in zip(groups, blurred, strict=True)]
        if len(clear[0]):
            known = Clock.of(trunk, *card, known=True)
            yield Product(number, known, clear, self._rows(known))
        for place, unclear in enumerate(blurred):
            if unclear.any() and (len(clear[0]) or not place):
                nominal = Clock.of(trunk, *card, known=False)
                mine = [*clear[:place], groups[place][unclear], *groups[place + 1 :]]
                yield Product(number, nominal, mine, self._rows(nominal))

    def _rows(self, clock: Clock) -> Array:
        """The row of each place in the sums: one for each pattern and each way to tell seconds."""
        key, table = clock.seconds.tobytes(), self.space.table
        self._clocks.setdefault(key, clock)
        return np.asarray(list(self._clocks).index(key) * table.patterns + table.pattern)

    def sums(self, candidates: Candidates) -> Values:
        """The columns of every row (``planner.weighing``): row × column × candidate."""
        if candidates.key not in self._sums:
            added, inexact = self.space.at(candidates, self._workspace), self.space.table.inexact
            self._sums[candidates.key] = np.concatenate(
                [clock.columns(added, inexact) for clock in self._clocks.values()]
            )
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
        return next((int(i) for i in hopeful[::-1] if self.at(candidates, int(i)).fits(limits, wish)), None)

    def meeting(self, of: Product, wish: Wish | None) -> Product | None:
        """A product with those of its combinations that hold a name, or lack it; None where there are none."""
        number, places = self.restricted(of, wish)
        if number is None:
            return of if len(places) else None
        return of.with_places(number, places) if len(places) else None

    def restricted(self, of: Product, wish: Wish | None) -> tuple[int | None, Array]:
        """The group of a product that a wish is decided by, and its places that meet it.

        Where no group decides, they are those of the trunk, or none.
        """
        trunk = of.groups[0]
        if wish is None:
            return None, trunk
        name, on = wish
        if name in self.space.branches[of.branch].ids:
            return None, trunk if on else trunk[:0]
        for number, group in enumerate(self.space.table.groups[of.branch]):
            if held := {place for places in group if name in places.option.ids for place in places.range}:
                meets = np.array([(int(place) in held) is on for place in of.groups[number]], dtype=bool)
                return number, of.groups[number][meets]
        return None, trunk[:0] if on else trunk


class Level:
    """A space on one card at one candidate. ``sums``: row × column."""

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
            field.of.with_groups([field.of.places[kept] for kept in field.unbeaten(RESPECTS)]) for field in self.fields
        )

    def fits(self, limits: Limits, wish: Wish | None) -> bool:
        """Whether anything fits."""
        among = Bounded(self.fields) if wish is None else self.having(wish)
        return among.cheapest(limits, (share(limits),), first=True) is not None

    def having(self, wish: Wish | None) -> Bounded:
        """The sets with an optimisation, or those without; all of them where nothing is wished."""
        if wish not in self._found:
            products = (
                shrunk if number is None else shrunk.with_places(number, places)
                for field, shrunk in zip(self.fields, self._shrunk, strict=True)
                for number, places in [self.on_card.restricted(field.of, wish)]
                if len(places)
            )
            self._found[wish] = Bounded(Field(each, self.sums, self.on_card.scale) for each in products)
        return self._found[wish]

    def with_first_knobs(self, limits: Limits, key: Key, found: Sum) -> tuple[int, ...]:
        """The same set with the knobs it names first, of those that fit and cost no more by a key."""
        order = knob_order(self.on_card.space, found.places)
        if len(order) == len(found.places):
            return found.places
        of = next(each for each in self.on_card.products if {*found.places} <= {*map(int, each.places)})
        places = [np.array([place for place in group if int(place) in order]) for group in of.groups]
        # Rows of their own, since options of several branches may share theirs.
        rows, own = np.zeros_like(of.rows), np.concatenate(places)
        rows[own] = np.arange(len(own))
        sums = self.sums[of.rows[own]]
        sums[:, ORDER] = [order[int(place)] for place in own]
        field = Field(Product(of.branch, of.clock, places, rows), sums, self.on_card.scale)
        best = Bounded([field]).cheapest(limits, (*key, KNOB_ORDER))
        assert best is not None
        return best.places


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
