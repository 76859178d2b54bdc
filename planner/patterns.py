"""What options add to bytes and work: sums of rows of formulas, each made once.

Most options change the same on every branch. Places that add up the same rows are one *pattern*. The places of an
option with dials differ in few of their rows: most read no dial, or one. So rows that read the same dials are summed
for the values of these alone, a *piece*, whose sums are *cells*; a place adds up one cell of each piece of its option.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain
from math import prod
from typing import NamedTuple

import numpy as np

from planner.evaluate import Array
from planner.rows import Values

Shape = tuple[int, ...]


class Added(NamedTuple):
    """Rows of formulas that places add, or take away.

    Attributes:
        columns: to which columns.
        shape: how many values each dial of the option has, 1 where the rows do not read it; () where they read none.
        rows: the row for each combination of these, the last dial's varying fastest.
        sign: 1, or -1 where they are taken away.
    """

    columns: tuple[int, ...]
    shape: Shape
    rows: tuple[int, ...]
    sign: int


class Patterns:
    """All patterns, and the pieces that they are made of."""

    def __init__(self, width: int) -> None:
        self.width, self.count = width, 0
        self._first: dict[object, int] = {}
        self._inexact: list[float] = []
        self._numbers: dict[object, int] = {}  # each entry once: patterns and pieces are told apart by numbers
        self._added: list[Added] = []
        self._cells, self._number = 0, dict[tuple[int, ...], int]()  # each piece by its entries
        self._starts_of_pieces: list[int] = []  # the first cell of each
        self.inexact = self.inexact_of_options = np.zeros(0)
        self._pieces: dict[int, list[int]] = {}  # the pieces of an option, by its first pattern
        self._shapes: list[tuple[Shape, list[Shape]]] = []  # of each option, and of its pieces

    def __len__(self) -> int:
        """How many options there are whose places are told apart: those of ``least``."""
        return len(self._pieces)

    def entry(self, columns: tuple[int, ...], row: int, sign: int) -> int:
        """The number of one row that reads no dial (``Added``)."""
        key = (columns, row, sign)
        if (number := self._numbers.get(key)) is None:
            number = self._numbers[key] = len(self._added)
            self._added.append(Added(columns, (), (row,), sign))
        return number

    def opposite(self, entry: int) -> int:
        """The number of what takes away what an entry of one row adds."""
        columns, _, (row,), sign = self._added[entry]
        return self.entry(columns, row, -sign)

    def entry_of_dials(self, added: Added) -> int:
        """The number of rows that read dials."""
        if (number := self._numbers.get(added)) is None:
            number = self._numbers[added] = len(self._added)
            self._added.append(added)
        return number

    def add(self, shape: Shape, inexact: float, entries: Sequence[int]) -> int:
        """The first of the patterns of an option, one for each combination of its dials' values.

        Args:
            inexact: how many of its optimisations change the result.
            entries: what they add (``entry``).
        """
        key = (shape, inexact, tuple(entries))
        if key not in self._first:
            self._first[key] = self.count
            pieces: dict[Shape, list[int]] = {}
            for number in entries:
                pieces.setdefault(self._added[number].shape, []).append(number)
            self._pieces[self.count] = [self._placed(tuple(of_one)) for of_one in pieces.values()]
            self._shapes.append((shape, [own or (1,) * len(shape) for own in pieces]))
            self.count += prod(shape)
            self._inexact += [inexact] * prod(shape)
        return self._first[key]

    def _placed(self, piece: tuple[int, ...]) -> int:
        """The number of a piece."""
        if piece not in self._number:
            self._number[piece] = len(self._starts_of_pieces)
            self._starts_of_pieces.append(self._cells)
            self._cells += len(self._added[piece[0]].rows)
        return self._number[piece]

    def close(self) -> None:
        """All are there."""
        self._sum_rows()
        self._lay_out()
        self.inexact = np.array(self._inexact)
        self.inexact_of_options = self.inexact[[*self._pieces]]

    def _sum_rows(self) -> None:
        """Which rows each column of each cell sums up."""
        columns_of = {columns: number for number, columns in enumerate({each.columns: 0 for each in self._added})}
        columns, many = _flat(columns_of)
        rows, lengths = _flat(each.rows for each in self._added)
        starts = np.cumsum(lengths) - lengths
        # Every entry of every piece, and then every row of each of them, from its piece's first cell on.
        entry, of_piece = _flat(self._number)
        first = np.repeat(np.array(self._starts_of_pieces, dtype=np.int64), of_piece)
        within, entry_of_row = _within(lengths[entry]), np.repeat(entry, lengths[entry])
        cell = np.repeat(first, lengths[entry]) + within
        row = rows[starts[entry_of_row] + within]
        kind = np.array([columns_of[each.columns] for each in self._added], dtype=np.int64)[entry_of_row]
        sign = np.array([each.sign for each in self._added], dtype=np.int64)[entry_of_row]
        # Each of these once for each of its columns: those of one kind stand one after the other.
        each = np.repeat(np.arange(len(cell)), many[kind])
        target = cell[each] * self.width + columns[(np.cumsum(many) - many)[kind[each]] + _within(many[kind])]
        order = np.lexsort((sign[each], row[each], target))
        self._row, self._sign = row[each][order], sign[each][order].astype(np.float64)
        self._target, self._starts = np.unique(target[order], return_index=True)

    def _lay_out(self) -> None:
        """The pieces of each option, and the cells of each pattern; where there are none, a piece of nothing."""
        nothing = len(self._starts_of_pieces)
        self._starts_of_pieces.append(self._cells)
        self._cells += 1
        summed = [numbers or [nothing] for numbers in self._pieces.values()]
        self._summed = np.array([number for numbers in summed for number in numbers], dtype=np.int64)
        self._sums = np.cumsum([0, *map(len, summed)])[:-1]
        self._option = {first: place for place, first in enumerate(self._pieces)}
        # The cells of each pattern: piece × pattern, of nothing where another has more pieces.
        self._taken = np.full((max(map(len, summed), default=1), self.count), self._cells - 1)
        for first, (shape, own), numbers in zip(self._pieces, self._shapes, summed, strict=True):
            for taken, of_one, number in zip(self._taken, own, numbers, strict=False):
                cells = self._starts_of_pieces[number] + np.arange(prod(of_one)).reshape(of_one)
                taken[first : first + prod(shape)].reshape(shape)[...] = cells

    def sums(self, cells: Values, patterns: Array) -> Values:
        """What some patterns add up: pattern × column, from cell × column."""
        first, *others = self._taken.take(patterns, axis=1)
        found: Values = cells.take(first, axis=0)
        added = np.empty_like(found)
        for piece in others:
            found += cells.take(piece, axis=0, out=added, mode="clip")  # else it is taken elsewhere first, and copied
        return found

    def cells(self, values: Values) -> Values:
        """What each cell adds, from the value of every row at one candidate: cell × column."""
        found = np.zeros(self._cells * self.width)
        found[self._target] = np.add.reduceat(values.take(self._row) * self._sign, self._starts)
        return found.reshape(-1, self.width)

    def options(self, firsts: Sequence[int]) -> Array:
        """Where options stand in ``least``, by the first of their patterns."""
        return np.array([self._option[first] for first in firsts], dtype=np.int64)

    def least(self, cells: Values) -> Values:
        """What no pattern of an option is below: option × column, from cell × column.

        Approximate: each piece takes its own least, which another value of a dial may have than the next one's.
        """
        of_pieces = np.minimum.reduceat(cells, self._starts_of_pieces)
        return np.asarray(np.add.reduceat(of_pieces[self._summed], self._sums))


def _flat(several: Iterable[Sequence[int]]) -> tuple[Array, Array]:
    """Numbers of all, one after the other, and how many each has."""
    lists = [*several]
    lengths = np.array([len(each) for each in lists], dtype=np.int64)
    return np.fromiter(chain.from_iterable(lists), dtype=np.int64, count=int(lengths.sum())), lengths


def _within(lengths: Array) -> Array:
    """From 0 on within each of some lengths."""
    ends = np.cumsum(lengths)
    return np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - lengths, lengths)
