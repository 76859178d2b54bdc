"""Tiers as anyone gets them: what is listed, what was frozen, what ran, and what the page says of it."""

from __future__ import annotations

import subprocess
from functools import cache

import pytest
from test_grid import assert_ran_as_frozen

from planner.calibration import calibration
from planner.measurements import read_failures
from planner.plan import Plan
from planner.plan_file import load_plan
from planner.tiers import TIERS
from reports.render import tier_runs
from reports.validation.several import is_timed
from reports.validation.tiers import TIER_RUNS, WHY

CASE = {case.name: case for case in TIER_RUNS}
RAN = {record.name: record for record in tier_runs.found()}


@cache
def frozen(name: str) -> Plan:
    return load_plan(tier_runs.RUNS / "plans" / f"{name}.yaml")


@cache
def section() -> str:
    return tier_runs.section()


def test_every_case_has_a_plan_that_says_no_more_than_card_model_and_tier() -> None:
    assert len(CASE) == len(TIER_RUNS) and {path.stem for path in (tier_runs.RUNS / "plans").iterdir()} == {*CASE}
    for name, case in CASE.items():
        plan = frozen(name)
        assert plan.verdict == "fits" and plan.tier is not None and f"-tier{plan.tier}" in name
        tier = TIERS[plan.tier - 1]
        assert (plan.context, plan.target, plan.lora_rank) == (tier.context, tier.target, tier.rank)
        assert not {"--with", "--without", "--context"} & {*case.arguments.split()}
        set_by_hand = [word for word in case.arguments.split() if "=" in word and not word.startswith("--")]
        assert all(word.startswith("train.") for word in set_by_hand), name


def test_whole_layers_and_passes_are_among_them_and_several_sequences_at_once() -> None:
    plans = [frozen(name) for name in RAN]
    assert {plan.executor for plan in plans} == {"resident", "streamed"}
    assert {plan.tier for plan in plans} >= {1, 2, 3, 4, 5, 6, 7}
    assert any(plan.train.batch > 1 and plan.executor == "resident" for plan in plans)


@pytest.mark.parametrize("name", RAN)
def test_a_record_was_run_by_the_frozen_plan_and_stayed_within_its_bound(name: str) -> None:
    record, memory = RAN[name], frozen(name).memory.gpu
    timed, plan = is_timed(CASE[name]), frozen(name)
    assert_ran_as_frozen(record.content, plan, memory.budget_bytes if timed else memory.peak_bytes.high)
    assert (record.before_held is not None) is timed
    assert record.held_to_bound and record.within
    assert record.content["layers_run"] == (CASE[name].layers or record.content["layers"])
    assert len(record.content["losses"]) == plan.train.steps
    assert name not in str(calibration().document), "nothing was fitted to it"


def test_the_plans_are_those_of_the_commit_that_the_page_names() -> None:
    def git(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["git", *words], cwd=tier_runs.RUNS, capture_output=True, text=True, check=False)

    if git("cat-file", "-e", f"{tier_runs.FROZEN}^{{commit}}").returncode:
        pytest.skip("no checkout with that history")
    assert git("log", "-1", "--format=%h", "--abbrev=7", "--", "plans").stdout.strip() == tier_runs.FROZEN
    (revision,) = {record.content["revision"] for record in RAN.values()}
    assert revision.startswith(tier_runs.FROZEN)


def test_the_page_says_why_of_every_peak_that_is_more_than_a_hundredth_off() -> None:
    far = {name for name, record in RAN.items() if abs(record.error) > tier_runs.CLOSE}
    assert far == {*WHY}
    assert all(WHY[name] in section() for name in far)


def test_the_page_has_each_run_and_those_that_had_no_machine() -> None:
    rows = [line.split("|")[1].strip() for line in section().splitlines() if line.startswith("| h200-8gib-phi-2-tier")]
    assert rows == [name for name in RAN if name.startswith("h200-8gib-phi-2-tier")]
    failed = {failure.name for failure in read_failures(tier_runs.RUNS)}
    assert {*tier_runs.pending()} == {*CASE} - {*RAN} - failed
    assert all(name in section() for name in tier_runs.pending())


def test_seconds_are_compared_where_a_run_had_its_own_card_alone() -> None:
    timed = tier_runs.timed()
    assert {record.name for record in timed} == {name for name in RAN if is_timed(CASE[name])}
    assert all(record.alone and record.content["card"] == "h200-8gib" for record in timed)
    largest = max(abs(tier_runs.seconds_off(record)) for record in timed)
    assert f"and {100 * largest:.2f} %." in tier_runs.sentence()


def test_errors_of_the_sentence_are_those_of_the_records() -> None:
    errors = sorted(abs(record.error) for record in RAN.values())
    assert f"{100 * errors[-1]:.2f} % at most" in tier_runs.sentence()
    assert f"{len(RAN)} of {len(RAN)} within their bound" in tier_runs.sentence()
