"""The recorded matrix and the record of times: a sample of the rows is planned again."""

from __future__ import annotations

import json
import random

import pytest

from planner.matrix import MatrixRow, all_cards, all_models, rows_of_model
from planner.planning import Request
from reports.performance.measure import MODELS, RECORD
from reports.render import tiers

ROWS = tiers.rows()
SAMPLE = random.Random(11).sample([row for row in ROWS if row.fits is not None], 10)
SAMPLE += random.Random(12).sample([row for row in ROWS if row.fits is None], 4)


def test_every_pair_has_a_row() -> None:
    assert [(row.gpu, row.model) for row in ROWS] == [(card, model) for card in all_cards() for model in all_models()]


@pytest.mark.parametrize("row", SAMPLE, ids=lambda row: f"{row.gpu}-{row.model}")
def test_a_recorded_row_is_what_is_planned_today(row: MatrixRow) -> None:
    assert rows_of_model(row.model, [row.gpu], Request()) == [row], "`make tiers` plans all of them anew"


def test_the_record_of_times_is_whole() -> None:
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    assert set(record["solve"]) == set(MODELS)
    assert record["growth"][0]["added"] == 0 and all(
        row.get("stopped") or row["median"] > 0 for row in record["growth"]
    )
    assert record["machine"]["cores"] and record["versions"]["python"]
