"""Formulas as rows of one table: each is computed once for each value of the letters that it reads."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import product
from typing import Any

import numpy as np

from planner.adapter_matrices import adapter_letters
from planner.evaluate import ENDLESS, Candidates, letters_read
from planner.ledger import Formula, Term
from planner.model import ModelShape
from planner.symbols import Letters, Number, letters_of

Values = np.ndarray[Any, np.dtype[np.float64]]
Turned = Mapping[str, tuple[int, ...]]
"""Letters that take several values, in order of their dials."""


class OneFormula:
    """One formula with all values that its letters have somewhere: they are computed together.

    A formula of a handful of letters is read by some ten rows; as one array they cost little more than one of them.
    """

    def __init__(self, row: Term | Formula, reads: tuple[str, ...]) -> None:
        self.row, self.reads = row, reads
        self.numbers: dict[tuple[int | None, ...], int] = {}  # from values of the letters to the number of the row
        self.turned: dict[object, tuple[int, ...]] = {}  # rows where some letters take several values
        self._columns: tuple[int, dict[str, Number]] = (0, {})

    def columns(self) -> dict[str, Number]:
        """Each letter: a whole number where all rows have the same, else row × 1; those of the run are none of them."""
        if self._columns[0] != len(self.numbers):
            found: dict[str, Number] = {}
            for name, values in zip(self.reads, zip(*self.numbers, strict=True), strict=True):
                if values[0] is not None:
                    alike = all(value == values[0] for value in values)
                    found[name] = values[0] if alike else np.array(values, dtype=np.int64)[:, None]
            self._columns = len(self.numbers), found
        return self._columns[1]


class Rows:
    """The table. Bytes are whole numbers in float64, which holds them to the digit below 2^53."""

    def __init__(self, model: ModelShape) -> None:
        self._model = model
        self._formulas: dict[object, OneFormula] = {}
        self.count = 0

    def formulas(self) -> Iterable[OneFormula]:
        """Every formula there is."""
        return self._formulas.values()

    def size(self, term: Term, letters: Mapping[str, int]) -> int:
        """The row of a term's bytes."""
        (number,) = self.sizes(term, letters, {})
        return number

    def amount(self, formula: Formula, letters: Mapping[str, int]) -> int:
        """The row of an amount of work."""
        (number,) = self.amounts(formula, letters, {})
        return number

    def sizes(self, term: Term, letters: Mapping[str, int], turned: Turned) -> tuple[int, ...]:
        """The rows of a term's bytes at each combination of values of some letters, the last one's varying fastest."""
        key = (term.count, term.bits)
        if key not in self._formulas:
            self._formulas[key] = OneFormula(term, letters_read(*key))
        return self._placed(self._formulas[key], letters, turned)

    def amounts(self, formula: Formula, letters: Mapping[str, int], turned: Turned) -> tuple[int, ...]:
        """The rows of an amount of work, likewise."""
        if formula not in self._formulas:
            self._formulas[formula] = OneFormula(formula, letters_of(formula))
        return self._placed(self._formulas[formula], letters, turned)

    def _placed(self, at: OneFormula, letters: Mapping[str, int], turned: Turned) -> tuple[int, ...]:
        if not turned:
            return (self._number(at, tuple(map(letters.get, at.reads))),)
        fixed = [None if name in turned else letters.get(name) for name in at.reads]
        key = (*fixed, *turned.items())
        if key not in at.turned:
            order = [*turned]
            where = [order.index(name) if name in turned else -1 for name in at.reads]
            at.turned[key] = tuple(
                self._number(at, tuple([value if n < 0 else chosen[n] for n, value in zip(where, fixed, strict=True)]))
                for chosen in product(*turned.values())
            )
        return at.turned[key]

    def _number(self, at: OneFormula, values: tuple[int | None, ...]) -> int:
        if (number := at.numbers.get(values)) is None:
            number = at.numbers[values] = self.count
            self.count += 1
        return number

    def at(self, candidates: Candidates, workspace: int) -> Values:
        """Every row at every candidate: row × candidate."""
        ranked = adapter_letters(self._model, candidates.rank)
        shared: dict[str, Number] = {"B": candidates.batch, "Z": workspace}
        tokens: dict[str, Number] = {"S": candidates.total, "T": candidates.target}
        several = shared | ranked | tokens
        alone = several
        if len(candidates.total) == 1:  # whole numbers are several times as fast as arrays of one
            alone = shared | {name: int(np.ravel(size)[0]) for name, size in (ranked | tokens).items()}
        values = np.empty((self.count, len(candidates.total)))
        for formula in self._formulas.values():
            columns, row = formula.columns(), formula.row
            # Whole numbers have no end, but make an error of what leaves the 64 bits of an array beside them.
            run = alone if all(type(value) is int for value in columns.values()) else several
            exact = Letters(**{**columns, **run})
            if isinstance(row, Term) and run is not several:
                values[[*formula.numbers.values()]] = min(row.bytes(exact), ENDLESS)
                continue
            broad = Letters(**{**vars(exact), "S": run["S"] * 1.0, "T": run["T"] * 1.0})
            if isinstance(row, Term):
                # Score-sized terms can pass 64 bits; beyond ``ENDLESS`` nothing fits, however much it is.
                size = np.where(np.less(row.bytes(broad), ENDLESS), row.bytes(exact), ENDLESS)
            else:
                size = row(broad)
            values[[*formula.numbers.values()]] = size
        return values
