"""The grid of runs that predictions are held against: what it covers, what was frozen, what is held out."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import pytest

from planner.measurements import Record, read_failures, read_records
from planner.optimizations import all_optimizations
from planner.plan import Plan
from planner.plan_file import load_plan
from reports.render import grid as grid_page
from reports.render import peers
from reports.render.records import on_cards, records
from reports.validation.fit import run_of
from reports.validation.grid import BEYOND, EXCLUDED, FAILED, GRID, HELD, LONGEST
from reports.validation.peers import by_accelerate
from reports.validation.sets import CALIBRATED_UP_TO, set_of, set_of_record

FOLDER = grid_page.RECORDS
MEASURED = {record.name: record for record in read_records(FOLDER)}
CASE = {case.name: case for case in GRID}


@cache
def frozen(name: str) -> Plan:
    """The plan that was written before the run."""
    return load_plan(FOLDER / "plans" / f"{name}.yaml")


def test_every_run_of_the_grid_has_a_plan_and_every_record_is_of_one() -> None:
    assert len(CASE) == len(GRID)
    assert {path.stem for path in (FOLDER / "plans").glob("*.yaml")} == {*CASE}
    failed = {failure.name for failure in read_failures(FOLDER)}
    assert {*MEASURED} | failed <= {*CASE} and not {*MEASURED} & failed
    assert {*EXCLUDED} <= {*MEASURED}
    longer = {case.name for case in GRID if case.beyond}
    assert {*FAILED} == failed - longer, "whatever failed has its reason"


def test_the_grid_covers_what_is_asked_of_it() -> None:
    plans = {name: frozen(name) for name in CASE}
    assert len(MEASURED) >= 100
    ran = [plans[name] for name in MEASURED]
    assert len({plan.model.id for plan in ran}) >= 8 and {plan.executor for plan in ran} == {"resident", "streamed"}
    lengths, ranks = [plan.total_tokens for plan in ran], {plan.lora_rank for plan in ran}
    assert min(lengths) == 512 and max(lengths) == 524_288 and {2, 4, 8, 16, 32, 64} <= ranks
    assert {"float16", "bfloat16"} <= {record.content["dtype"] for record in MEASURED.values()}
    assert {record.content["card"] for record in MEASURED.values()} >= {*HELD, "rtx2060s", "rtx3060-12gb", "rtx4090"}
    on = [{choice.id for choice in plan.choices} for plan in ran]
    for name in all_optimizations():
        assert any(name in each for each in on), name
        assert name == "lora" or any(name not in each for each in on), name


def test_whole_models_and_the_longest_of_every_other_one_are_held_out() -> None:
    held = {plan.model.architecture for case in GRID if (plan := frozen(case.name)).model.id not in CALIBRATED_UP_TO}
    assert len(held) >= 3, held
    longest: dict[str, int] = {}
    for record in (*MEASURED.values(), *records()):
        model = record.content["model"]["id"]
        longest[model] = max(record.tokens, longest.get(model, 0))
    assert {*CALIBRATED_UP_TO} <= {*longest}
    for model, most in longest.items():
        assert set_of(model, most) == "holdout", (model, most)
    for record in (*MEASURED.values(), *on_cards(records())):
        assert record.content["set"] == set_of_record(record.content), record.name


def test_a_run_that_is_held_out_says_so_to_the_fit() -> None:
    record = next(each for each in on_cards(records()) if set_of_record(each.content) == "holdout")
    assert run_of(record).holdout
    assert set_of("phi-2", CALIBRATED_UP_TO["phi-2"]) == "calibration"
    assert set_of("phi-2", CALIBRATED_UP_TO["phi-2"] + 1) == set_of("no-such-model", 1) == "holdout"


@pytest.mark.parametrize("name", MEASURED)
def test_a_record_of_the_grid_was_run_by_its_frozen_plan(name: str) -> None:
    record, case = MEASURED[name].content, CASE[name]
    ran, written = Plan.model_validate_json(json.dumps(record["plan"])).document(), frozen(name).document()
    for document in (ran, written):
        document["train"] |= {"data": None, "out": ""}
    assert ran["memory"]["gpu"].pop("budget_bytes") == written["memory"]["gpu"]["peak_bytes"]["high"]
    written["memory"]["gpu"].pop("budget_bytes")
    assert ran == written
    assert record["layers_run"] == (case.layers or record["layers"])
    assert record["how"] == ("rehearsed" if case.rehearse else "run")
    assert len(record["revision"]) == 40


PEAKS = [name for name, record in MEASURED.items() if record.shows_the_peak and name not in EXCLUDED]


@pytest.mark.parametrize("name", PEAKS)
def test_the_peak_planned_today_is_what_the_grid_measured(name: str) -> None:
    """Within 4 %: where windows are narrow, copies of a stretch are counted too high (docs/decisions.md)."""
    record, now = MEASURED[name], grid_page.planned_again(name)
    windowed = "starcoder2" in name and record.content["executor"] == "streamed"
    assert now.memory.gpu.peak_bytes.expected == pytest.approx(record.allocated, rel=0.04 if windowed else 0.005)
    assert [choice.id for choice in now.choices] == [choice["id"] for choice in record.content["plan"]["choices"]]
    assert record.host_measured <= now.memory.host.peak_bytes


def test_the_longest_is_what_its_plan_says_is_the_longest() -> None:
    for (card, model), tokens in LONGEST.items():
        plan, longer = frozen(f"{card}-{model}-longest"), frozen(f"{card}-{model}-beyond")
        assert plan.total_tokens == plan.target == plan.longest.all_trained == tokens
        settings, of_longer = ({choice.id: choice.knobs for choice in each.choices} for each in (plan, longer))
        assert settings == of_longer
        assert BEYOND * tokens <= longer.total_tokens < BEYOND * tokens + 128
        budget = plan.memory.gpu.budget_bytes
        assert longer.memory.gpu.peak_bytes.high > budget >= plan.memory.gpu.peak_bytes.high


def test_the_page_names_every_run_that_is_not_in_its_figures() -> None:
    text = grid_page.text()
    for name in (*EXCLUDED, *FAILED):
        assert f"| {name} | " in text, name
    missing = [case.name for case in GRID if case.name not in MEASURED and case.name not in _failed()]
    assert all(f"| {name} | not run yet | " in text for name in missing)
    assert text.count("](validation-") == len(grid_page.drawn()) == 4


def _failed() -> set[str]:
    return {failure.name for failure in read_failures(FOLDER)}


def test_one_layer_alone_does_not_count_for_the_peak() -> None:
    def of(**changes: Any) -> Record:
        return Record("any", {"layers_run": 32, "layers": 32, "how": "run"} | changes)

    assert of().shows_the_peak and of(layers_run=2).shows_the_peak and of(layers=1, layers_run=1).shows_the_peak
    assert not of(layers_run=1).shows_the_peak
    assert of().alone and not of(beside=2).alone and not of(how="rehearsed").alone


def test_what_other_estimators_say_is_of_the_same_runs() -> None:
    found = json.loads(peers.FOUND.read_text(encoding="utf-8"))["runs"]
    whole = {name: record for name, record in MEASURED.items() if record.content["executor"] == "resident"}
    assert {*found} == {*whole}
    for name, run in found.items():
        assert (run["measured"], run["planned"]) == (whole[name].allocated, whole[name].expected)
        assert all(
            size is None or size > 0
            for each in run["peers"].values()
            if "refused" not in each
            for size in each.values()
        )
    assert peers.section() in grid_page.text()


def test_accelerate_says_of_a_model_what_its_own_table_says() -> None:
    record = MEASURED["h200-12gib-phi-2-2048-bf16"]
    said = by_accelerate(record)
    parameters = record.content["plan"]["model"]["parameters"]
    assert said["nearest"] == pytest.approx(2 * parameters, rel=0.01)  # 16 bits
    assert said["training"] == pytest.approx(2 * 4 * parameters, rel=0.01)  # two states in float32, the largest it has
