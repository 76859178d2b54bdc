"""The least of all combinations, by branch and bound; exact, since only what cannot be better is left out.

A *product* is a branch with the places that each of its groups may take. Its combinations are built up group by group.
A part of a combination is left out where it cannot fit even if every group still open took the least of each column;
where it cannot be better than what was found; and where another part takes no more in any column that matters.
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
from planner.weighing import BUSY, COUNT, INEXACT, LINK, Clock, Key, Scale, Weights, share

FEW = 48  # parts of combinations that are not worth the looking which of them can be left out
SMALL = 8  # places of a group that are compared with each other at once, in all such groups together


@dataclass(frozen=True)
class Sum:
    """One combination: its branch, the place that each group takes, and what it weighs."""

    branch: int
    places: tuple[int, ...]
    weights: Weights
    key: tuple[float, ...]


class Product:
    """A branch, its clock on a card, and for each of its groups the places of the table that it may take.

    ``offset``: how far from its place in the table a place stands in the sums.
    """

    def __init__(self, branch: int, clock: Clock, groups: Sequence[Array], offset: int = 0) -> None:
        self.branch, self.clock, self.groups, self.offset = branch, clock, tuple(groups), offset
        self.places = np.concatenate(self.groups) + offset
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

    def holds(self, places: Sequence[int]) -> bool:
        """Whether a combination is one of its own."""
        return {*places} <= {*map(int, self.places - self.offset)}

    def restricted(self, group: int, places: Array) -> Product | None:
        """With fewer places in one group; None where none is left."""
        if not len(places):
            return None
        return Product(self.branch, self.clock, [*self.groups[:group], places, *self.groups[group + 1 :]], self.offset)


def _twos(many: int) -> list[tuple[int, int]]:
    return [(a, b) for a in range(many) for b in range(many) if a != b]


class Bounded:
    """Products at some candidates. ``sums``: place × column × candidate."""

    def __init__(self, products: Iterable[Product], sums: Values, scale: Scale) -> None:
        self.products, self.sums, self.scale = tuple(products), sums, scale

    @cached_property
    def least(self) -> Values:
        """The least of each column that any combination can have: product × column × candidate."""
        if not self.products:
            return np.zeros((0, *self.sums.shape[1:]))
        places = np.concatenate([each.places for each in self.products])
        ends = np.cumsum([0, *(len(each.places) for each in self.products)])
        groups = np.concatenate([each.starts + end for each, end in zip(self.products, ends[:-1], strict=True)])
        firsts = np.cumsum([0, *(len(each.groups) for each in self.products)])[:-1]
        return np.asarray(np.add.reduceat(np.minimum.reduceat(self.sums[places], groups), firsts))

    @cached_property
    def clock(self) -> Clock:
        """The clocks of all products, one above the other."""
        clocks = [each.clock for each in self.products]
        waits = zip(*(clock.least for clock in clocks), strict=True)
        known = np.array([clock.known for clock in clocks])[:, None]
        return Clock(known, clocks[0].layers, clocks[0].seconds, tuple(np.array(each)[:, None] for each in waits))

    def may_fit(self, limits: Limits) -> Any:
        """Whether the least of everything fits: product × candidate."""
        if not self.products:
            return np.zeros((0, self.sums.shape[2]), dtype=bool)
        return self.scale.weigh(self.least, self.clock).fits(limits)

    def last_fitting(self, limits: Limits, below: int | None = None) -> int | None:
        """The last candidate at which any combination fits."""
        hopeful = np.flatnonzero(self.may_fit(limits).any(axis=0)[:below])
        return next((int(index) for index in hopeful[::-1] if self.any_fits(int(index), limits)), None)

    def any_fits(self, index: int, limits: Limits) -> bool:
        """Whether any combination fits at a candidate."""
        return self.cheapest(index, limits, (share,), first=True) is not None

    def cheapest(self, index: int, limits: Limits, key: Key, *, first: bool = False) -> Sum | None:
        """Of what fits at a candidate the least by a key; None where nothing fits.

        Args:
            first: take the first that fits.
        """
        if not self.products:
            return None
        weights = self.scale.weigh(self.least[:, :, index, None], self.clock)
        keys = [np.broadcast_to(measure(weights, limits), weights.high.shape).ravel() for measure in key]
        order = np.lexsort((np.arange(len(self.products)), *keys[::-1]))
        best: Sum | None = None
        for number in order[weights.fits(limits).ravel()[order]]:
            if best is not None and (first or tuple(float(column[number]) for column in keys) >= best.key):
                break
            search = _Search(self.products[number], self.sums[:, :, index], self.scale, limits, key)
            best = search.run(best, first=first) or best
        return best


class _Search:
    """The combinations of one product at one candidate."""

    def __init__(self, of: Product, sums: Values, scale: Scale, limits: Limits, key: Key) -> None:
        self.of, self.scale, self.limits, self.key = of, scale, limits, key
        self.sums = sums[of.places]
        least, most = (each.reduceat(self.sums, of.starts).sum(axis=0) for each in (np.minimum, np.maximum))
        never = [*_never_most(self.sums[:, CARD], of.starts), *_never_most(self.sums[:, HOST], of.starts)]
        self.columns = _that_matter(least, most, never, of.clock)

    def run(self, best: Sum | None, *, first: bool) -> Sum | None:
        """The least combination, where it is less than what was found before."""
        groups = self._unbeaten()
        alone = [int(group[0]) for group in groups if len(group) == 1]
        several = sorted((group for group in groups if len(group) > 1), key=self._spread, reverse=True)
        sums, taken = self.sums[alone].sum(axis=0)[None], np.zeros((1, 0), dtype=np.int64)
        rest = np.zeros((len(several) + 1, self.sums.shape[1]))
        for number in range(len(several) - 1, -1, -1):
            rest[number] = rest[number + 1] + self.sums[several[number]].min(axis=0)
        found = self._quickly(sums[0], alone, several, best) if several else None
        if first and found is not None:
            return found
        for number, group in enumerate(several, 1):
            many = len(sums)
            sums = (sums[:, None] + self.sums[group]).reshape(-1, sums.shape[1])
            taken = np.column_stack([np.repeat(taken, len(group), axis=0), np.tile(group, many)])
            if len(sums) > FEW and number < len(several):
                kept = self._hopeful(sums + rest[number], found or best)
                kept = kept[nondominated(sums[kept] @ self.columns)]
                sums, taken = sums[kept], taken[kept]
        return self._least(sums, alone, taken, found or best) or found

    def _unbeaten(self) -> list[Array]:
        """Of each group the places that no other of it beats in all columns that matter, by where they stand."""
        points = self.sums @ self.columns
        first, second = self.of.pairs
        no_more = (points[first] <= points[second]).all(axis=1)
        beats = no_more & ((first < second) | (points[first] < points[second]).any(axis=1))
        left = np.ones(len(points), dtype=bool)
        left[second[beats]] = False
        for start, group in zip(self.of.starts, self.of.groups, strict=True):
            if len(group) > SMALL:
                left[start : start + len(group)] = False
                left[start + nondominated(points[start : start + len(group)])] = True
        kept = np.flatnonzero(left)
        return np.split(kept, np.flatnonzero(np.diff(self.of.owner[kept])) + 1)

    def _spread(self, group: Array) -> float:
        """How much is at stake in a group: what differs most, in shares of the limits."""
        spans = np.ptp(self.sums[group], axis=0)
        shares = (
            spans[CARD].max() / max(1, self.limits.gpu_bytes),
            spans[HOST].max() / max(1, self.limits.host_bytes),
        )
        return float(max(shares))

    def _quickly(self, base: Values, alone: list[int], several: list[Array], best: Sum | None) -> Sum | None:
        """The best of a few combinations, each of the places that take least of one column."""
        taken = np.array(
            [[group[np.argmin(self.sums[group, column])] for group in several] for column in self._tight(base)]
        )
        return self._least(base + self.sums[taken].sum(axis=1), alone, taken, best)

    def _tight(self, base: Values) -> list[int]:
        """The columns that limits look at first, and those of time."""
        card, host = int(np.argmax(base[CARD])), HOST.start + int(np.argmax(base[HOST]))
        return [card, host, *range(BUSY.start, LINK.stop)]

    def _hopeful(self, sums: Values, best: Sum | None) -> Array:
        weights = self.scale.weigh(sums[:, :, None], self.of.clock)
        fits = weights.fits(self.limits)[:, 0]
        if best is not None:
            fits &= _less(self._keys(weights), best.key)
        return np.flatnonzero(fits)

    def _keys(self, weights: Weights) -> list[Any]:
        return [np.broadcast_to(measure(weights, self.limits), weights.high.shape)[:, 0] for measure in self.key]

    def _least(self, sums: Values, alone: list[int], taken: Array, best: Sum | None) -> Sum | None:
        weights = self.scale.weigh(sums[:, :, None], self.of.clock)
        keys, fits = self._keys(weights), np.flatnonzero(weights.fits(self.limits)[:, 0])
        if not len(fits):
            return None
        place = int(fits[np.lexsort([column[fits] for column in keys[::-1]])[0]])
        key = tuple(float(column[place]) for column in keys)
        if best is not None and key >= best.key:
            return None
        chosen = self.of.places[sorted([*alone, *map(int, taken[place])])] - self.of.offset
        return Sum(self.of.branch, tuple(map(int, chosen)), weights.at(place), key)


def _less(keys: Sequence[Any], best: tuple[float, ...]) -> Any:
    """Which rows are less than a key."""
    less, equal = np.zeros(len(keys[0]), dtype=bool), np.ones(len(keys[0]), dtype=bool)
    for column, value in zip(keys, best, strict=True):
        less |= equal & (column < value)
        equal &= column == value
    return less


def _never_most(sums: Values, starts: Array) -> list[bool]:
    """Of each column whether another is never less, whatever is combined."""
    more = np.maximum.reduceat(sums[:, :, None] - sums[:, None], starts).sum(axis=0)
    first = np.tri(len(more), k=-1, dtype=bool)  # of two that are always alike the first is kept
    return list(((more < 0) | ((more == 0) & (more.T == 0) & first) | ((more == 0) & (more.T > 0))).any(axis=1))


def _that_matter(least: Values, most: Values, never: Sequence[bool], clock: Clock) -> Values:
    """Columns that two parts of combinations are compared by: a matrix that takes them out of a sum.

    A phase that is never above another is never the peak. Where in a phase the link never is what one waits for,
    computing and copying add up; and where nothing is waited for but the launches, neither matters.
    """
    found = [_unit(column) for column, lower in enumerate(never) if not lower and most[column] > least[column]]
    linear = np.zeros(len(least))
    for busy, link, wait in zip(range(BUSY.start, BUSY.stop), range(LINK.start, LINK.stop), clock.least, strict=True):
        if max(most[busy], most[link]) + most[link] / clock.layers <= wait:
            continue
        if least[busy] >= most[link] and least[busy] + least[link] / clock.layers >= wait:
            linear[busy], linear[link] = 1.0, 1 / clock.layers
        else:
            found += [_unit(column) for column in (busy, link) if most[column] > least[column]]
    return np.column_stack([*found, linear, _unit(INEXACT), _unit(COUNT)])


def _unit(column: int) -> Values:
    found = np.zeros(COUNT + 1)
    found[column] = 1.0
    return found
