"""Everything there is to choose from as one table: what each place of each branch adds to bytes and work.

A *place* is a trunk, or one option of a group with one value for each of its dials. At some candidates the table gives
for each place what it adds to bytes in each phase, on the card and in the host, to bytes on the disk, and to the work
of each *lane*: a phase that is timed and a kind of work. A configuration is the sum of one place from each group of its
branch, and nothing else is needed to compare it: limits look at sums of bytes, time is a function of sums of work.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product
from math import prod

import numpy as np

from planner.branches import Branch
from planner.evaluate import Array, Candidates
from planner.groups import Dial, Option, Row, read_by
from planner.ledger import WHILE_TRAINING, Device, Phase, Term, Work
from planner.model_shape import ModelShape
from planner.optimizations import all_optimizations
from planner.rates import KINDS, kind_of
from planner.rows import Rows, Values
from planner.timecost import TIMED

PHASES = tuple(Phase)
LANES = tuple(product(TIMED, KINDS))
CARD, HOST = slice(0, len(PHASES)), slice(len(PHASES), 2 * len(PHASES))
DISK = HOST.stop  # bytes on the disk while it trains; what a run leaves there is no part of it
WORK = slice(DISK + 1, DISK + 1 + len(LANES))
COLUMNS = WORK.stop


@dataclass(frozen=True)
class Places:
    """The places of one option: one for each combination of its dials' values, the last dial's varying fastest."""

    branch: int
    first: int
    option: Option

    @property
    def shape(self) -> tuple[int, ...]:
        """How many values each dial has."""
        return tuple(len(dial.values) for dial in self.option.dials)

    @property
    def range(self) -> range:
        """Its places."""
        return range(self.first, self.first + prod(self.shape))

    def values(self, place: int) -> dict[Dial, int]:
        """The value of each dial at one of the places."""
        steps = np.unravel_index(place - self.first, self.shape) if self.shape else ()
        return {dial: dial.values[int(step)] for dial, step in zip(self.option.dials, steps, strict=True)}


class Table:
    """The places of all branches, and which rows of formulas each of them adds up.

    Most options change the same on every branch. Places that add up the same rows are one *pattern*, evaluated once.
    """

    def __init__(self, branches: Sequence[Branch], model: ModelShape) -> None:
        self.branches, self.rows = tuple(branches), Rows(model)
        self.groups: list[list[list[Places]]] = []  # by branch, by group; the first group is the trunk alone
        self._single: list[tuple[int, int, int]] = []  # column of a pattern, row of formulas, sign
        self._several: list[Array] = []
        self._known: dict[object, int] = {}  # the first pattern of options that add up the same
        self._first_patterns: list[int] = []
        self._inexact: list[float] = []
        self.many, self.patterns = 0, 0
        for number, branch in enumerate(self.branches):
            trunk = branch.trunk
            rows: tuple[Row, ...] = (*trunk.ledger.terms.values(), *trunk.ledger.work.values())
            alone = Option((), (), trunk.letters, (), rows)
            self.groups.append([[self._placed(number, alone, trunk.letters, branch.ids)]])
            for group in branch.groups:
                self.groups[-1].append([self._placed(number, option, trunk.letters, option.ids) for option in group])
        self.options = [places for branch in self.groups for group in branch for places in group]
        self._firsts = np.array([places.first for places in self.options])
        many = [len(places.range) for places in self.options]
        self.inexact = np.array(self._inexact)  # of each pattern
        self.kinds = np.repeat([_kinds(places) for places in self.options], many, axis=0)
        self.pattern = np.arange(self.many) + np.repeat(np.array(self._first_patterns) - self._firsts, many)
        entries = np.concatenate([np.array(self._single, dtype=np.int64).reshape(-1, 3), *self._several])
        target, row, sign = entries[np.argsort(entries[:, 0], kind="stable")].T
        self._row, self._sign = row, sign.astype(np.float64)[:, None]
        self._target, self._starts = np.unique(target, return_index=True)

    def _placed(self, branch: int, option: Option, before: Mapping[str, int], ids: Sequence[str]) -> Places:
        places = Places(branch, self.many, option)
        self.many += len(places.range)
        rows = [(row, [self._place(row, before)], -1) for row in option.gone]
        rows += [(row, self._rows(row, option, places.shape), 1) for row in option.come]
        added = [(_columns(row), tuple(at), sign) for row, at, sign in rows]
        known = all_optimizations()
        inexact = sum(not known[name].exact for name in ids)
        key = (places.shape, inexact, tuple(added))
        if key not in self._known:
            self._known[key] = self.patterns
            for columns, at, sign in added:
                self._add(len(places.range), columns, at, sign)
            self.patterns += len(places.range)
            self._inexact += [float(inexact)] * len(places.range)
        self._first_patterns.append(self._known[key])
        return places

    def _rows(self, row: Row, option: Option, shape: tuple[int, ...]) -> list[int]:
        """The row of formulas at each place of an option, or one for all: only dials whose letters it reads count."""
        read = {*read_by(row)}.intersection(dial.letter for dial in option.dials)
        if not read:
            return [self._place(row, option.letters)]
        own = [range(len(dial.values)) if dial.letter in read else (0,) for dial in option.dials]
        found = []
        for at in product(*own):
            values = {dial.letter: dial.values[step] for dial, step in zip(option.dials, at, strict=True)}
            found.append(self._place(row, {**option.letters, **values}))
        small = np.array(found).reshape([len(each) for each in own])
        return [int(place) for place in np.broadcast_to(small, shape).ravel()]

    def _place(self, row: Row, letters: Mapping[str, int]) -> int:
        return self.rows.size(row, letters) if isinstance(row, Term) else self.rows.amount(row.amount, letters)

    def _add(self, many: int, columns: tuple[int, ...], rows: Sequence[int], sign: int) -> None:
        """Enter a row of formulas; ``rows`` is one for all places of the option, or one for each."""
        if many == 1:
            self._single += [(self.patterns * COLUMNS + column, rows[0], sign) for column in columns]
        elif columns:
            starts = np.arange(self.patterns, self.patterns + many) * COLUMNS
            targets = (starts[:, None] + np.array(columns)).ravel()
            at = np.repeat(np.broadcast_to(np.array(rows), many), len(columns))
            self._several.append(np.stack([targets, at, np.full(len(targets), sign)], axis=1))

    def at(self, candidates: Candidates, workspace: int) -> Values:
        """What each pattern adds: pattern × column × candidate.

        Bytes are whole numbers in float64, which holds them to the digit below 2^53.
        """
        values = self.rows.at(candidates, workspace)
        found = np.zeros((self.patterns * COLUMNS, values.shape[1]))
        if len(self._target):
            found[self._target] = np.add.reduceat(values[self._row] * self._sign, self._starts, axis=0)
        return found.reshape(self.patterns, COLUMNS, values.shape[1])

    def option_at(self, place: int) -> Places:
        """Whose place it is."""
        return self.options[int(np.searchsorted(self._firsts, place, side="right")) - 1]

    def combinations(self, branch: int) -> Iterator[tuple[int, ...]]:
        """Every combination of one place from each group."""
        return product(*([place for places in group for place in places.range] for group in self.groups[branch]))


def _kinds(places: Places) -> list[bool]:
    """The kinds of work that an option has or adds; by these it is decided whether a time is known."""
    found = {kind_of(row) for row in places.option.come if isinstance(row, Work)}
    return [kind in found for kind in KINDS]


def _columns(row: Row) -> tuple[int, ...]:
    return _columns_of(row.phases, row.device) if isinstance(row, Term) else _lane(row.phase, kind_of(row))


@cache
def _columns_of(phases: frozenset[Phase], device: Device) -> tuple[int, ...]:
    if device is Device.DISK:
        return (DISK,) if WHILE_TRAINING in phases else ()
    start = CARD.start if device is Device.GPU else HOST.start
    return tuple(start + place for place, phase in enumerate(PHASES) if phase in phases)


def _lane(phase: Phase, kind: str) -> tuple[int, ...]:
    return (WORK.start + LANES.index((phase, kind)),) if phase in TIMED else ()
