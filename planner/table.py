"""Everything there is to choose from as one table: what each place of each branch adds to bytes and work.

A *place* is a trunk, or one option of a group with one value for each of its dials. At some candidates the table gives
for each place what it adds to bytes in each phase, on the card and in the host, to bytes on the disk, and to the work
of each *lane*: what adds up to seconds of its own (`planner.timecost.PARTS`) and a kind of work. A configuration is the
sum of one place from each group of its branch, and nothing else is needed to compare it: limits look at sums of bytes,
time is a function of sums of work.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import islice, product
from math import prod
from typing import NamedTuple

import numpy as np

from planner.branches import Branch
from planner.evaluate import Array
from planner.groups import Dial, Option, Row, read_by
from planner.ledger import WHILE_TRAINING, Device, Phase, Term, Work
from planner.model_shape import ModelShape
from planner.optimizations import all_optimizations
from planner.patterns import Added, Patterns
from planner.rates import KINDS, ON_DISK, TO_DEVICE, TO_HOST, kind_of
from planner.rates import LAUNCH as LAUNCHES
from planner.rows import OneFormula, Rows, Turn, Values
from planner.timecost import AHEAD, BUSY, EXPOSED, INWARD, LAUNCHED, OUTWARD, PARTS, TIMED, part_of

PHASES = tuple(Phase)
_KINDS_OF = {
    BUSY: ("linear", "attention", "memory"),
    INWARD: (TO_DEVICE,),
    OUTWARD: (TO_HOST,),
    EXPOSED: (TO_DEVICE, TO_HOST),
    AHEAD: (TO_DEVICE, ON_DISK),
    LAUNCHED: (LAUNCHES,),
}
LANES = tuple((part, kind) for part in PARTS for kind in _KINDS_OF[part[0]])
_LANE = {lane: number for number, lane in enumerate(LANES)}
CARD, HOST = slice(0, len(PHASES)), slice(len(PHASES), 2 * len(PHASES))
DISK = HOST.stop  # bytes on the disk while it trains; what a run leaves there is no part of it
BYTES = slice(0, DISK + 1)
WORK = slice(DISK + 1, DISK + 1 + len(LANES))
COLUMNS = WORK.stop
Columns = tuple[int, ...]


@dataclass(frozen=True)
class Places:
    """The places of one option: one for each combination of its dials' values, the last dial's varying fastest."""

    branch: int
    first: int
    option: Option

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """How many values each dial has."""
        return tuple(len(dial.values) for dial in self.option.dials)

    @cached_property
    def range(self) -> range:
        """Its places."""
        return range(self.first, self.first + prod(self.shape))

    def values(self, place: int) -> dict[Dial, int]:
        """The value of each dial at one of the places."""
        steps = np.unravel_index(place - self.first, self.shape) if self.shape else ()
        return {dial: dial.values[int(step)] for dial, step in zip(self.option.dials, steps, strict=True)}


@dataclass(frozen=True, eq=False)
class _Looked:
    """A row's columns, its formula, and the kind of work that it is, if it is any; told apart by identity."""

    columns: Columns
    formula: OneFormula
    kind: str | None


class _Come(NamedTuple):
    """A row that an option brings, how it turns with the option's dials, and the number of its entry."""

    looked: _Looked
    turn: Turn | None
    entry: int


