"""A space on one card: what its combinations come to, at any lengths, with an optimisation or without."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from weakref import proxy

import numpy as np

from planner.bounds import Bounded, Field, Product, Stack, Sum
from planner.calibration import Calibration
from planner.evaluate import Array, Candidates, Limits
from planner.hardware import HardwareProfile
from planner.rates import KINDS
from planner.rows import Values
from planner.space import Space
from planner.timecost import rates_for
from planner.weighing import INEXACT, KNOB_ORDER, ORDER, WIDTH, Clock, Key, Scale, Weights, share

Wish = tuple[str, bool]  # a name, and whether it is to be on
RESPECTS = ("high", "host", "disk", "seconds", "inexact")
NOTHING = Weights(*(np.zeros((0, 1)) for _ in range(6)), known=np.zeros((0, 1), dtype=bool))  # type: ignore[misc]


class SpaceOnCard:
    """A space on one card: which products there are, and what they come to at any candidates."""

    def __init__(self, space: Space, gpu: HardwareProfile, constants: Calibration, accumulation: int) -> None:
        self.space, self.scale = space, Scale(gpu, constants, accumulation)
        self._workspace = constants.workspace_bytes(gpu.compute_capability if gpu.kind == "gpu" else None)
        self._sums: dict[tuple[object, ...], Values] = {}
        self._levels: dict[tuple[object, ...], Level] = {}
        self._clocks: dict[bytes, tuple[Clock, Array]] = {}  # each with the patterns that go by it
        self._stacks: dict[Wish | None, Stack | None] = {}
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
            yield Product(number, known, clear, self._rows(known, clear))
        for place, unclear in enumerate(blurred):
            if unclear.any() and (len(clear[0]) or not place):
                nominal = Clock.of(trunk, *card, known=False)
                mine = [*clear[:place], groups[place][unclear], *groups[place + 1 :]]
                yield Product(number, nominal, mine, self._rows(nominal, mine))

    def _rows(self, clock: Clock, groups: Sequence[Array]) -> Array:
        """The row of each place in the sums: one for each pattern and each way to tell seconds."""
        key, table = clock.seconds.tobytes(), self.space.table
        _, wanted = self._clocks.setdefault(key, (clock, np.zeros(table.patterns, dtype=bool)))
        wanted[table.pattern[np.concatenate(groups)]] = True
        return np.asarray(list(self._clocks).index(key) * table.patterns + table.pattern)

    def sums(self, candidates: Candidates) -> Values:
        """The columns of every row (``planner.weighing``): row × column × candidate."""
        if candidates.key not in self._sums:
            table, cells = self.space.table, self.space.at(candidates, self._workspace)
            sums = np.zeros((len(self._clocks), table.patterns, WIDTH, cells.shape[2]))
            for rows, (clock, wanted) in zip(sums, self._clocks.values(), strict=True):
                table.added.spread(clock.columns(cells), rows, wanted)
                rows[:, INEXACT] = table.inexact[:, None]
            self._sums[candidates.key] = sums.reshape(-1, *sums.shape[2:])
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
        may, does = self._may_and_does(candidates, limits, wish)
        hopeful = map(int, np.flatnonzero(may[:below])[::-1])
        return next((i for i in hopeful if does[i] or self.at(candidates, i).fits(limits, wish)), None)

    def last_of_growing(self, candidates: Candidates, limits: Limits) -> int | None:
        """The same where each candidate takes no less than the one before: what does not fit does not fit later."""
        may, does = self._may_and_does(candidates, limits, None)
        last, beyond = (int(np.flatnonzero(each)[-1]) if each.any() else -1 for each in (does, may))
        while last < beyond:  # it is none before the one and none after the other
            middle = (last + beyond + 1) // 2
            fits = does[middle] or self.at(candidates, middle).fits(limits, None)
            last, beyond = (middle, beyond) if fits else (last, middle - 1)
        return None if last < 0 else last

    def _may_and_does(self, candidates: Candidates, limits: Limits, wish: Wish | None) -> tuple[Any, Any]:
        stack = self.stack(wish)
        nothing = np.zeros(len(candidates.total), dtype=bool)
        if stack is None:
            return nothing, nothing
        return stack.may_and_does_fit(self.sums(candidates), self.scale, limits)

    def stack(self, wish: Wish | None) -> Stack | None:
        """The products with those of their combinations that hold a name, or lack it; None where there are none."""
        if wish not in self._stacks:
            products = [self.restricted(each, wish) for each in self.products]
            met = [each for each in products if each is not None]
            self._stacks[wish] = Stack(met) if met else None
        return self._stacks[wish]

    def restricted(self, of: Product, wish: Wish | None) -> Product | None:
        """A product with those of its combinations that hold a name, or lack it; None where there are none."""
        if wish is None:
            return of
        (name, on), branch = wish, of.branch
        if name in self.space.branches[branch].ids:
            return of if on else None
        number, holders = self.holders(branch, name)
        if number is None:
            return None if on else of
        places = of.groups[number]
        meeting = places[np.isin(places, holders) == on]
        return of.with_places(number, meeting) if len(meeting) else None

    def holders(self, branch: int, name: str) -> tuple[int | None, Array]:
        """The group of a branch that decides whether an optimisation is on, and the places at which it is."""
        for number, group in enumerate(self.space.table.groups[branch]):
            if held := [place for places in group if name in places.option.ids for place in places.range]:
                return number, np.array(held)
        return None, np.zeros(0, dtype=np.int64)


class Level:
    """A space on one card at one candidate. ``sums``: row × column.

    It holds its space weakly: what each holds of the other would else keep all sums until the collector comes by, and
    the matrix goes through thousands of them.
    """

    def __init__(self, on_card: SpaceOnCard, sums: Values) -> None:
        self.on_card, self.sums = proxy(on_card), sums
        self._found: dict[tuple[Wish | None, bool], Bounded] = {}
        self._kept: dict[int, list[Array]] = {}

    def _field(self, of: Product) -> Field:
        return Field(of, self.sums, self.on_card.scale)

    def _shrunk(self, of: Product, wish: Wish | None) -> Product:
        """A product without those places of a group that another of the group beats in all respects.

        What is left of a group is the same whatever is wished of another, so it is found once.
        """
        whole = next(each for each in self.on_card.products if each.branch == of.branch and each.rows is of.rows)
        if id(whole) not in self._kept:
            field = self._field(whole)
            self._kept[id(whole)] = [whole.places[kept] for kept in field.unbeaten(RESPECTS)]
        number = None if wish is None else self.on_card.holders(of.branch, wish[0])[0]
        return of.with_groups([of.groups[n] if n == number else kept for n, kept in enumerate(self._kept[id(whole)])])

    def fits(self, limits: Limits, wish: Wish | None) -> bool:
        """Whether anything fits."""
        return self.having(wish, whole=True).cheapest(limits, (share(limits),), first=True) is not None

    def having(self, wish: Wish | None, *, whole: bool = False) -> Bounded:
        """The sets with an optimisation, or those without; all of them where nothing is wished.

        Args:
            whole: with all places, where it is not worth while to look which are beaten.
        """
        if (wish, whole) not in self._found:
            stack, scale, level = self.on_card.stack(wish), self.on_card.scale, proxy(self)
            if stack is None:
                self._found[wish, whole] = Bounded(NOTHING, lambda number: level._field(level.on_card.products[number]))
            else:
                products = stack.products
                self._found[wish, whole] = Bounded(
                    stack.least(self.sums[:, :, None], scale),
                    lambda number: level._field(products[number] if whole else level._shrunk(products[number], wish)),
                )
        return self._found[wish, whole]

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
        stack = Stack([Product(of.branch, of.clock, places, rows)])
        scale = self.on_card.scale
        same = Bounded(stack.least(sums[:, :, None], scale), lambda _: Field(stack.products[0], sums, scale))
        best = same.cheapest(limits, (*key, KNOB_ORDER))
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
