"""Formulas as rows of one table: each is computed once for each value of the letters that it reads."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from operator import itemgetter
from typing import Any, NamedTuple

import numpy as np

from planner.adapter_matrices import adapter_letters
from planner.evaluate import ENDLESS, Candidates, letters_read
from planner.ledger import Formula, Term
from planner.model import ModelShape
from planner.symbols import Letters, Number, letters_of

PLAIN = 2**44  # bytes; below, float64 holds to the digit what a formula goes through: bits, and a multiple of them
OF_THE_RUN = frozenset({"B", "S", "T", "Z", "R", "M_b", "M_s"})
"""Letters that are the run's own in every row (`Rows.at`): a configuration lacks them, or has them of another rank."""
Values = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True, eq=False)
class Turn:
    """Which of a formula's letters take several values.

    Attributes:
        turned: those letters with their values, in order of their dials; ``fixed`` are its others.
        shape: how many values each dial of an option has, 1 where the formula does not read it.
        order: where each letter that the formula reads stands among ``turned`` and then ``fixed``.
        chosen: the values of ``fixed`` (`values_of`).
    """

    turned: Mapping[str, tuple[int, ...]]
    fixed: tuple[str, ...]
    shape: tuple[int, ...]
    order: tuple[int, ...]
    chosen: Callable[[Mapping[str, int]], object]

    @classmethod
    def of(cls, reads: Sequence[str], dials: Mapping[str, tuple[int, ...]]) -> Turn | None:
        """How a formula of these letters turns with an option's dials; None where it reads none."""
        turned = {letter: values for letter, values in dials.items() if letter in reads}
        if not turned:
            return None
        shape = tuple(len(values) if letter in turned else 1 for letter, values in dials.items())
        fixed = tuple(name for name in reads if name not in turned)
        places = {name: place for place, name in enumerate((*turned, *fixed))}
        return cls(turned, fixed, shape, tuple(places[name] for name in reads), values_of(fixed))


def values_of(names: Sequence[str]) -> Callable[[Mapping[str, int]], object]:
    """Gives the values of letters, but for those of the run; all at once, many times."""
    own = [name for name in names if name not in OF_THE_RUN]
    return itemgetter(*own) if own else lambda _: None


class OneFormula:
    """One formula with all values that its letters have somewhere: they are computed together.

    A formula of a handful of letters is read by some ten rows; as one array they cost little more than one of them.
    """

    def __init__(self, row: Term | Formula, reads: tuple[str, ...]) -> None:
        self.row, self.reads = row, reads
        self.numbers: dict[tuple[int | None, ...], int] = {}  # from values of the letters to the number of the row
        self.chosen = values_of(reads)
        self.moves = not {"S", "T"}.isdisjoint(reads)  # with the length of the sequence
        self._columns: tuple[int, dict[str, Number]] = (0, {})
        self._kept: tuple[object, Any] = (None, 0.0)

    def columns(self) -> dict[str, Number]:
        """Each letter: a whole number where all rows have the same, else row × 1; those of the run are none of them."""
        if self._columns[0] != len(self.numbers):
            found: dict[str, Number] = {}
            for name, values in zip(self.reads, zip(*self.numbers, strict=True), strict=True):
                if values[0] is not None:
                    alike = values.count(values[0]) == len(values)
                    found[name] = values[0] if alike else np.array(values, dtype=np.int64)[:, None]
            self._columns = len(self.numbers), found
        return self._columns[1]

    def values(self, run: object, compute: Callable[[], Any]) -> Any:
        """Its rows at some candidates; where they do not move with the sequence, as they were in a like run before."""
        if self.moves:
            return compute()
        if self._kept[0] != (run, len(self.numbers)):
            self._kept = (run, len(self.numbers)), compute()
        return self._kept[1]


class RunLetters(NamedTuple):
    """The letters of a run, whole, and with the sequence in float64."""

    exact: Mapping[str, Number]
    broad: Mapping[str, Number]

    @classmethod
    def of(cls, letters: Mapping[str, Number]) -> RunLetters:
        """Those of some candidates."""
        return cls(letters, {**letters, "S": letters["S"] * 1.0, "T": letters["T"] * 1.0})


class Rows:
    """The table. Bytes are whole numbers in float64, which holds them to the digit below 2^53."""

    def __init__(self, model: ModelShape) -> None:
        self._model = model
        self._formulas: dict[object, OneFormula] = {}
        self.count = 0

    def formulas(self) -> Iterable[OneFormula]:
        """Every formula there is."""
        return self._formulas.values()

    def of_term(self, term: Term) -> OneFormula:
        """The formula of a term's bytes."""
        key = (term.count, term.bits)
        if key not in self._formulas:
            self._formulas[key] = OneFormula(term, letters_read(*key))
        return self._formulas[key]

    def of_amount(self, formula: Formula) -> OneFormula:
        """The formula of an amount of work."""
        if formula not in self._formulas:
            self._formulas[formula] = OneFormula(formula, letters_of(formula))
        return self._formulas[formula]

    def number(self, at: OneFormula, letters: Mapping[str, int]) -> int:
        """The row of a formula where letters have these values."""
        return self._number(at, tuple(map(letters.get, at.reads)))

    def numbers(self, at: OneFormula, letters: Mapping[str, int], turn: Turn) -> tuple[int, ...]:
        """The rows at each combination of values of some letters, the last one's varying fastest."""
        fixed = tuple(map(letters.get, turn.fixed))
        # By their places in ``order``; of one place ``itemgetter`` makes no tuple.
        ordered = itemgetter(*turn.order) if len(turn.order) > 1 else tuple
        return tuple(self._number(at, ordered((*chosen, *fixed))) for chosen in product(*turn.turned.values()))

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
        whole = RunLetters.of(several)
        runs = whole, whole if alone is several else RunLetters.of(alone)
        values = np.empty((self.count, len(candidates.total)))
        like = (candidates.batch, workspace, candidates.rank.tobytes())
        for formula in self._formulas.values():
            if formula.numbers:  # else all of its rows are in no column
                numbers = [*formula.numbers.values()]
                values[numbers] = formula.values(like, partial(_values, formula, *runs))
        return values


def _values(formula: OneFormula, several: RunLetters, alone: RunLetters) -> Any:
    """All rows of a formula: row × candidate, or what both have only one of left out.

    Args:
        several: the run's letters as arrays of candidates; ``alone``: as whole numbers where there is one candidate.
    """
    columns, row = formula.columns(), formula.row
    # Whole numbers have no end, but make an error of what leaves the 64 bits of an array beside them.
    run = alone if all(type(value) is int for value in columns.values()) else several
    if not isinstance(row, Term):
        return row(Letters(**{**columns, **run.broad}))
    if run is not several:
        return float(min(row.bytes(Letters(**{**columns, **run.exact})), ENDLESS))
    size = row.bytes(Letters(**{**columns, **run.broad}))
    if np.max(size) < PLAIN:
        return size
    # Score-sized terms can pass 64 bits; beyond ``ENDLESS`` nothing fits, however much it is.
    return np.where(np.less(size, ENDLESS), row.bytes(Letters(**{**columns, **run.exact})), ENDLESS)
