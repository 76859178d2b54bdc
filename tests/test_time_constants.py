"""The constants of time: what the fit finds is on record, and what is shipped is what it finds, rounded."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import numpy as np
import pytest

from planner.calibration import calibration
from reports.render.records import on_cards, records
from reports.render.time_constants import FITTED
from reports.validation.fit import LEFT_OUT, Run, constants_of, fit, report, run_of, with_values

RECORDED: dict[str, Any] = json.loads(FITTED.read_text(encoding="utf-8"))


@cache
def runs() -> tuple[Run, ...]:
    """Every run on a card, with the work that is counted for it today."""
    return tuple(run_of(record) for record in on_cards(records()))


def test_the_fit_on_record_is_that_of_today() -> None:
    """Formulas, records or constants changed, and nobody fitted again: python -m reports.validation.fit FILE."""
    found = report(runs())
    for part in ("fitted_to", "holdout"):
        for which, ratios in found[part].items():
            assert ratios == pytest.approx(RECORDED[part][which], rel=2e-3), (part, which)
    assert {*found["constants"]} == {*RECORDED["constants"]}
    for name, one in found["constants"].items():
        told = RECORDED["constants"][name]
        assert one["shipped"] == told["shipped"] and one["fitted"] == pytest.approx(told["fitted"], rel=5e-3), name
    assert {*found["left_out_in_turn"]} == {*RECORDED["left_out_in_turn"]} and found["not_looked_at"] == {**LEFT_OUT}
    for name, one in found["left_out_in_turn"].items():
        assert one["ratio"] == pytest.approx(RECORDED["left_out_in_turn"][name]["ratio"], rel=5e-3), name


def test_shipped_constants_are_those_of_the_fit() -> None:
    """Within what runs of one machine and the next differ by."""
    for name, one in RECORDED["constants"].items():
        assert one["shipped"] == pytest.approx(one["fitted"], rel=0.1), name


def test_no_run_of_the_holdout_set_has_a_part_in_the_fit() -> None:
    assert {run.name for run in runs() if run.holdout} - {*LEFT_OUT} == {*RECORDED["holdout"]["shipped"]}
    assert not {*RECORDED["holdout"]["shipped"]} & {*RECORDED["fitted_to"]["shipped"]}


def test_the_fit_finds_constants_that_times_were_made_by() -> None:
    """Runs whose times follow from other constants than those that are shipped give these back."""
    constants = constants_of(calibration().document)
    shipped = np.array([constant.of(calibration().document)["value"] for constant in constants])
    # Near what the link, products and traffic are held to, so that all residuals can be nothing at once.
    other = shipped * np.where([constant.name == "link" for constant in constants], 0.81 / 0.82, 1.0)
    assert [constant.name for constant in constants[:4]] == ["linear", "memory", "link", "launch_seconds"]
    other = other * np.array([0.70 / shipped[0], 0.70 / shipped[1], 1.0, 1.2, *[0.9] * (len(constants) - 4)])
    made = with_values(constants, other)
    exact = [
        Run(**{**vars(run), "measured": {name: run.estimated(made)[name] for name in run.measured}})
        for run in runs()
        if run.name not in LEFT_OUT and not run.holdout
    ]
    assert fit(constants, exact) == pytest.approx(other, rel=1e-3)