class Table:
    """The places of all branches, and which rows of formulas each of them adds up (`planner.patterns`)."""

    def __init__(self, branches: Sequence[Branch], model: ModelShape) -> None:
        self.branches, self.rows = tuple(branches), Rows(model)
        self.groups: list[list[list[Places]]] = []  # by branch, by group; the first group is the trunk alone
        self.added = Patterns(COLUMNS)
        self._looked: dict[int, _Looked] = {}  # by the identity of rows, which the branches hold
        self._alike: dict[tuple[Columns, OneFormula, str | None], _Looked] = {}  # one for all rows that are alike
        self._kinds_by_come: dict[int, tuple[bool, ...]] = {}  # by the identity of what an option brings
        self._turns: dict[tuple[Dial, ...], dict[OneFormula, Turn | None]] = {}  # of each formula with some dials
        self._entries: dict[tuple[_Looked, Turn | None, object], _Come] = {}
        self._first_patterns: list[int] = []
        self.many = 0
        come: dict[int, list[list[_Come]]] = {}  # what each option brings, by the identity of its branch
        for number, branch in enumerate(self.branches):
            trunk = branch.trunk
            rows: tuple[Row, ...] = (*trunk.ledger.terms.values(), *trunk.ledger.work.values())
            groups = ((Option((), (), trunk.letters, (), rows),), *branch.groups)
            options, ids = [each for group in groups for each in group], [branch.ids]
            ids += [option.ids for option in options[1:]]
            if branch.like is None:
                brought = [self._brought(option) for option in options]
            else:
                moved = {each for each in self.rows.formulas() if not branch.renamed.isdisjoint(each.reads)}
                pairs = zip(options, come[id(branch.like)], strict=True)
                brought = [self._renamed(option, like, moved) for option, like in pairs]
            come[id(branch)] = brought
            counted = (row for row in rows if self._look(row).columns)
            gone = {id(row): self.added.opposite(each.entry) for row, each in zip(counted, brought[0], strict=True)}
            placed = iter([self._placed(number, *each, gone) for each in zip(options, brought, ids, strict=True)])
            self.groups.append([list(islice(placed, len(group))) for group in groups])
        self.options = [places for branch in self.groups for group in branch for places in group]
        self._firsts = np.array([places.first for places in self.options])
        self._group_options = np.cumsum([0, *(len(group) for branch in self.groups for group in branch)])[:-1]
        self._branch_firsts = np.cumsum([0, *(len(branch) for branch in self.groups)])[:-1]
        many = [len(places.range) for places in self.options]
        self.kinds = np.repeat([self._kinds(places) for places in self.options], many, axis=0)
        self.pattern = np.arange(self.many) + np.repeat(np.array(self._first_patterns) - self._firsts, many)
        self.added.close()
        self.options_of_patterns = self.added.options(self._first_patterns)  # of each option, its row in least

    def _placed(
        self, branch: int, option: Option, come: Sequence[_Come], ids: Sequence[str], gone: Mapping[int, int]
    ) -> Places:
        """The places of an option.

        Args:
            come: what it brings.
            ids: what is on in it, or in its trunk where it is that.
            gone: the number of the entry that takes a row of the trunk away, by the row's identity.
        """
        places = Places(branch, self.many, option)
        self.many += len(places.range)
        known = all_optimizations()
        inexact = sum(known[name].harm for name in ids if not known[name].exact)
        added = [gone[id(row)] for row in option.gone if id(row) in gone]  # the others are in no column
        added += [each.entry for each in come]
        self._first_patterns.append(self.added.add(places.shape, float(inexact), added))
        return places

    def _brought(self, option: Option) -> list[_Come]:
        """What an option brings, save what is in no column."""
        values = {dial.letter: dial.values for dial in option.dials}
        turns = self._turns.setdefault(option.dials, {})
        letters, looked_at, brought = option.letters, self._looked, list[_Come]()
        for row in option.come:  # tens of thousands of them
            looked = looked_at.get(id(row)) or self._look(row)
            if looked.columns:
                formula = looked.formula
                if formula not in turns:
                    turns[formula] = Turn.of(formula.reads, values)
                brought.append(self._entry_of(looked, turns[formula], letters))
        return brought

    def _renamed(self, option: Option, like: Sequence[_Come], moved: Set[OneFormula]) -> list[_Come]:
        """The same of an option that differs from another in letters that some formulas read."""
        return [
            self._entry_of(row.looked, row.turn, option.letters) if row.looked.formula in moved else row for row in like
        ]

    def _entry_of(self, looked: _Looked, turn: Turn | None, letters: Mapping[str, int]) -> _Come:
        """A row as an option brings it; what reads the same of the letters is the same in all of them."""
        formula = looked.formula
        key = looked, turn, (formula if turn is None else turn).chosen(letters)
        if (found := self._entries.get(key)) is None:
            if turn is None:
                entry = self.added.entry(looked.columns, self.rows.number(formula, letters), 1)
            else:
                numbers = self.rows.numbers(formula, letters, turn)
                entry = self.added.entry_of_dials(Added(looked.columns, turn.shape, numbers, 1))
            found = self._entries[key] = _Come(looked, turn, entry)
        return found

    def _look(self, row: Row) -> _Looked:
        """What is known of a row; most rows stand in many options."""
        if (found := self._looked.get(id(row))) is None:
            like: tuple[Columns, OneFormula, str | None]
            if isinstance(row, Term):
                like = (_columns_of(row.phases, row.device), self.rows.of_term(row), None)
            else:
                like = (_lane(row), self.rows.of_amount(row.amount), kind_of(row))
            found = self._looked[id(row)] = self._alike.setdefault(like, _Looked(*like))
        return found

    def _kinds(self, places: Places) -> tuple[bool, ...]:
        """The kinds of work that an option has or adds; by these it is decided whether a time is known."""
        come = places.option.come
        if (found := self._kinds_by_come.get(id(come))) is None:
            kinds = {self._look(row).kind for row in come}
            found = self._kinds_by_come[id(come)] = tuple(kind in kinds for kind in KINDS)
        return found

    def cells(self, values: Values, without: Sequence[int] = ()) -> Values:
        """What each piece of patterns adds: cell × column, which places add up (`planner.patterns`).

        Bytes are whole numbers in float64, which holds them to the digit below 2^53.

        Args:
            values: every row at one candidate (`Rows.at`).
            without: rows that are taken to be nothing.
        """
        if without:
            values = values.copy()
            values[list(without)] = 0.0
        return self.added.cells(values)

    def rows_of_bytes(self, names: Set[str], letters: Set[str]) -> tuple[int, ...]:
        """The rows of terms with some names, or that read some letters; rows of the same formula are among them."""
        terms = {
            id(row): row
            for places in self.options
            for row in places.option.come
            if isinstance(row, Term) and (row.name in names or not letters.isdisjoint(read_by(row)))
        }
        formulas = {self.rows.of_term(term) for term in terms.values()}
        return tuple(sorted({number for formula in formulas for number in formula.numbers.values()}))

    def least_bytes(self, cells: Values) -> Values:
        """Bytes that no combination of a branch is below: branch × column of bytes, from cell × column."""
        least = self.added.least(cells[:, BYTES])
        of_groups = np.minimum.reduceat(least[self.options_of_patterns], self._group_options)
        return np.asarray(np.add.reduceat(of_groups, self._branch_firsts))

    def option_at(self, place: int) -> Places:
        """Whose place it is."""
        return self.options[int(self.numbers_of_options(np.array([place]))[0])]

    def numbers_of_options(self, places: Array) -> Array:
        """Of each place the number of its option."""
        return np.searchsorted(self._firsts, places, side="right") - 1

    def combinations(self, branch: int) -> Iterator[tuple[int, ...]]:
        """Every combination of one place from each group."""
        return product(*([place for places in group for place in places.range] for group in self.groups[branch]))


@cache
def _columns_of(phases: frozenset[Phase], device: Device) -> Columns:
    if device is Device.DISK:
        return (DISK,) if WHILE_TRAINING in phases else ()
    start = CARD.start if device is Device.GPU else HOST.start
    return tuple(start + place for place, phase in enumerate(PHASES) if phase in phases)


def _lane(work: Work) -> Columns:
    return (WORK.start + _LANE[part_of(work), kind_of(work)],) if work.phase in TIMED else ()
