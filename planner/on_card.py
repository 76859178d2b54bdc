"""A space on one card: what its combinations come to, at any lengths, with an optimisation or without."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from weakref import proxy

import numpy as np

from planner.bounds import Bounded, Field, Product, Stack, Sum
from planner.calibration import Calibration
from planner.evaluate import Array, Candidates, Limits
from planner.hardware import HardwareProfile
from planner.rates import KINDS
from planner.rows import Values
from planner.space import Rows, Space
from planner.timecost import rates_for
from planner.weighing import INEXACT, KNOB_ORDER, ORDER, WIDTH, Clock, Key, Scale, Weights, share

Wish = tuple[str, bool]  # a name, and whether it is to be on
NO_ROW = 2**40  # of a place that no product of a clock takes
NOTHING = Weights(*(np.zeros(0) for _ in range(6)), known=np.zeros(0, dtype=bool))  # type: ignore[misc]


class SpaceOnCard:
    """A space on one card: which products there are, and what they come to at any candidates."""

    def __init__(self, space: Space, gpu: HardwareProfile, constants: Calibration, accumulation: int) -> None:
        self.space, self.scale = space, Scale(gpu, constants, accumulation)
        self._workspace = constants.workspace_bytes(gpu.compute_capability if gpu.kind == "gpu" else None)
        self._levels: dict[tuple[object, ...], Level] = {}
        self._clocks: dict[bytes, tuple[Clock, Array]] = {}  # each with the patterns that go by it
        self._stacks: dict[Wish | None, Stack | None] = {}
        drafts = [each for number in range(len(space.branches)) for each in self._drafts(number)]
        places = self._place_rows()
        self.products = tuple(
            Product(branch, clock, groups, places[clock.seconds.tobytes()]) for branch, clock, groups in drafts
        )

    def _drafts(self, number: int) -> Iterator[tuple[int, Clock, list[Array]]]:
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
            yield self._draft(number, Clock.of(trunk, *card, known=True), clear)
        for place, unclear in enumerate(blurred):
            if unclear.any() and (len(clear[0]) or not place):
                mine = [*clear[:place], groups[place][unclear], *groups[place + 1 :]]
                yield self._draft(number, Clock.of(trunk, *card, known=False), mine)

    def _draft(self, number: int, clock: Clock, groups: list[Array]) -> tuple[int, Clock, list[Array]]:
        """What a product is made of; its patterns are noted as wanted by its clock."""
        table = self.space.table
        _, wanted = self._clocks.setdefault(clock.seconds.tobytes(), (clock, np.zeros(table.patterns, dtype=bool)))
        wanted[table.pattern[np.concatenate(groups)]] = True
        return number, clock, groups

    def _place_rows(self) -> dict[bytes, Array]:
        """By clock, the row of each place in the sums: one for each pattern that goes by the clock, else none."""
        found, before = {}, 0
        for key, (_, wanted) in self._clocks.items():
            found[key] = np.where(wanted, before + np.cumsum(wanted) - 1, NO_ROW)[self.space.table.pattern]
            before += int(wanted.sum())
        return found

    def sums(self, candidates: Candidates, index: int, without: Rows = ()) -> Values:
        """The columns of every row (``planner.weighing``) at one of some candidates: row × column."""
        table, cells = self.space.table, self.space.at(candidates, self._workspace, without)[index]
        sums = np.zeros((sum(int(wanted.sum()) for _, wanted in self._clocks.values()), WIDTH))
        before = 0
        for clock, wanted in self._clocks.values():
            own = sums[before : before + int(wanted.sum())]
            table.added.spread(clock.columns(cells), own, np.where(wanted, np.cumsum(wanted) - 1, -1))
            own[:, INEXACT] = table.inexact[wanted]
            before += len(own)
        return sums

    def at(self, candidates: Candidates, index: int, without: Rows = ()) -> Level:
        """All there is at one of some candidates; some rows may be taken to be nothing."""
        key = (candidates.key, index, without)
        if key not in self._levels:
            self._levels[key] = Level(self, self.sums(candidates, index, without))
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
    """A space on one card at one candidate. ``sums``: row × column.

    It holds its space weakly: what each holds of the other would else keep all sums until the collector comes by, and
    the matrix goes through thousands of them.
    """

    def __init__(self, on_card: SpaceOnCard, sums: Values) -> None:
        self.on_card, self.sums = proxy(on_card), sums
        self._found: dict[Wish | None, Bounded] = {}
        self._least: dict[Wish | None, Values] = {}

    def _field(self, of: Product) -> Field:
        return Field(of, self.sums, self.on_card.scale)

    def fits(self, limits: Limits, wish: Wish | None) -> bool:
        """Whether anything fits."""
        stack = self.on_card.stack(wish)
        if stack is None:
            return False
        may, does = stack.may_and_does_fit(self.sums, self.least(wish, stack), self.on_card.scale, limits)
        if may == does:
            return bool(may)
        return self.having(wish).cheapest(limits, (share(limits),), first=True) is not None

    def least(self, wish: Wish | None, stack: Stack) -> Values:
        """The least of each column of each product (``Stack.least``)."""
        if wish not in self._least:
            self._least[wish] = stack.least(self.sums)
        return self._least[wish]

    def having(self, wish: Wish | None) -> Bounded:
        """The sets with an optimisation, or those without; all of them where nothing is wished."""
        if wish not in self._found:
            stack, scale, level = self.on_card.stack(wish), self.on_card.scale, proxy(self)
            if stack is None:
                self._found[wish] = Bounded(NOTHING, lambda number: level._field(level.on_card.products[number]))
            else:
                least, products = scale.weigh(self.least(wish, stack), stack.clock), stack.products
                self._found[wish] = Bounded(least, lambda number: level._field(products[number]))
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
        stack = Stack([Product(of.branch, of.clock, places, rows)])
        scale = self.on_card.scale
        least = scale.weigh(stack.least(sums), stack.clock)
        same = Bounded(least, lambda _: Field(stack.products[0], sums, scale))
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
