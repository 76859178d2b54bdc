"""Everything there is to choose from as one table: what each place of each branch adds to bytes and work.

A *place* is a trunk, or one option of a group with one value for each of its dials. At some candidates the table gives
for each place what it adds to bytes in each phase, on the card and in the host, to bytes on the disk, and to the work
of each *lane*: what adds up to seconds of its own (`planner.timecost.PARTS`) and a kind of work. A configuration is the
sum of one place from each group of its branch, and nothing else is needed to compare it: limits look at sums of bytes,
time is a function of sums of work.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import product
from math import prod

import numpy as np

from planner.branches import Branch
from planner.evaluate import Candidates
from planner.groups import Dial, Option, Row, read_by
from planner.ledger import WHILE_TRAINING, Device, Phase, Term, Work
from planner.model_shape import ModelShape
from planner.optimizations import all_optimizations
from planner.patterns import Patterns, Shape
from planner.rates import KINDS, ON_DISK, TO_DEVICE, TO_HOST, kind_of
from planner.rates import LAUNCH as LAUNCHES
from planner.rows import Rows, Values
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
WORK = slice(DISK + 1, DISK + 1 + len(LANES))
COLUMNS = WORK.stop


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


class Table:
    """The places of all branches, and which rows of formulas each of them adds up (`planner.patterns`)."""

    def __init__(self, branches: Sequence[Branch], model: ModelShape) -> None:
        self.branches, self.rows = tuple(branches), Rows(model)
        self.groups: list[list[list[Places]]] = []  # by branch, by group; the first group is the trunk alone
        self.added = Patterns(COLUMNS)
        self._first_patterns: list[int] = []
        self.many = 0
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
        self.inexact, self.patterns = self.added.inexact, self.added.count
        self.kinds = np.repeat([_kinds(places) for places in self.options], many, axis=0)
        self.pattern = np.arange(self.many) + np.repeat(np.array(self._first_patterns) - self._firsts, many)
        self.added.close()

    def _placed(self, branch: int, option: Option, before: Mapping[str, int], ids: Sequence[str]) -> Places:
        places = Places(branch, self.many, option)
        self.many += len(places.range)
        alike = (1,) * len(places.shape)
        added = [self.added.entry(_columns(row), alike, (self._place(row, before),), -1) for row in option.gone]
        added += [self.added.entry(_columns(row), *self._rows(row, option, alike), 1) for row in option.come]
        known = all_optimizations()
        inexact = sum(not known[name].exact for name in ids)
        self._first_patterns.append(self.added.add(places.shape, float(inexact), added))
        return places

    def _rows(self, row: Row, option: Option, alike: Shape) -> tuple[Shape, tuple[int, ...]]:
        """The rows of formulas at all values of the dials whose letters it reads, and how many each dial has."""
        read = read_by(row)
        turned = {dial.letter: dial.values for dial in option.dials if dial.letter in read}
        if not turned:
            return alike, (self._place(row, option.letters),)
        own = tuple(len(dial.values) if dial.letter in turned else 1 for dial in option.dials)
        if isinstance(row, Term):
            return own, self.rows.sizes(row, option.letters, turned)
        return own, self.rows.amounts(row.amount, option.letters, turned)

    def _place(self, row: Row, letters: Mapping[str, int]) -> int:
        return self.rows.size(row, letters) if isinstance(row, Term) else self.rows.amount(row.amount, letters)

    def at(self, candidates: Candidates, workspace: int) -> Values:
        """What each piece of patterns adds: cell × column × candidate, to be spread (`planner.patterns`).

        Bytes are whole numbers in float64, which holds them to the digit below 2^53.
        """
        return self.added.cells(self.rows.at(candidates, workspace))

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
    return _columns_of(row.phases, row.device) if isinstance(row, Term) else _lane(row)


@cache
def _columns_of(phases: frozenset[Phase], device: Device) -> tuple[int, ...]:
    if device is Device.DISK:
        return (DISK,) if WHILE_TRAINING in phases else ()
    start = CARD.start if device is Device.GPU else HOST.start
    return tuple(start + place for place, phase in enumerate(PHASES) if phase in phases)


def _lane(work: Work) -> tuple[int, ...]:
    return (WORK.start + _LANE[part_of(work), kind_of(work)],) if work.phase in TIMED else ()
