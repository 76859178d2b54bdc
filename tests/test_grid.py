"""The grid of runs that predictions are held against: what it covers, what was frozen, what is held out."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from grid_fixture import CASE, FIRST, FOLDER, LONGER, MEASURED, MEASURED_FIRST, SECOND, failed_names, frozen, pair_names

from planner.measurements import Record, read_failures, read_records
from planner.model import load_model
from planner.optimizations import all_optimizations
from planner.plan import Plan
from planner.planning import Request, make_plan
from planner.units import GIB
from reports.render import grid_longest, grid_records
from reports.render.grid import FROZEN
from reports.render.records import on_cards, records
from reports.validation.fit import run_of
from reports.validation.grid import BEYOND, BY_HOST, EXCLUDED, FAILED, FRESH, GRID, HELD, LATER, LONGEST, NEW
from reports.validation.sets import CALIBRATED_UP_TO, set_of, set_of_record
from reports.validation.several import is_timed
from trainer.streamed.row import head_groups

STANDS_IN_FOR = ("rtx2060s", "rtx3060-12gb", "rtx4090")


def test_every_run_of_the_grid_has_a_plan_and_every_record_is_of_one() -> None:
    assert len(CASE) == len(GRID)
    assert {path.stem for path in (FOLDER / "plans").glob("*.yaml")} == {*CASE}
    assert {path.stem for path in (FIRST / "plans").glob("*.yaml")} >= {*MEASURED_FIRST}
    failed = {failure.name for failure in read_failures(FOLDER)}
    assert {*MEASURED} | failed <= {*CASE} and not {*MEASURED} & failed
    assert {*EXCLUDED} <= {*MEASURED}
    assert {*FAILED} == failed - LONGER, "whatever failed has its reason"


def covers(plans: Iterable[Plan]) -> None:
    """Whether they are all that is asked of the grid."""
    ran = [*plans]
    assert len({plan.model.id for plan in ran}) >= 8 and {plan.executor for plan in ran} == {"resident", "streamed"}
    lengths, ranks = [plan.total_tokens for plan in ran], {plan.lora_rank for plan in ran}
    assert min(lengths) == 512 and max(lengths) == 524_288 and {2, 4, 8, 16, 32, 64} <= ranks
    assert {"float16", "bfloat16"} <= {plan.knobs("mixed_precision").get("dtype", "float32") for plan in ran}
    assert {plan.gpu.id for plan in ran} >= {*HELD, *STANDS_IN_FOR}
    on = [{choice.id for choice in plan.choices} for plan in ran]
    for name in all_optimizations():
        assert any(name in each for each in on) is (name not in LATER), name
        assert name == "lora" or any(name not in each for each in on), name


def test_the_grid_covers_what_is_asked_of_it() -> None:
    assert len(GRID) >= 100
    covers(map(frozen, CASE))


def test_what_was_run_covers_it_too_with_the_first_running() -> None:
    assert len({*MEASURED} - LONGER) >= 100
    only_first = {*MEASURED_FIRST} - {*MEASURED}
    covers([*map(frozen, MEASURED), *(frozen(name, FIRST) for name in only_first)])
    ran = [MEASURED[name] for name in MEASURED if name not in LONGER]
    assert len({record.content["model"]["id"] for record in ran}) >= 20
    assert {record.content["card"] for record in ran} >= {*HELD, *STANDS_IN_FOR}
    assert {record.content["executor"] for record in ran} == {"resident", "streamed"}
    assert {"float16", "bfloat16"} <= {record.content["dtype"] for record in MEASURED.values()}


def test_what_is_not_run_yet_is_timed_and_of_models_with_calibration_runs() -> None:
    pending = grid_records.pending()
    assert {*pending} == {*CASE} - {*MEASURED} - failed_names()
    assert all(is_timed(CASE[name]) and frozen(name).model.id in CALIBRATED_UP_TO for name in pending)
    assert {*pending} <= {*MEASURED_FIRST} | {failure.name for failure in read_failures(FIRST)}
    assert {*NEW} | {*FRESH} <= {*MEASURED} and {f"{name}-longest" for name in pair_names()} <= {*MEASURED}


def test_long_runs_that_are_fresh_are_held_out_and_of_models_with_several_heads_to_a_key_head() -> None:
    assert {MEASURED[name].content["set"] for name in FRESH} == {"holdout"} and len(FRESH) == 10
    older = [(*MEASURED.values(),), (*MEASURED_FIRST.values(),), on_cards(records())]
    known = {settings_of(record.content["plan"]) for of in older for record in of if record.name not in FRESH}
    for name in FRESH:
        shape = load_model(frozen(name).model.id)
        assert frozen(name).total_tokens > 2**16 and shape.heads > shape.kv_heads
        assert settings_of(MEASURED[name].content["plan"]) not in known


def settings_of(plan: dict[str, Any]) -> str:
    """What sets a run apart: model, length and all that is chosen."""
    return json.dumps([plan["model"]["id"], plan["total_tokens"], plan["choices"]], sort_keys=True)


def test_runs_were_made_once_more_where_today_they_are_planned_otherwise() -> None:
    second = {record.name: record for record in read_records(SECOND)}
    assert {*second} == {path.stem for path in (SECOND / "plans").glob("*.yaml")} <= {*MEASURED}
    for name, record in second.items():
        then, now = frozen(name, SECOND), frozen(name)
        settings, of_now = ({choice.id: choice.knobs for choice in plan.choices} for plan in (then, now))
        same = settings == of_now and then.memory.gpu.peak_bytes == now.memory.gpu.peak_bytes
        assert same is (record.over > 0), name
        assert Plan.model_validate_json(json.dumps(record.content["plan"])).choices == then.choices
        assert MEASURED[name].over <= 0


def test_models_that_are_new_have_no_other_run_and_no_constant() -> None:
    models = {frozen(name).model.id for name in NEW}
    assert len(models) >= 8 and not models & {*CALIBRATED_UP_TO}
    older = {record.content["model"]["id"] for record in (*MEASURED_FIRST.values(), *on_cards(records()))}
    assert not models & older
    assert {record.content["set"] for name, record in MEASURED.items() if name in NEW} == {"holdout"}


def test_whole_models_and_the_longest_of_every_other_one_are_held_out() -> None:
    held = {plan.model.architecture for case in GRID if (plan := frozen(case.name)).model.id not in CALIBRATED_UP_TO}
    assert len(held) >= 3, held
    longest: dict[str, int] = {}
    for record in (*MEASURED.values(), *MEASURED_FIRST.values(), *records()):
        model = record.content["model"]["id"]
        longest[model] = max(record.tokens, longest.get(model, 0))
    assert {*CALIBRATED_UP_TO} <= {*longest}
    for model, most in longest.items():
        assert set_of(model, most) == "holdout", (model, most)
    for record in (*MEASURED.values(), *MEASURED_FIRST.values(), *on_cards(records())):
        assert record.content["set"] == set_of_record(record.content), record.name


def test_a_run_that_is_held_out_says_so_to_the_fit() -> None:
    record = next(each for each in on_cards(records()) if set_of_record(each.content) == "holdout")
    assert run_of(record).holdout
    assert set_of("phi-2", CALIBRATED_UP_TO["phi-2"]) == "calibration"
    assert set_of("phi-2", CALIBRATED_UP_TO["phi-2"] + 1) == set_of("no-such-model", 1) == "holdout"


def limit(name: str) -> int:
    """What of the card a run may take in all: its plan's bound, and more of it where only the end is held to that."""
    if CASE[name].beyond:
        return frozen(str(CASE[name].beyond)).memory.gpu.budget_bytes
    plan = frozen(name).memory.gpu
    return plan.budget_bytes if is_timed(CASE[name]) else plan.peak_bytes.high


