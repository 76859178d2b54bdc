"""The least of all combinations, by branch and bound; exact, since only what cannot be better is left out.

A *product* is a branch with the places that each of its groups may take. Its combinations are built up group by group.
A part of a combination is left out in three cases. It passes a cap even if every group still open takes the least of
each column; or the least of two columns together, weighted, where one group cannot take the least of both. Or another
part takes no more in any column that matters. What is sought first is a cap for what is sought then.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import numpy as np

from planner.evaluate import Array, Limits
from planner.fronts import nondominated
from planner.rows import Values
from planner.spans import Span, Spans
from planner.table import CARD, DISK, HOST, Table
from planner.weighing import CAPPED, INEXACT, ORDER, SPENT, WIDTH, Caps, Clock, Key, Measure, Scale, Weights, adds_up

FEW = 48  # parts of combinations that are not worth the looking which of them can be left out
SMALL = 8  # places of a group that are compared with each other at once, in all such groups together
WEIGHTED = 2.0 ** np.arange(-5, 6)  # how much one column counts against another, in shares of what is at stake
WEIGHINGS = ((1.0, 0.0, 0.0), (1.0, 0.1, 0.0), (1.0, 0.5, 0.0), (1.0, 2.0, 0.0), (1.0, 0.5, 0.5), (0.1, 0.1, 1.0))
SLACK = 1e-9  # sums of seconds in another order differ in their last digits


@dataclass(frozen=True)
class Sum:
    """One combination: its branch, the place that each group takes, and what it weighs."""

    branch: int
    places: tuple[int, ...]
    weights: Weights


class Product:
    """A branch, its clock on a card, and for each of its groups the places of the table that it may take, going up."""

    def __init__(self, branch: int, clock: Clock, groups: Sequence[Array], table: Table) -> None:
        self.branch, self.clock, self.groups, self.table = branch, clock, tuple(groups), table
        self.places = np.concatenate(self.groups)
        sizes = [len(group) for group in self.groups]
        self.starts = np.cumsum([0, *sizes[:-1]])
        self.owner = np.repeat(np.arange(len(sizes)), sizes)

    def sums(self, cells: Values) -> Values:
        """What its places come to: place × column; ``cells``: `Table.cells` of one candidate."""
        added, patterns = self.table.added, self.table.pattern[self.places]
        found = self.clock.columns(added.sums(cells, patterns))
        found[:, INEXACT] = added.inexact[patterns]
        return found

    @cached_property
    def options(self) -> tuple[Array, Array]:
        """Of which options its places are, each once for each group, and where each group begins."""
        numbers = self.table.numbers_of_options(self.places)
        first = np.append(True, (numbers[1:] != numbers[:-1]) | (self.owner[1:] != self.owner[:-1]))
        return numbers[first], np.searchsorted(self.owner[first], np.arange(len(self.groups)))

    @cached_property
    def pairs(self) -> tuple[Array, Array]:
        """Every two places of a small group, by where they stand in ``places``."""
        spans = [(int(start), len(group)) for start, group in zip(self.starts, self.groups, strict=True)]
        both = [(start + a, start + b) for start, many in spans if 1 < many <= SMALL for a, b in _twos(many)]
        first, second = np.array(both, dtype=np.int64).reshape(-1, 2).T
        return first, second

    def unbeaten(self, points: Values, among: Array) -> list[Array]:
        """Of each group the places, by where they stand, that no other of it beats.

        Args:
            points: those of ``places``.
            among: whether a place is looked at; of each group some is.
        """
        first, second = self.pairs
        both = among[first] & among[second]
        first, second = first[both], second[both]
        no_more = (points[first] <= points[second]).all(axis=1)
        beats = no_more & ((first < second) | (points[first] < points[second]).any(axis=1))
        left = among.copy()
        left[second[beats]] = False
        for start, group in zip(self.starts, self.groups, strict=True):
            if len(group) > SMALL:
                own = start + np.flatnonzero(among[start : start + len(group)])
                left[own] = False
                left[own[nondominated(points[own])]] = True
        kept = np.flatnonzero(left)
        return np.split(kept, np.flatnonzero(np.diff(self.owner[kept])) + 1)

    def with_places(self, number: int, places: Array) -> Product:
        """The same with other places in one group."""
        return self.with_all([*self.groups[:number], places, *self.groups[number + 1 :]])

    def with_all(self, groups: Sequence[Array]) -> Product:
        """The same with other places in all of its groups."""
        return Product(self.branch, self.clock, groups, self.table)


def _twos(many: int) -> list[tuple[int, int]]:
    return [(a, b) for a in range(many) for b in range(many) if a != b]


class Stack:
    """Products one above the other, so that what none of their combinations is below is found at once.

    Approximate: where values of a knob change several things, each of these takes its own least.
    """

    def __init__(self, products: Iterable[Product]) -> None:
        self.products = tuple(products)
        clocks = {each.clock.key: each.clock for each in self.products}
        self._clocks, numbers = tuple(clocks.values()), {key: number for number, key in enumerate(clocks)}
        rows = [
            numbers[each.clock.key] * len(each.table.added) + each.table.options_of_patterns[each.options[0]]
            for each in self.products
        ]
        ends = np.cumsum([0, *map(len, rows)])
        self._rows = np.concatenate(rows)
        self._groups = np.concatenate(
            [each.options[1] + end for each, end in zip(self.products, ends[:-1], strict=True)]
        )
        self._firsts = np.cumsum([0, *(len(each.groups) for each in self.products)])[:-1]
        known = np.array([each.clock.known for each in self.products])
        self.clock = Clock(known, self._clocks[0].layers, self._clocks[0].seconds)

    def least(self, of_options: Callable[[Clock], Values]) -> Values:
        """The least of each column: product × column; ``of_options`` gives it of each option by a clock."""
        least = np.concatenate([of_options(clock) for clock in self._clocks])[self._rows]
        return np.asarray(np.add.reduceat(np.minimum.reduceat(least, self._groups), self._firsts))


class Bounded:
    """Products at one candidate.

    Args:
        least: what the least of each column weighs, of each product.
        field_of: the field of each of them, where it is needed.
    """

    def __init__(self, least: Weights, field_of: Callable[[int], Field]) -> None:
        self.least_weights, self.field_of = least, cache(field_of)

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
        weights, caps = self.least_weights, [Caps.of(limits, known=known) for known in (False, True)]
        for other, value in settled:
            caps = [other.below(each, value) for each in caps]
        held = np.where(weights.known, caps[True].hold(weights), caps[False].hold(weights)).ravel()
        values = np.broadcast_to(measure.of(weights), weights.high.shape).ravel()
        below = float("inf") if best is None else float(measure.of(best.weights))
        for number in np.argsort(values, kind="stable"):
            if not held[number]:
                continue
            if not values[number] < below:
                break
            field = self.field_of(int(number))
            found = field.search(caps[bool(field.of.clock.known)], measure, below, first=first)
            if found is not None:
                best, below = found, float(measure.of(found.weights))
                if first:
                    break
        return best


class Field:
    """One product at one candidate. ``sums``: place × column."""

    def __init__(self, of: Product, sums: Values, scale: Scale) -> None:
        self.of, self.scale, self.sums = of, scale, sums
        self.least, self.most = (each.reduceat(self.sums, of.starts).sum(axis=0) for each in (np.minimum, np.maximum))
        self.most_weights = scale.weigh(self.most[None], of.clock).at(0)

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
        more = np.maximum.reduceat(sums[:, :, None] - sums[:, None], self.of.starts).sum(axis=0)
        first = np.tri(len(more), k=-1, dtype=bool)  # of two that are always alike the first is kept
        lower = (more < 0) | ((more == 0) & (more.T > 0)) | ((more == 0) & (more.T == 0) & first)
        return [int(column) for column in hopeful[~lower.any(axis=1)]]

    def may_and_does_fit(self, limits: Limits) -> tuple[bool, bool]:
        """Whether anything may fit, and whether something is seen to: between them one has to search.

        Of shares of the limits, weighted against each other, nothing that fits takes more than there is; and what takes
        least is tried.
        """
        of, scale, places = self.of, self.scale, np.arange(len(self.sums))
        if not scale.weigh(self.least[None], of.clock).fits(limits).any():
            return False, False
        shares = [
            self.sums[:, part.start + int(self.least[part].argmax())] / max(1.0, most)
            for part, most in (
                (CARD, scale.most_on_card(limits.gpu_bytes)),
                (HOST, scale.most_in_host(limits.host_bytes)),
            )
        ]
        shares.append(self.linear(self.sums) / limits.step_seconds if of.clock.known else np.zeros(len(places)))
        many = np.diff(np.append(of.starts, len(places)))
        for weights in WEIGHINGS:
            taken = sum(weight * share for weight, share in zip(weights, shares, strict=True))
            lowest = np.minimum.reduceat(taken, of.starts)
            if lowest.sum() > sum(weights) * (1 + SLACK):
                return False, False
            first = np.where(taken == np.repeat(lowest, many), places, len(places))
            chosen = self.sums[np.minimum.reduceat(first, of.starts)].sum(axis=0)
            if scale.weigh(chosen[None], of.clock).fits(limits).any():
                return True, True
        return True, False

    def linear(self, sums: Values) -> Any:
        """Seconds that no step of these sums is faster than: of time, what adds up."""
        return self.scale.accumulation * adds_up(sums[:, SPENT], self.of.clock.layers)

    @cached_property
    def time(self) -> list[Span]:
        """What times are compared by."""
        return Spans(self.sums, self.of.starts, self.of.clock.layers).compared()

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

    def search(self, caps: Caps, measure: Measure, below: float, *, first: bool) -> Sum | None:
        """The combination within the caps with the least measure, where that is less than some value."""
        caps = caps if below == float("inf") else measure.below(caps, below)
        return _Search(self, caps, measure, below).run(first=first)


class _Search:
    """Builds up the combinations of a field from those places of each group that may be in the best and are not beaten.

    ``weighted``: of each place seconds, bytes, and each with the other in several proportions.
    """

    def __init__(self, field: Field, caps: Caps, measure: Measure, below: float) -> None:
        self.field, self.caps, self.measure, self.below = field, caps, measure, below
        self.found: Sum | None = None
        # A byte and a second count by what is at stake of them.
        stakes = field.most - field.least
        self.columns = [column for column in (*field.card, *field.host) if stakes[column] > 0]
        self.stakes = stakes[self.columns]
        self.seconds = float(field.linear(stakes[None])[0]) or 1.0
        self.weighted = self._weighted(field.sums)
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
        of, own = self.field.of, self.field.sums
        self._quickly()
        left = self._places_left()
        if (first and self.found is not None) or not np.logical_or.reduceat(left, of.starts).all():
            return self.found
        most = self.field.most_weights
        binding = {name for name in CAPPED if getattr(most, name) > getattr(self.caps, name)}
        reads = binding if first else self.measure.reads | binding
        groups = of.unbeaten(self.field.points(own, reads), left)
        alone = np.array([group[0] for group in groups if len(group) == 1], dtype=np.int64)
        several = self._in_order([group for group in groups if len(group) > 1])
        rest, rest_weighted = _rest(own, several), _rest(self.weighted, several)
        sums, taken = own[alone].sum(axis=0)[None], alone[None]
        for number, group in enumerate(several, 1):
            many = len(sums)
            sums = (sums[:, None] + own[group]).reshape(-1, WIDTH)
            taken = np.column_stack([np.repeat(taken, len(group), axis=0), np.tile(group, many)])
            if len(sums) > FEW and number < len(several):
                hopeful = self._hopeful(sums, self._weighted(sums), rest[number], rest_weighted[number])
                kept = hopeful[nondominated(self.field.points(sums[hopeful], reads))]
                sums, taken = sums[kept], taken[kept]
        self._take(sums, taken)
        return self.found

    def _in_order(self, groups: Sequence[Array]) -> list[Array]:
        """First those groups that decide the largest share of anything."""
        own = self.field.sums
        spans = [own[group].max(axis=0) - own[group].min(axis=0) for group in groups]
        stakes = np.maximum(sum(spans, np.zeros(WIDTH)), 1e-300)
        shares = [float((span / stakes)[: SPENT.stop].max()) for span in spans]
        return [groups[place] for place in np.argsort(shares, kind="stable")[::-1]]

    def _quickly(self) -> None:
        """Try a few combinations: of each group the place that takes least of a weighted sum."""
        spans = zip(self.field.of.starts, self.field.of.groups, strict=True)
        taken = np.column_stack([start + self.weighted[start : start + len(g)].argmin(axis=0) for start, g in spans])
        self._take(self.field.sums[taken].sum(axis=1), taken)

    def _places_left(self) -> Array:
        """Which places may be in a combination within the caps and below the best, if all others take the least."""
        own, of = self.field.sums, self.field.of
        least, least_weighted = (np.minimum.reduceat(each, of.starts) for each in (own, self.weighted))
        rest, rest_weighted = (each.sum(axis=0) - each for each in (least, least_weighted))
        left = np.zeros(len(own), dtype=bool)
        left[self._hopeful(own, self.weighted, rest[of.owner], rest_weighted[of.owner])] = True
        return left

    def _hopeful(self, sums: Values, weighted: Values, rest: Values, rest_weighted: Values) -> Array:
        """The parts that may still come within the caps and below the best; ``rest``: the least of what is open."""
        caps = self.weighted_caps + SLACK * np.abs(self.weighted_caps)
        kept = np.flatnonzero((weighted + rest_weighted <= caps).all(axis=1))
        rest = rest if rest.ndim == 1 else rest[kept]
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
        places = of.places[sorted(map(int, taken[row]))]
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
