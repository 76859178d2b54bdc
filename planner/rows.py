"""Formulas as rows of one table: each is computed once for each value of the letters that it reads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from planner.adapter_matrices import adapter_letters
from planner.evaluate import Candidates, letters_read, size_of
from planner.ledger import Formula, Term
from planner.model import ModelShape
from planner.symbols import Letters, letters_of

Values = np.ndarray[Any, np.dtype[np.float64]]


class Rows:
    """The table. Bytes are whole numbers in float64, which holds them to the digit below 2^53."""

    def __init__(self, model: ModelShape) -> None:
        self._model = model
        self._places: dict[tuple[object, ...], int] = {}
        self._rows: list[tuple[Term | Formula, Mapping[str, int]]] = []
        self._kept: dict[tuple[object, ...], Values] = {}

    def size(self, term: Term, letters: Mapping[str, int]) -> int:
        """The row of a term's bytes."""
        read = letters_read(term.count, term.bits)
        return self._place((term.count, term.bits, *map(letters.get, read)), term, letters)

    def amount(self, formula: Formula, letters: Mapping[str, int]) -> int:
        """The row of an amount of work."""
        return self._place((formula, *map(letters.get, letters_of(formula))), formula, letters)

    def _place(self, key: tuple[object, ...], row: Term | Formula, letters: Mapping[str, int]) -> int:
        if key not in self._places:
            self._places[key] = len(self._rows)
            self._rows.append((row, letters))
        return self._places[key]

    def at(self, candidates: Candidates, workspace: int) -> Values:
        """Every row at every candidate."""
        key = (candidates.key, workspace, len(self._rows))
        if key not in self._kept:
            self._kept[key] = self._evaluated(candidates, workspace)
        return self._kept[key]

    def _evaluated(self, at: Candidates, workspace: int) -> Values:
        run = {"B": at.batch, "Z": workspace, **adapter_letters(self._model, at.rank)}
        tokens = {"S": at.total, "T": at.target}
        wide = {name: size.astype(np.float64) for name, size in tokens.items()}
        values = np.empty((len(self._rows), len(at.total)))
        spaces: dict[int, tuple[Letters, Letters]] = {}
        for place, (row, letters) in enumerate(self._rows):
            if id(letters) not in spaces:
                spaces[id(letters)] = Letters(**{**letters, **run, **tokens}), Letters(**{**letters, **run, **wide})
            narrow, broad = spaces[id(letters)]
            values[place] = size_of(row, narrow, broad) if isinstance(row, Term) else row(broad)
        return values