@pytest.mark.parametrize("name", MEASURED)
def test_a_record_of_the_grid_was_run_by_its_frozen_plan(name: str) -> None:
    record, case = MEASURED[name].content, CASE[name]
    assert_ran_as_frozen(record, frozen(name), limit(name))
    before, high = MEASURED[name].before_held, frozen(name).memory.gpu.peak_bytes.high
    assert (before is not None) is is_timed(case)
    assert record["limit_bytes"] == (limit(name) if case.beyond else high)
    steps = len(record["step_seconds"]["each"])
    assert steps == frozen(name).train.steps and (before is None or before["steps"] == steps - 2)
    assert record["layers_run"] == (case.layers or record["layers"])
    assert record["how"] == ("rehearsed" if case.rehearse else "run")
    assert len(record["revision"]) == 40


@pytest.mark.parametrize("name", MEASURED_FIRST)
def test_a_record_of_the_first_running_was_run_by_the_plan_of_then(name: str) -> None:
    plan = frozen(name, FIRST)
    assert_ran_as_frozen(MEASURED_FIRST[name].content, plan, plan.memory.gpu.peak_bytes.high)
    assert MEASURED_FIRST[name].before_held is None and MEASURED_FIRST[name].held_to_bound


def assert_ran_as_frozen(record: dict[str, Any], plan: Plan, budget: int) -> None:
    """The plan in a record is the frozen one, but for where it was run and how much of the card it had."""
    ran, written = Plan.model_validate_json(json.dumps(record["plan"])).document(), plan.document()
    for document in (ran, written):
        document["train"] |= {"data": None, "out": ""}
    assert ran["memory"]["gpu"].pop("budget_bytes") == budget
    written["memory"]["gpu"].pop("budget_bytes")
    assert ran == written


PLANS = "reports/validation/grid/plans"


def _git(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["git", *words], cwd=FOLDER.parents[2], capture_output=True, text=True, check=False)


