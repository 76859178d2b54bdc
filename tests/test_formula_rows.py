"""Formulas as rows of one table: each is what plain whole numbers give, at any length."""

from __future__ import annotations

import numpy as np
import pytest

from planner.adapter_matrices import adapter_letters
from planner.evaluate import ENDLESS, Candidates
from planner.hardware import load_profile
from planner.ledger import Term
from planner.model import load_model
from planner.optimizations.base import Situation
from planner.solver import space_of
from planner.symbols import Letters
from planner.table import Table

WORKSPACE = 8_519_680


def table_of(model: str, required: tuple[str, ...]) -> Table:
    return space_of(Situation(load_profile("rtx2060s"), load_model(model), 2**35), required).table


@pytest.mark.parametrize("model", ["phi-2", "llama-3.1-8b", "gemma-3-1b"])
@pytest.mark.parametrize("required", [(), ("sequence_blocks",)], ids=["all", "blocks"])
@pytest.mark.parametrize("batch", [1, 3, 4096])
def test_rows_are_what_plain_numbers_give(model: str, required: tuple[str, ...], batch: int) -> None:
    """One length or several, short, or so long that what is counted leaves 64 bits.

    There a term that is what stands above the scores' bytes may be off; it is beside scores that fit nowhere.
    """
    rows, shape = table_of(model, required).rows, load_model(model)
    lengths = (64, 4096, 2**20, 2**28)
    totals, ranks = np.array(lengths), np.array([4, 16, 8, 64])
    at = Candidates(totals, np.minimum(totals, 32_768), ranks, batch)
    alone = [
        Candidates(*(each[place : place + 1] for each in (at.total, at.target, at.rank)), batch)
        for place in range(len(lengths))
    ]
    together, one_by_one = rows.at(at, WORKSPACE), np.hstack([rows.at(one, WORKSPACE) for one in alone])
    assert np.array_equal(together, one_by_one)
    expected = np.full((rows.count, len(lengths)), np.nan)
    for place, total in enumerate(lengths):
        run = {"S": total, "T": min(total, 32_768), "B": batch, "Z": WORKSPACE}
        run |= adapter_letters(shape, int(ranks[place]))
        for formula in rows.formulas():
            for values, number in formula.numbers.items():
                own = {name: value for name, value in zip(formula.reads, values, strict=True) if value is not None}
                letters = Letters(**own | run)
                row = formula.row
                expected[number, place] = min(row.bytes(letters), ENDLESS) if isinstance(row, Term) else row(letters)
    vast = np.array([batch * shape.heads * total**2 * 2**8 >= 2**63 for total in lengths])
    assert vast[-1] and not vast[:2].any()
    assert together[:, ~vast] == pytest.approx(expected[:, ~vast], rel=1e-12)
    small = expected[:, ~vast] < 2**50
    assert small.any() and np.array_equal(together[:, ~vast][small], expected[:, ~vast][small])
    endless = expected[:, vast] >= ENDLESS
    assert endless.any() and (together[:, vast][endless] >= ENDLESS * (1 - 1e-12)).all()


def test_turned_letters_come_in_order_of_their_dials() -> None:
    """Places of an option: the last dial's values vary fastest."""
    for places in table_of("phi-2", ()).options:
        for place in places.range:
            values = [places.values(place)[dial] for dial in places.option.dials]
            assert (
                places.range[0]
                + np.ravel_multi_index(
                    [dial.values.index(value) for dial, value in zip(places.option.dials, values, strict=True)] or [0],
                    places.shape or (1,),
                )
                == place
            )
