"""The least of all combinations, by branch and bound; exact, since only what cannot be better is left out.

A *product* is a branch with the places that each of its groups may take. Its combinations are built up group by group.
A part of a combination is left out in three cases. It passes a cap even if every group still open takes the least of
each column; or the least of two columns together, weighted, where one group cannot take the least of both. Or another
part takes no more in any column that matters. What is sought first is a cap for what is sought then.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from planner.evaluate import Array, Limits
from planner.fronts import nondominated
from planner.rows import Values
from planner.table import CARD, HOST
from planner.weighing import BUSY, INEXACT, LINK, ORDER, WIDTH, Caps, Clock, Key, Measure, Scale, Weights

FEW = 48  # parts of combinations that are not worth the looking which of them can be left out
SMALL = 8  # places of a group that are compared with each other at once, in all such groups together
WEIGHTED = 2.0 ** np.arange(-5, 6)  # how much one column counts against another, in shares of what is at stake
SLACK = 1e-9  # sums of seconds in another order differ in their last digits


@dataclass(frozen=True)
class Sum:
    """One combination: its branch, the place that each group takes, and what it weighs."""

    branch: int
    places: tuple[int, ...]
    weights: Weights


class Product:
    """A branch, its clock on a card, and for each of its groups the places of the table that it may take.

    ``rows``: in which row of the sums each place of the table stands.
    """

    def __init__(self, branch: int, clock: Clock, groups: Sequence[Array], rows: Array) -> None:
        self.branch, self.clock, self.groups, self.rows = branch, clock, tuple(groups), rows
        self.places = np.concatenate(self.groups)
        sizes = [len(group) for group in self.groups]
        self.starts = np.cumsum([0, *sizes[:-1]])
        self.owner = np.repeat(np.arange(len(sizes)), sizes)

    @cached_property
    def pairs(self) -> tuple[Array, Array]:
        """Every two places of a small group, by where they stand in ``places``."""
        spans = [(int(start), len(group)) for start, group in zip(self.starts, self.groups, strict=True)]
        both = [(start + a, start + b) for start, many in spans if 1 < many <= SMALL for a, b in _twos(many)]
        first, second = np.array(both, dtype=np.int64).reshape(-1, 2).T
        return first, second

    def unbeaten(self, points: Values) -> list[Array]:
        """Of each group the places, by where they stand, that no other of it beats; points are those of ``places``."""
        first, second = self.pairs
        no_more = (points[first] <= points[second]).all(axis=1)
        beats = no_more & ((first < second) | (points[first] < points[second]).any(axis=1))
        left = np.ones(len(points), dtype=bool)
        left[second[beats]] = False
        for start, group in zip(self.starts, self.groups, strict=True):
            if len(group) > SMALL:
                left[start : start + len(group)] = False
                left[start + nondominated(points[start : start + len(group)])] = True
        kept = np.flatnonzero(left)
        return np.split(kept, np.flatnonzero(np.diff(self.owner[kept])) + 1)

    def with_groups(self, groups: Sequence[Array]) -> Product:
        """The same with other places."""
        return Product(self.branch, self.clock, groups, self.rows)

    def with_places(self, number: int, places: Array) -> Product:
        """The same with other places in one group."""
        return self.with_groups([*self.groups[:number], places, *self.groups[number + 1 :]])


def _twos(many: int) -> list[tuple[int, int]]:
    return [(a, b) for a in range(many) for b in range(many) if a != b]


def may_fit(products: Sequence[Product], sums: Values, scale: Scale, limits: Limits) -> Any:
    """Whether anything may fit at each candidate: the least of everything does. Sums: row × column × candidate."""
    found = np.zeros(sums.shape[2], dtype=bool)
    for each in products:
        least = np.minimum.reduceat(sums[each.rows[each.places]], each.starts).sum(axis=0)
        found |= scale.weigh(least.T, each.clock).fits(limits)
    return found


class Bounded:
    """Products at one candidate."""

    def __init__(self, fields: Iterable[Field]) -> None:
        self.fields = tuple(fields)

    def cheapest(self, limits: Limits, key: Key, *, first: bool = False) -> Sum | None:
        """Of what fits the least by a key; None where nothing fits.

        Args:
            first: any that fits will do.
        """
        best: Sum | None = None
        settled: list[tuple[Measure, float]] = []
        for measure in key:
            best = self._least(limits, settled, measure, best, first=first)
            if best is None or first:
                return best
            settled.append((measure, float(measure.of(best.weights))))
        return best

    def _least(
        self,
        limits: Limits,
        settled: Sequence[tuple[Measure, float]],
        measure: Measure,
        best: Sum | None,
        *,
        first: bool,
    ) -> Sum | None:
        """The least by one measure, of what comes up to what is settled."""
        for each in sorted(self.fields, key=lambda field: float(measure.of(field.least_weights))):
            caps = Caps.of(limits, known=each.of.clock.known)
            for other, value in settled:
                caps = other.below(caps, value)
            best = each.search(caps, measure, best, first=first) or best
            if best is not None and first:
                break
        return best


class Field:
    """One product at one candidate. ``sums``: row × column."""

    def __init__(self, of: Product, sums: Values, scale: Scale) -> None:
        self.of, self.scale, self.sums = of, scale, sums[of.rows[of.places]]
        self.least, self.most = (each.reduceat(self.sums, of.starts).sum(axis=0) for each in (np.minimum, np.maximum))
        both = scale.weigh(np.stack([self.least, self.most]), of.clock)
        self.least_weights, self.most_weights = both.at(0), both.at(1)

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
        sums = self.sums[:, part]
        more = np.maximum.reduceat(sums[:, :, None] - sums[:, None], self.of.starts).sum(axis=0)
        first = np.tri(len(more), k=-1, dtype=bool)  # of two that are always alike the first is kept
        lower = (more < 0) | ((more == 0) & (more.T > 0)) | ((more == 0) & (more.T == 0) & first)
        return [part.start + int(column) for column in np.flatnonzero(~lower.any(axis=1))]

    def linear(self, sums: Values) -> Any:
        """Seconds that no step of these sums is faster than: of time, what adds up."""
        return self.scale.accumulation * (sums[:, BUSY].sum(axis=1) + sums[:, LINK].sum(axis=1) / self.of.clock.layers)

    @cached_property
    def time(self) -> tuple[list[int], list[int]]:
        """What times are compared by: phases whose parts add up, and the columns of the others.

        Where in a phase the link never is what one waits for, computing and copying add up; and where nothing is waited
        for but the launches, neither matters.
        """
        linear, columns, layers = [], [], self.of.clock.layers
        for phase, wait in enumerate(self.of.clock.least):
            busy, link = BUSY.start + phase, LINK.start + phase
            if max(self.most[busy], self.most[link]) + self.most[link] / layers <= wait:
                continue
            if self.least[busy] >= self.most[link] and self.least[busy] + self.least[link] / layers >= wait:
                linear.append(phase)
            else:
                columns += [busy, link]
        return linear, columns

    def points(self, sums: Values, reads: Iterable[str]) -> Values:
        """What sums are compared by where these of ``Weights`` matter."""
        wanted, columns = {*reads}, list[int]()
        if "high" in wanted or ("host" in wanted and self.scale.gpu.kind == "cpu"):
            columns += self.card
        if "host" in wanted:
            columns += self.host
        columns += [column for name, column in (("inexact", INEXACT), ("order", ORDER)) if name in wanted]
        if "seconds" not in wanted:
            return sums[:, columns]
        linear, more = self.time
        seconds = sum(
            (sums[:, BUSY.start + phase] + sums[:, LINK.start + phase] / self.of.clock.layers for phase in linear),
            np.zeros(len(sums)),
        )
        return np.column_stack([sums[:, [*columns, *more]], seconds])

    def unbeaten(self, reads: Iterable[str]) -> list[Array]:
        """Of each group the places, by where they stand, that no other beats where these of ``Weights`` matter."""
        return self.of.unbeaten(self.points(self.sums, reads))

    def search(self, caps: Caps, measure: Measure, best: Sum | None, *, first: bool) -> Sum | None:
        """The combination within the caps with the least measure, where that is less than the best so far."""
        caps = caps if best is None else measure.below(caps, float(measure.of(best.weights)))
        below = float("inf") if best is None else float(measure.of(best.weights))
        if not caps.hold(self.least_weights) or measure.of(self.least_weights) >= below:
            return None
        binding = {name for name in vars(caps) if getattr(self.most_weights, name) > getattr(caps, name)}
        reads = frozenset(binding if first else measure.reads | binding)
        search = _Search(self, caps, measure, below, reads, self.unbeaten(reads))
        return search.run(first=first)


class _Search:
    """Builds up the combinations of a field from those places of each group that are not beaten."""

    def __init__(
        self, field: Field, caps: Caps, measure: Measure, below: float, reads: frozenset[str], groups: Sequence[Array]
    ) -> None:
        self.field, self.caps, self.measure, self.below, self.reads = field, caps, measure, below, reads
        self.found: Sum | None = None
        self.alone = [int(group[0]) for group in groups if len(group) == 1]
        self.base = field.sums[self.alone].sum(axis=0)
        several = [group for group in groups if len(group) > 1]
        spans = [field.sums[group].max(axis=0) - field.sums[group].min(axis=0) for group in several]
        stakes = sum(spans, np.zeros(WIDTH))
        # First those groups that decide the largest share of anything.
        shares = [float((span / np.maximum(stakes, 1e-300))[: LINK.stop].max()) for span in spans]
        self.several = [several[place] for place in np.argsort(shares, kind="stable")[::-1]]
        # A byte and a second count by what is at stake of them.
        columns = [*field.card, *field.host]
        self.columns = [column for column in columns if stakes[column] > 0]
        self.stakes = stakes[self.columns]
        self.seconds = float(field.linear(stakes[None])[0]) or 1.0
        self.weighted_caps = self._weighted_caps()

    def _weighted(self, sums: Values) -> Values:
        """Seconds, bytes, and each with the other in several proportions."""
        return self._combined(self.field.linear(sums)[:, None], sums[:, self.columns])

    def _weighted_caps(self) -> Values:
        """The most that each of them can be within the caps."""
        most = np.zeros((1, HOST.stop))
        most[:, CARD] = self.field.scale.most_on_card(self.caps.high)
        most[:, HOST] = self.field.scale.most_in_host(self.caps.host)
        return np.asarray(self._combined(np.full((1, 1), self.caps.seconds), most[:, self.columns])[0])

    def _combined(self, seconds: Values, size: Values) -> Values:
        late, large = seconds / self.seconds, size / self.stakes
        both = large[:, :, None] + late[:, :, None] * WEIGHTED
        return np.hstack([late, large, both.reshape(len(size), -1)])

    def run(self, *, first: bool) -> Sum | None:
        """The least combination, where it is less than what was found before."""
        own, several = self.field.sums, self.several
        if several:
            self._quickly()
            if first and self.found is not None:
                return self.found
        rest, rest_weighted = _rest(own, several), _rest(self._weighted(own), several)
        sums, taken = self.base[None], np.zeros((1, 0), dtype=np.int64)
        for number, group in enumerate(several, 1):
            many = len(sums)
            sums = (sums[:, None] + own[group]).reshape(-1, WIDTH)
            taken = np.column_stack([np.repeat(taken, len(group), axis=0), np.tile(group, many)])
            if len(sums) > FEW and number < len(several):
                hopeful = self._hopeful(sums, rest[number], rest_weighted[number])
                kept = hopeful[nondominated(self.field.points(sums[hopeful], self.reads))]
                sums, taken = sums[kept], taken[kept]
        self._take(sums, taken)
        return self.found

    def _quickly(self) -> None:
        """Try a few combinations: of each group the place that takes least of a weighted sum."""
        own = self._weighted(self.field.sums)
        taken = np.column_stack([group[own[group].argmin(axis=0)] for group in self.several])
        self._take(self.base + self.field.sums[taken].sum(axis=1), taken)

    def _hopeful(self, sums: Values, rest: Values, rest_weighted: Values) -> Array:
        """The parts that may still come within the caps and below the best."""
        caps = self.weighted_caps + SLACK * np.abs(self.weighted_caps)
        held = (self._weighted(sums) + rest_weighted <= caps).all(axis=1)
        kept = np.flatnonzero(held)
        weights = self.field.scale.weigh(sums[kept] + rest, self.field.of.clock)
        return np.asarray(kept[self.caps.hold(weights) & (self.measure.of(weights) < self.below)])

    def _take(self, sums: Values, taken: Array) -> None:
        """Take the best of whole combinations, if it is better; then it is the cap."""
        weights = self.field.scale.weigh(sums, self.field.of.clock)
        values = np.where(self.caps.hold(weights), self.measure.of(weights), np.inf)
        row = int(np.argmin(values)) if len(values) else -1
        if row < 0 or not values[row] < self.below:
            return
        of = self.field.of
        places = of.places[sorted([*self.alone, *map(int, taken[row])])]
        self.found = Sum(of.branch, tuple(map(int, places)), weights.at(row))
        self.below = float(values[row])
        self.caps = self.measure.below(self.caps, self.below)
        self.weighted_caps = self._weighted_caps()


def _rest(values: Values, groups: Sequence[Array]) -> Values:
    """For each group the sum of the least that it and those after it take of each column; nothing after the last."""
    found = np.zeros((len(groups) + 1, values.shape[1]))
    for number in range(len(groups) - 1, -1, -1):
        found[number] = found[number + 1] + values[groups[number]].min(axis=0)
    return found