def test_the_plans_that_were_run_are_those_of_the_commits_that_the_page_names() -> None:
    if any(_git("cat-file", "-e", f"{commit}^{{commit}}").returncode for commit in FROZEN):
        pytest.skip("no checkout with that history")
    assert _git("log", "-1", "--format=%h", "--abbrev=7", "--", PLANS).stdout.strip() == FROZEN[-1]
    for revision in {record.content["revision"] for record in MEASURED.values()}:
        since = {Path(line).stem for line in _git("diff", "--name-only", revision, "--", PLANS).stdout.splitlines()}
        ran = {name for name, record in MEASURED.items() if record.content["revision"] == revision}
        assert not ran & since, "the plan is the one of the revision that ran it"


PEAKS = [(name, FOLDER) for name, record in MEASURED.items() if record.shows_the_peak and name not in EXCLUDED]
PEAKS += [(name, FIRST) for name, record in MEASURED_FIRST.items() if record.shows_the_peak and name not in MEASURED]


@pytest.mark.parametrize(("name", "folder"), PEAKS, ids=[name for name, _ in PEAKS])
def test_the_peak_planned_today_is_what_the_grid_measured(name: str, folder: Path) -> None:
    """Within half a percent; where layers have a window and go in passes, 4: a stretch's copies are counted too high.

    Where a plan's groups of heads are of two sizes, which none is planned with any more, all count as the larger.
    """
    record, now = grid_records.record_of(name, folder), grid_records.planned_again(name, folder)
    expected, in_passes = now.memory.gpu.peak_bytes.expected, record.content["executor"] == "streamed"
    windowed = in_passes and load_model(now.model.id).sliding_window is not None
    if in_passes and _groups_of_two_sizes(now):
        assert record.allocated <= expected * 1.0005
    else:
        assert expected == pytest.approx(record.allocated, rel=0.04 if windowed else 0.005)
    assert [choice.id for choice in now.choices] == [choice["id"] for choice in record.content["plan"]["choices"]]
    assert record.host_measured <= now.memory.host.peak_bytes


def _groups_of_two_sizes(plan: Plan) -> bool:
    shape, heads = load_model(plan.model.id), int(plan.knobs("streamed")["heads"] or 0)
    return len({group.last - group.first for group in head_groups(shape.heads, shape.kv_heads, heads)}) > 1


def test_no_plan_that_is_made_today_has_groups_of_two_sizes() -> None:
    for model in ("llama-3.2-3b", "starcoder2-3b", "qwen2.5-0.5b", "smollm2-135m", "qwen2.5-14b"):
        asked = Request(gpu="rtx4090", model=model, total_tokens=65_536, required=("streamed",))
        assert not _groups_of_two_sizes(make_plan(asked)), model


def test_the_longest_is_what_its_plan_says_is_the_longest() -> None:
    for (card, model), tokens in LONGEST.items():
        plan, longer = frozen(f"{card}-{model}-longest"), frozen(f"{card}-{model}-beyond")
        assert plan.total_tokens == plan.target == plan.longest.all_trained == tokens
        settings, of_longer = ({choice.id: choice.knobs for choice in each.choices} for each in (plan, longer))
        assert settings == of_longer
        assert BEYOND * tokens <= longer.total_tokens < BEYOND * tokens + 128
        budget = plan.memory.gpu.budget_bytes
        assert longer.memory.gpu.peak_bytes.high > budget >= plan.memory.gpu.peak_bytes.high


def test_where_the_host_is_the_limit_the_longer_one_took_more_than_there_was() -> None:
    pairs = grid_longest.host_pairs()
    assert [longest.name for longest, _, _ in pairs] == [f"{name}-longest" for name in pair_names()[len(LONGEST) :]]
    for (_, model, size), (longest, longer, budget) in zip(BY_HOST, pairs, strict=True):
        plan, beyond = frozen(longest.name), frozen(longer.name)
        assert budget == plan.memory.host.budget_bytes == size * GIB and plan.executor == "streamed"
        assert plan.model.id == model and BY_HOST[plan.gpu.id, model, size] == plan.total_tokens
        settings, of_longer = ({choice.id: choice.knobs for choice in each.choices} for each in (plan, beyond))
        assert settings == of_longer
        assert BEYOND * plan.total_tokens <= beyond.total_tokens < BEYOND * plan.total_tokens + 128
        assert beyond.memory.host.peak_bytes > budget >= plan.memory.host.peak_bytes
        assert longer.host_measured > budget >= longest.host_measured
        assert longer.over <= 0 and longest.over <= 0, "the card is not what ends them"
    told = f"took no more than it in {len(pairs)} of {len(pairs)} pairs, and the longer one more in {len(pairs)}."
    assert told in grid_longest.section() and grid_longest.host_sentence().endswith(told)


def test_one_layer_alone_does_not_count_for_the_peak() -> None:
    def of(**changes: Any) -> Record:
        return Record("any", {"layers_run": 32, "layers": 32, "how": "run"} | changes)

    assert of().shows_the_peak and of(layers_run=2).shows_the_peak and of(layers=1, layers_run=1).shows_the_peak
    assert not of(layers_run=1).shows_the_peak
    assert of().alone and not of(beside=2).alone and not of(how="rehearsed").alone
