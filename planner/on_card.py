"""A space on one card: what its combinations come to, at any lengths, with an optimisation or without."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from weakref import proxy

import numpy as np

from planner.bounds import Bounded, Stack
from planner.calibration import Calibration
from planner.evaluate import Array, Candidates, Limits
from planner.fields import Bounds, Field, Sum
from planner.hardware import HardwareProfile
from planner.products import Product
from planner.rates import KINDS
from planner.rows import Values
from planner.space import Rows, Space
from planner.timecost import rates_for
from planner.weighing import INEXACT, KNOB_ORDER, ORDER, Clock, Key, Scale, Weights, share

Wish = tuple[str, bool]  # a name, and whether it is to be on
NOTHING = Weights(*(np.zeros(0) for _ in range(6)), known=np.zeros(0, dtype=bool))  # type: ignore[misc]


class SpaceOnCard:
    """A space on one card: which products there are, and what they come to at any candidates."""

    def __init__(self, space: Space, gpu: HardwareProfile, constants: Calibration, accumulation: int) -> None:
        self.space, self.scale = space, Scale(gpu, constants, accumulation)
        self._workspace = constants.workspace_bytes(gpu.compute_capability if gpu.kind == "gpu" else None)
        self._levels: dict[tuple[object, ...], Level] = {}
        self._stacks: dict[Wish | None, Stack | None] = {}
        self.products = tuple(each for number in range(len(space.branches)) for each in self._products_of(number))

    def _products_of(self, number: int) -> Iterator[Product]:
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
            yield Product(number, Clock.of(trunk, *card, known=True), clear, table)
        for place, unclear in enumerate(blurred):
            if unclear.any() and (len(clear[0]) or not place):
                mine = [*clear[:place], groups[place][unclear], *groups[place + 1 :]]
                yield Product(number, Clock.of(trunk, *card, known=False), mine, table)

    def level(self, candidates: Candidates, index: int, without: Rows = ()) -> Level:
        """All there is at one of some candidates; some rows may be taken to be nothing."""
        at = (candidates, index, self._workspace, without)
        return Level(self, self.space.at(*at), self.space.least(*at))

    def at(self, candidates: Candidates, index: int, without: Rows = ()) -> Level:
        """The same, kept."""
        key = (candidates.key, index, without)
        if key not in self._levels:
            self._levels[key] = self.level(candidates, index, without)
        return self._levels[key]

    def has_room(self, candidates: Candidates, index: int, limits: Limits, without: Rows = ()) -> bool:
        """Whether bytes alone, which cards of a kind have in common, may allow anything at one of some candidates."""
        least = self.space.least_bytes(candidates, index, self._workspace, without)
        return bool(self.scale.has_room(least, limits).any())

    def fits(self, candidates: Candidates, index: int, limits: Limits, wish: Wish | None) -> bool:
        """Whether anything fits at one of some candidates."""
        return self.has_room(candidates, index, limits) and self.at(candidates, index).fits(limits, wish)

    def last_fitting(
        self, candidates: Candidates, limits: Limits, *, wish: Wish | None = None, below: int | None = None
    ) -> int | None:
        """The last candidate at which anything fits, of those below one; None where there is none."""
        some = range(len(candidates.total))[:below]
        return next((i for i in reversed(some) if self.fits(candidates, i, limits, wish)), None)

    def last_of_growing(self, candidates: Candidates, limits: Limits) -> int | None:
        """The same where each candidate takes no less than the one before: what does not fit does not fit later."""
        some = range(len(candidates.total))
        first = bisect_left(some, True, key=lambda i: not self.fits(candidates, i, limits, None))
        return first - 1 if first else None

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
    """A space on one card at one candidate.

    Most products are left out by the least that they can take, all at once or by their outlines; of the others alone
    their places are summed up.

    It holds its space weakly: what each holds of the other would else keep all sums until the collector comes by, and
    the matrix goes through thousands of them.

    Args:
        cells: what pieces of patterns add (`Table.cells`).
        least: what no place of an option is below (`Patterns.least`).
    """

    def __init__(self, on_card: SpaceOnCard, cells: Values, least: Values) -> None:
        self.on_card, self._cells, self._least = proxy(on_card), cells, least
        self._found: dict[Wish | None, Bounded] = {}
        self._by_clock: dict[bytes, Values] = {}

    def least(self, clock: Clock) -> Values:
        """What no place of an option is below by a clock: option × column of ``planner.weighing``."""
        if clock.key not in self._by_clock:
            least = self._by_clock[clock.key] = clock.columns(self._least)
            least[:, INEXACT] = self.on_card.space.table.added.inexact_of_options
        return self._by_clock[clock.key]

    def outline(self, of: Product) -> Bounds:
        """The bounds of a product's outline."""
        return Bounds(of.outline, self.least(of.clock)[of.outline.rows], self.on_card.scale)

    def sums(self, of: Product) -> Values:
        """What the places of a product come to: place × column."""
        return of.sums(self._cells)

    def fits(self, limits: Limits, wish: Wish | None) -> bool:
        """Whether anything fits."""
        return self.having(wish).cheapest(limits, (share(limits),), first=True) is not None

    def having(self, wish: Wish | None) -> Bounded:
        """The sets with an optimisation, or those without; all of them where nothing is wished."""
        if wish not in self._found:
            stack, scale, level = self.on_card.stack(wish), self.on_card.scale, proxy(self)
            products = () if stack is None else stack.products
            least = NOTHING if stack is None else scale.weigh(stack.least(self.least), stack.clock)
            self._found[wish] = Bounded(
                least,
                lambda number: Field(products[number], level.sums(products[number]), scale),
                lambda number: level.outline(products[number]),
            )
        return self._found[wish]

    def with_first_knobs(self, limits: Limits, key: Key, found: Sum) -> tuple[int, ...]:
        """The same set with the knobs it names first, of those that fit and cost no more by a key."""
        order = knob_order(self.on_card.space, found.places)
        if len(order) == len(found.places):
            return found.places
        products = self.on_card.products
        number = next(n for n, each in enumerate(products) if np.isin(found.places, each.places).all())
        whole = products[number]
        own = whole.with_all([np.array([place for place in group if int(place) in order]) for group in whole.groups])
        sums = self.having(None).field(number).sums[np.searchsorted(whole.places, own.places)]
        sums[:, ORDER] = [order[int(place)] for place in own.places]
        field, scale = Field(own, sums, self.on_card.scale), self.on_card.scale
        best = Bounded(scale.weigh(field.least[None], own.clock), lambda _: field).cheapest(limits, (*key, KNOB_ORDER))
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
