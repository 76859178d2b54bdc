"""A branch with the places that each of its groups may take, and its outline, by which most are left out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from planner.evaluate import Array
from planner.fronts import nondominated
from planner.rows import Values
from planner.table import Table
from planner.weighing import INEXACT, Clock

SMALL = 8  # places of a group that are compared with each other at once, in all such groups together


@dataclass(frozen=True)
class Outline:
    """A product in which each option stands for all of its places.

    Attributes:
        rows: where its options stand in ``Patterns.least``, each once for each group.
        starts: where each group begins; ``owner``: the group of each option.
    """

    clock: Clock
    rows: Array
    starts: Array
    owner: Array


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
    def outline(self) -> Outline:
        """The same by its options."""
        numbers = self.table.numbers_of_options(self.places)
        first = np.append(True, (numbers[1:] != numbers[:-1]) | (self.owner[1:] != self.owner[:-1]))
        owner = self.owner[first]
        rows = self.table.options_of_patterns[numbers[first]]
        return Outline(self.clock, rows, np.searchsorted(owner, np.arange(len(self.groups))), owner)

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
