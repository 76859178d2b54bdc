"""Tiers as anyone gets them: what is listed, what was frozen, what ran, and what the page says of it."""

from __future__ import annotations

import json
import subprocess
from functools import cache
from pathlib import Path

import pytest
from test_grid import assert_ran_as_frozen

from planner.measurements import read_failures, read_records
from planner.plan import Plan
from planner.plan_file import load_plan
from planner.tiers import TIERS
from reports.render import tier_runs
from reports.validation.several import is_timed
from reports.validation.tiers import FEW, LONG, SEVERAL, TIER_RUNS, WHY

CASE = {case.name: case for case in TIER_RUNS}
RAN = {record.name: record for record in tier_runs.found()}


@cache
def frozen(name: str) -> Plan:
    return load_plan(tier_runs.RUNS / "plans" / f"{name}.yaml")


@cache
def section() -> str:
    return tier_runs.section()


MORE = {
    "h200-8gib-llama-3.2-1b-tier2-two": ["train.batch=2"],
    "h200-8gib-gemma-3-1b-tier1-four": ["train.batch=4"],
    "h200-8gib-phi-2-tier8-host": ["--host-ram=64GiB"],
}


def test_every_case_has_a_plan_in_which_the_planner_chose_all_but_how_it_is_judged() -> None:
    assert len(CASE) == len(TIER_RUNS) and {path.stem for path in (tier_runs.RUNS / "plans").iterdir()} == {*CASE}
    for name, case in CASE.items():
        plan, words = frozen(name), case.arguments.split()
        assert plan.verdict == "fits" and plan.tier is not None
        assert words[: words.index("--set")] == ["--gpu", words[1], "--model", words[3], "--tier", str(plan.tier)]
        said = [word for word in words[words.index("--set") :] if word != "--set"]
        steps = f"train.steps={plan.train.steps}"
        assert said == [steps, "train.validation=0.5", "train.evaluation_rows=1", *MORE.get(name, [])]
        tier = TIERS[int(name.partition("-tier")[2].partition("-")[0]) - 1]
        assert (plan.tier, plan.context, plan.target) == (tier.number, tier.context, tier.target)
        assert plan.lora_rank == tier.rank


def test_whole_layers_and_passes_are_among_them_and_several_sequences_at_once() -> None:
    plans = [frozen(name) for name in RAN]
    assert {plan.executor for plan in plans} == {"resident", "streamed"}
    assert {plan.tier for plan in plans} >= {1, 2, 3, 4, 5, 6, 7, 8}
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


def test_the_plans_are_those_of_the_commit_that_the_page_names() -> None:
    def git(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["git", *words], cwd=tier_runs.RUNS, capture_output=True, text=True, check=False)

    if git("cat-file", "-e", f"{tier_runs.FROZEN}^{{commit}}").returncode:
        pytest.skip("no checkout with that history")
    assert git("log", "-1", "--format=%h", "--abbrev=7", "--", "plans").stdout.strip() == tier_runs.FROZEN
    for revision in {record.content["revision"] for record in RAN.values()}:
        since = {Path(line).stem for line in git("diff", "--name-only", revision, "--", "plans").stdout.splitlines()}
        assert not since & {name for name, record in RAN.items() if record.content["revision"] == revision}
    fitted = git("diff", "--name-only", tier_runs.FROZEN, "--", "../../../planner/calibration.yaml").stdout
    assert not fitted, "then it is to be seen whether a constant was fitted to these runs"


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
    steps = {(record.before_held or {})["steps"] for record in timed}
    assert steps == {SEVERAL - tier_runs.HELD_STEPS, FEW - tier_runs.HELD_STEPS}
    assert {tier_runs.tier_of(r) >= LONG for r in timed if (r.before_held or {})["steps"] == 1} == {True}


def test_the_sentence_counts_what_has_run_what_failed_and_what_waits() -> None:
    told = tier_runs.sentence()
    assert f" {len(RAN)} runs of tiers 1 to 8," in told and "each of the" in told
    assert f"{len(CASE) - len(RAN)} more that were planned had no machine yet" in told
    parts = [name for name in RAN if RAN[name].content["layers_run"] == 2]
    assert f"{len(parts)} of them ran some of the layers. 0 failed" in told


def test_decisions_tell_the_seconds_of_weights_at_once_and_in_parts_as_recorded() -> None:
    text = " ".join((tier_runs.RUNS.parents[2] / "docs" / "decisions.md").read_text(encoding="utf-8").split())
    folder, told = tier_runs.RUNS.parent / "others" / "weights-in-parts", []
    for path in sorted((folder / "at-once").iterdir()):
        ways = [json.loads((folder / way / path.name).read_text(encoding="utf-8")) for way in ("at-once", "in-parts")]
        assert [way["revision"][:7] for way in ways] == ["fef2231", "6e970c4"] and ways[0]["plan"] == ways[1]["plan"]
        seconds = " and ".join(f"{way['step_seconds']['median']:.2f}" for way in ways)
        told.append(f"{path.stem.removeprefix('h200-8gib-')} {seconds}")
    assert len(told) == 4 and all(each in text for each in told)


def test_the_page_tells_the_seconds_of_runs_that_were_made_twice() -> None:
    again = read_records(tier_runs.AGAIN)
    assert {record.name for record in again} < {record.name for record in tier_runs.timed()}
    for record in again:
        first, second = RAN[record.name].step[0], record.step[0]
        assert (
            first and second and f"{record.name} {second:.2f} s (" in section() and f" and {first:.2f} s" in section()
        )
