"""Everything there is to choose from, evaluated together: bytes once for all cards of a kind, limits afterwards."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from math import prod

import numpy as np

from planner.branches import Branch
from planner.compose import Configuration, compose
from planner.evaluate import Candidates
from planner.groups import Dial
from planner.optimizations import all_optimizations
from planner.optimizations.base import Scalar, Situation
from planner.rows import Values
from planner.sets import PinnedKnobs
from planner.table import Table

Rows = tuple[int, ...]
KEPT = 8  # sets of candidates that are kept: the wanted lengths, and where the search for the longest begins


class Space:
    """The branches of one question, with every formula evaluated once at each set of candidates."""

    def __init__(self, branches: Sequence[Branch], situation: Situation, knobs: PinnedKnobs | None = None) -> None:
        self.branches, self.situation, self.knobs = tuple(branches), situation, knobs or {}
        self.table = Table(self.branches, situation.model)
        self._kept: dict[tuple[object, ...], _Kept] = {}
        self._saved: dict[str, Rows] = {}

    @classmethod
    def of(cls, configurations: Iterable[Configuration], situation: Situation) -> Space:
        """A space of these configurations, each a branch of its own."""
        return cls([Branch(configuration, (), ()) for configuration in configurations], situation)

    @cached_property
    def names(self) -> frozenset[str]:
        """Every optimisation that is in any set."""
        leaves = {name for places in self.table.options for name in places.option.ids}
        return frozenset(leaves.union(name for branch in self.branches for name in branch.ids))

    @property
    def size(self) -> int:
        """How many configurations there are."""
        return sum(prod(sum(len(places.range) for places in group) for group in branch) for branch in self.table.groups)

    def is_leaf(self, name: str) -> bool:
        """Whether an optimisation is chosen in a group of a branch, and not by the branch itself."""
        return any(name in places.option.ids for places in self.table.options)

    def ids(self, branch: int, places: Iterable[int]) -> tuple[str, ...]:
        """The optimisations of a combination."""
        leaves = (name for place in places for name in self.table.option_at(place).option.ids)
        return tuple(sorted((*self.branches[branch].ids, *leaves)))

    def configuration(self, branch: int, places: Iterable[int]) -> Configuration:
        """A combination of a place from each group of a branch."""
        values = [(self.table.option_at(place), place) for place in places]
        dials: dict[Dial, int] = {d: value for option, place in values for d, value in option.values(place).items()}
        trunk = self.branches[branch].trunk
        ids = (*trunk.ids, *(name for option, _ in values for name in option.option.ids))
        whole = compose(ids, self.knobs, self.situation, onto=trunk)
        knobs: dict[str, dict[str, Scalar]] = {name: dict(chosen) for name, chosen in whole.knobs.items()}
        for dial, value in dials.items():
            knobs[dial.owner][dial.knob] = value
        # A knob with a letter does no more than give the letter its value.
        letters = {**whole.letters, **{dial.letter: value for dial, value in dials.items()}}
        return replace(whole, knobs=knobs, letters=letters)

    def configurations(self) -> Iterator[Configuration]:
        """Every one there is."""
        for number in range(len(self.branches)):
            for places in self.table.combinations(number):
                yield self.configuration(number, places)

    def at(self, candidates: Candidates, index: int, workspace: int, without: Rows = ()) -> Values:
        """What pieces of patterns add to bytes and work at one of some candidates: cell × column (``Table.cells``).

        Kept, since cards of a kind share it.

        Args:
            workspace: bytes of the cuBLAS workspace on this kind of card.
            without: rows that are taken to be nothing.
        """
        return self._at(candidates, workspace).cells(index, without)

    def least_bytes(self, candidates: Candidates, index: int, workspace: int, without: Rows = ()) -> Values:
        """Bytes that no combination of a branch is below at one of some candidates: branch × column of bytes."""
        return self._at(candidates, workspace).least_bytes(index, without)

    def least(self, candidates: Candidates, index: int, workspace: int, without: Rows = ()) -> Values:
        """What no place of an option is below at one of some candidates (`Patterns.least`)."""
        return self._at(candidates, workspace).least(index, without)

    def saved_by(self, name: str) -> Rows:
        """The rows of bytes that an optimisation claims, or of which it claims a letter: it saves no more."""
        if name not in self._saved:
            claims = all_optimizations()[name].claims
            names = {claim.rpartition(".")[0] for claim in claims if "." in claim}
            letters = {claim.removeprefix("letter ") for claim in claims if claim.startswith("letter ")}
            self._saved[name] = self.table.rows_of_bytes(names, letters)
        return self._saved[name]

    def _at(self, candidates: Candidates, workspace: int) -> _Kept:
        key = (candidates.key, workspace)
        found = self._kept.pop(key, None) or _Kept(self.table, self.table.rows.at(candidates, workspace))
        self._kept[key] = found
        if len(self._kept) > KEPT:  # the one that has not been asked for longest
            self._kept.pop(next(iter(self._kept)))
        return found


class _Kept:
    """What is known of a table at some candidates: the value of each row, row × candidate, and what comes of it.

    It comes of one candidate after the other: a search looks at few of them.
    """

    def __init__(self, table: Table, values: Values) -> None:
        self._table, self._values = table, np.ascontiguousarray(values.T)
        self._cells: dict[tuple[int, Rows], Values] = {}
        self._least: dict[tuple[int, Rows], Values] = {}
        self._least_bytes: dict[tuple[int, Rows], Values] = {}

    def cells(self, index: int, without: Rows) -> Values:
        """``Table.cells`` at one of the candidates."""
        key = (index, without)
        if key not in self._cells:
            self._cells[key] = self._table.cells(self._values[index], without)
        return self._cells[key]

    def least_bytes(self, index: int, without: Rows) -> Values:
        """``Table.least_bytes`` at one of the candidates."""
        key = (index, without)
        if key not in self._least_bytes:
            self._least_bytes[key] = self._table.least_bytes(self.cells(index, without))
        return self._least_bytes[key]

    def least(self, index: int, without: Rows) -> Values:
        """``Patterns.least`` at one of the candidates."""
        key = (index, without)
        if key not in self._least:
            self._least[key] = self._table.added.least(self.cells(index, without))
        return self._least[key]
