"""One product at one candidate: the least of its combinations within caps, by branch and bound.

Its combinations are built up group by group. A part of a combination is left out in three cases. It passes a cap even
if every group still open takes the least of each column; or the least of two columns together, weighted, where one
group cannot take the least of both. Or another part takes no more in any column that matters.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from planner.evaluate import Array
from planner.fronts import nondominated
from planner.products import Outline, Product
from planner.rows import Values
from planner.spans import Span, Spans
from planner.table import CARD, DISK, HOST
from planner.weighing import CAPPED, INEXACT, ORDER, SPENT, WIDTH, Caps, Measure, Scale, Weights, adds_up

FEW = 48  # parts of combinations that are not worth the looking which of them can be left out
WEIGHTED = 2.0 ** np.arange(-5, 6)  # how much one column counts against another, in shares of what is at stake
SLACK = 1e-9  # sums of seconds in another order differ in their last digits


@dataclass(frozen=True)
class Sum:
    """One combination: its branch, the place that each group takes, and what it weighs."""

    branch: int
    places: tuple[int, ...]
    weights: Weights


class Bounds:
    """Places at one candidate, or options as the least of theirs: what may be in a combination of one of each group.

    Args:
        of: the groups they are of.
        sums: what each place, or option, comes to: place × column.
    """

    def __init__(self, of: Product | Outline, sums: Values, scale: Scale) -> None:
        self.starts, self.owner, self.clock, self.scale, self.sums = of.starts, of.owner, of.clock, scale, sums
        self.least, self.most = (each.reduceat(sums, of.starts).sum(axis=0) for each in (np.minimum, np.maximum))

    @cached_property
    def card(self) -> list[int]:
        """The phases that may be the peak of the card."""
        return self._tops(CARD)

    @cached_property
    def host(self) -> list[int]:
        """The phases that may be the peak of the host."""
        return self._tops(HOST)

    def _tops(self, part: slice) -> list[int]:
        """The columns of a part that differ and may be its highest: those that are never above another are not."""
        hopeful = part.start + np.flatnonzero(self.most[part] >= self.least[part].max())
        sums = self.sums[:, hopeful]
        more = np.maximum.reduceat(sums[:, :, None] - sums[:, None], self.starts).sum(axis=0)
        first = np.tri(len(more), k=-1, dtype=bool)  # of two that are always alike the first is kept
        lower = (more < 0) | ((more == 0) & (more.T > 0)) | ((more == 0) & (more.T == 0) & first)
        return [int(column) for column in hopeful[~lower.any(axis=1)]]

    def linear(self, sums: Values) -> Any:
        """Seconds that no step of these sums is faster than: of time, what adds up."""
        return self.scale.accumulation * adds_up(sums[:, SPENT], self.clock.layers)

    @cached_property
    def columns(self) -> list[int]:
        """The columns of bytes that are weighted against time: of those that may be a peak the ones that differ."""
        return [column for column in (*self.card, *self.host) if self.most[column] > self.least[column]]

    @cached_property
    def weighted(self) -> Values:
        """What ``weighing`` gives of each place."""
        return self.weighing(self.sums)

    @cached_property
    def rest(self) -> tuple[Values, Values]:
        """For each group the least that all others take, of each column and of each of ``weighted``."""
        least, least_weighted = (np.minimum.reduceat(each, self.starts) for each in (self.sums, self.weighted))
        return least.sum(axis=0) - least, least_weighted.sum(axis=0) - least_weighted

    def weighing(self, sums: Values) -> Values:
        """Of sums seconds, bytes, and each with the other in several proportions."""
        return self.combined(self.linear(sums)[:, None], sums[:, self.columns])

    def combined(self, seconds: Values, size: Values) -> Values:
        """The same of seconds and bytes; a byte and a second count by what is at stake of them."""
        stakes = self.most - self.least
        late = seconds / (float(self.linear(stakes[None])[0]) or 1.0)
        large = size / stakes[self.columns]
        both = large[:, :, None] + late[:, :, None] * WEIGHTED
        return np.hstack([late, large, both.reshape(len(size), -1)])

    def weighted_caps(self, caps: Caps) -> Values:
        """The most that each of what ``weighing`` gives can be within caps."""
        most = np.zeros((1, HOST.stop))
        most[:, CARD] = self.scale.most_on_card(caps.high)
        most[:, HOST] = self.scale.most_in_host(caps.host)
        return np.asarray(self.combined(np.full((1, 1), caps.seconds), most[:, self.columns])[0])

    def left(self, within: Within) -> Array:
        """Which places may be in a combination within caps and below the best, if all others take the least."""
        (rest, rest_weighted), owner = self.rest, self.owner
        left = np.zeros(len(self.sums), dtype=bool)
        left[self.hopeful(self.sums, self.weighted, rest[owner], rest_weighted[owner], within)] = True
        return left

    def may_hold(self, caps: Caps, measure: Measure, below: float) -> bool:
        """Whether each group has a place left within caps with a measure less than some value."""
        return bool(np.logical_or.reduceat(self.left(Within.of(self, caps, measure, below)), self.starts).all())

    def hopeful(self, sums: Values, weighted: Values, rest: Values, rest_weighted: Values, within: Within) -> Array:
        """The parts that may still come within the caps and below the best; ``rest``: the least of what is open."""
        most = within.most + SLACK * np.abs(within.most)
        kept = np.flatnonzero((weighted + rest_weighted <= most).all(axis=1))
        rest = rest if rest.ndim == 1 else rest[kept]
        weights = self.scale.weigh(sums[kept] + rest, self.clock)
        return np.asarray(kept[within.caps.hold(weights) & (within.measure.of(weights) < within.below)])


@dataclass(frozen=True)
class Within:
    """What a combination has to be: within caps, with a measure below some value; ``most``: caps as weighted."""

    caps: Caps
    measure: Measure
    below: float
    most: Values

    @classmethod
    def of(cls, bounds: Bounds, caps: Caps, measure: Measure, below: float) -> Within:
        """With the caps that follow from the value."""
        caps = caps if below == float("inf") else measure.below(caps, below)
        return cls(caps, measure, below, bounds.weighted_caps(caps))


class Field(Bounds):
    """One product at one candidate. ``sums``: place × column."""

    def __init__(self, of: Product, sums: Values, scale: Scale) -> None:
        super().__init__(of, sums, scale)
        self.of = of

    @cached_property
    def most_weights(self) -> Weights:
        """What the most of each column weighs."""
        return self.scale.weigh(self.most[None], self.clock).at(0)

    @cached_property
    def time(self) -> list[Span]:
        """What times are compared by."""
        return Spans(self.sums, self.starts, self.clock.layers).compared()

    def points(self, sums: Values, reads: Iterable[str]) -> Values:
        """What sums are compared by where these of ``Weights`` matter."""
        wanted, columns = {*reads}, list[int]()
        if "high" in wanted or ("host" in wanted and self.scale.gpu.kind == "cpu"):
            columns += self.card
        if "host" in wanted:
            columns += self.host
        others = (("disk", DISK), ("inexact", INEXACT), ("order", ORDER))
        columns += [column for name, column in others if name in wanted]
        if "seconds" not in wanted:
            return sums[:, columns]
        spent = [(sums[:, held] * factors).sum(axis=1) for held, factors in self.time]
        return np.column_stack([sums[:, columns], *spent])

    @cached_property
    def tried(self) -> tuple[Array, Weights]:
        """A few combinations, and what they weigh: of each group the place that takes least of a weighted sum."""
        spans = zip(self.starts, self.of.groups, strict=True)
        taken = np.column_stack([start + self.weighted[start : start + len(g)].argmin(axis=0) for start, g in spans])
        return taken, self.scale.weigh(self.sums[taken].sum(axis=1), self.clock)

    def search(self, caps: Caps, measure: Measure, below: float, *, first: bool) -> Sum | None:
        """The combination within the caps with the least measure, where that is less than some value."""
        return _Search(self, Within.of(self, caps, measure, below)).run(first=first)


class _Search:
    """Builds up the combinations of a field from the places of its groups that may be in the best and are unbeaten."""

    def __init__(self, field: Field, within: Within) -> None:
        self.field, self.within = field, within
        self.found: Sum | None = None

    def run(self, *, first: bool) -> Sum | None:
        """The least combination, where it is less than what was found before."""
        of, own, weighted = self.field.of, self.field.sums, self.field.weighted
        self._take(*self.field.tried)
        if first and self.found is not None:
            return self.found
        left = self.field.left(self.within)
        if not np.logical_or.reduceat(left, of.starts).all():
            return self.found
        most, caps = self.field.most_weights, self.within.caps
        binding = {name for name in CAPPED if getattr(most, name) > getattr(caps, name)}
        reads = binding if first else self.within.measure.reads | binding
        groups = of.unbeaten(self.field.points(own, reads), left)
        alone = np.array([group[0] for group in groups if len(group) == 1], dtype=np.int64)
        several = self._in_order([group for group in groups if len(group) > 1])
        rest, rest_weighted = _rest(own, several), _rest(weighted, several)
        sums, taken = own[alone].sum(axis=0)[None], alone[None]
        for number, group in enumerate(several, 1):
            many = len(sums)
            sums = (sums[:, None] + own[group]).reshape(-1, WIDTH)
            taken = np.column_stack([np.repeat(taken, len(group), axis=0), np.tile(group, many)])
            if len(sums) > FEW and number < len(several):
                so_far = self.field.weighing(sums)
                hopeful = self.field.hopeful(sums, so_far, rest[number], rest_weighted[number], self.within)
                kept = hopeful[nondominated(self.field.points(sums[hopeful], reads))]
                sums, taken = sums[kept], taken[kept]
        self._take(taken, self.field.scale.weigh(sums, of.clock))
        return self.found

    def _in_order(self, groups: Sequence[Array]) -> list[Array]:
        """First those groups that decide the largest share of anything."""
        own = self.field.sums
        spans = [own[group].max(axis=0) - own[group].min(axis=0) for group in groups]
        stakes = np.maximum(sum(spans, np.zeros(WIDTH)), 1e-300)
        shares = [float((span / stakes)[: SPENT.stop].max()) for span in spans]
        return [groups[place] for place in np.argsort(shares, kind="stable")[::-1]]

    def _take(self, taken: Array, weights: Weights) -> None:
        """Take the best of whole combinations, if it is better; then it is the cap."""
        caps, measure = self.within.caps, self.within.measure
        values = np.where(caps.hold(weights), measure.of(weights), np.inf)
        row = int(np.argmin(values)) if len(values) else -1
        if row < 0 or not values[row] < self.within.below:
            return
        of = self.field.of
        places = of.places[sorted(map(int, taken[row]))]
        self.found = Sum(of.branch, tuple(map(int, places)), weights.at(row))
        self.within = Within.of(self.field, caps, measure, float(values[row]))


def _rest(values: Values, groups: Sequence[Array]) -> Values:
    """For each group the sum of the least that it and those after it take of each column; nothing after the last."""
    found = np.zeros((len(groups) + 1, values.shape[1]))
    for number in range(len(groups) - 1, -1, -1):
        found[number] = found[number + 1] + values[groups[number]].min(axis=0)
    return found
