"""The least of all combinations of some products at one candidate.

A *product* is a branch with the places that each of its groups may take. Most products are left out without summing up
their places: by the least of each column, all at once; and by their outline, in which each option stands for all of its
places, as the least of them. Exact, since only what cannot be better is left out. What is sought first is a cap for
what is sought then.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cache

import numpy as np

from planner.evaluate import Limits
from planner.fields import Bounds, Field, Sum
from planner.products import Product
from planner.rows import Values
from planner.weighing import Caps, Clock, Key, Measure, Weights


class Stack:
    """Products one above the other, so that what none of their combinations is below is found at once.

    Approximate: where values of a knob change several things, each of these takes its own least.
    """

    def __init__(self, products: Iterable[Product]) -> None:
        self.products = tuple(products)
        clocks = {each.clock.key: each.clock for each in self.products}
        self._clocks, numbers = tuple(clocks.values()), {key: number for number, key in enumerate(clocks)}
        rows = [numbers[each.clock.key] * len(each.table.added) + each.outline.rows for each in self.products]
        ends = np.cumsum([0, *map(len, rows)])
        self._rows = np.concatenate(rows)
        starts = [each.outline.starts + end for each, end in zip(self.products, ends[:-1], strict=True)]
        self._groups = np.concatenate(starts)
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
        field_of: the field of each of them, where it is needed; ``outline_of``: its outline's bounds, which cost less.
    """

    def __init__(
        self, least: Weights, field_of: Callable[[int], Field], outline_of: Callable[[int], Bounds] | None = None
    ) -> None:
        self.least_weights, self._field_of = least, field_of
        self._outline_of = None if outline_of is None else cache(outline_of)
        self._fields: dict[int, Field] = {}

    def field(self, number: int) -> Field:
        """The field of a product, kept."""
        if number not in self._fields:
            self._fields[number] = self._field_of(number)
        return self._fields[number]

    def _may_hold(self, number: int, caps: Caps, measure: Measure, below: float) -> bool:
        """Whether a product is worth the summing up of its places, if that is not done yet."""
        if number in self._fields or self._outline_of is None:
            return True
        return self._outline_of(number).may_hold(caps, measure, below)

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
        known = np.broadcast_to(weights.known, weights.high.shape).ravel()
        held = np.where(weights.known, caps[True].hold(weights), caps[False].hold(weights)).ravel()
        values = np.broadcast_to(measure.of(weights), weights.high.shape).ravel()
        below = float("inf") if best is None else float(measure.of(best.weights))
        for number in np.argsort(values, kind="stable"):
            if not held[number]:
                continue
            if not values[number] < below:
                break
            own = caps[bool(known[number])]
            if not self._may_hold(int(number), own, measure, below):
                continue
            found = self.field(int(number)).search(own, measure, below, first=first)
            if found is not None:
                best, below = found, float(measure.of(found.weights))
                if first:
                    break
        return best
