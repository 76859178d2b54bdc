"""Plan files written and run: whole or not at all, unchanged, and never over something else."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from cli_fixture import Capture, Patch, mistakes, planning_gives, trainer_that
from plan_fixture import example_plan, too_long_plan

import planner.machine
import planner.planning
from planner.calibration import calibration
from planner.cli import main
from planner.cli_output import write_plan
from planner.errors import PlanError
from planner.plan import Plan
from planner.plan_file import load_plan
from planner.planning import Request, make_plan


def test_out_writes_the_plan_and_equal_plans_give_equal_bytes(
    monkeypatch: Patch, tmp_path: Path, capsys: Capture
) -> None:
    planning_gives(monkeypatch, example_plan())
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    assert main(["--gpu", "rtx2060s", "--out", str(first)]) == 0
    assert str(first) in "".join(capsys.readouterr().out.split())
    assert main(["--gpu", "rtx2060s", "--json", "--out", str(second)]) == 0
    json.loads(capsys.readouterr().out)
    assert first.read_bytes() == second.read_bytes()
    assert load_plan(first) == example_plan()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first.yaml", "second.yaml"]


def test_out_replaces_a_plan_but_nothing_else(monkeypatch: Patch, tmp_path: Path, capsys: Capture) -> None:
    planning_gives(monkeypatch, example_plan())
    place = tmp_path / "plan.yaml"
    write_plan(too_long_plan(), place)
    assert main(["--gpu", "rtx2060s", "--out", str(place)]) == 0
    assert load_plan(place).verdict == "fits"
    capsys.readouterr()
    for text in ("my notes\n", "schema: tierplan/0\n", "a: b\n", ""):
        place.write_text(text)
        assert "is not overwritten" in mistakes(capsys, "--gpu", "rtx2060s", "--out", str(place))[0]
        assert place.read_text() == text


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    place, link = tmp_path / "plan.yaml", tmp_path / "link.yaml"
    write_plan(example_plan(), place)
    link.symlink_to(place)
    write_plan(too_long_plan(), link)
    assert link.is_symlink() and load_plan(place).verdict == "does-not-fit"


def test_a_full_disk_leaves_the_old_plan_whole(tmp_path: Path, monkeypatch: Patch, capsys: Capture) -> None:
    planning_gives(monkeypatch, too_long_plan())
    place = tmp_path / "plan.yaml"
    write_plan(example_plan(), place)

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    told = mistakes(capsys, "--gpu", "rtx2060s", "--out", str(place))
    assert told == [f"error: --out {place}: cannot be written: No space left on device."]
    assert [path.name for path in tmp_path.iterdir()] == ["plan.yaml"]
    assert load_plan(place) == example_plan()


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs a folder that takes no files even from root")
def test_a_folder_that_takes_no_file_is_an_error_and_no_traceback(monkeypatch: Patch, capsys: Capture) -> None:
    planning_gives(monkeypatch, example_plan())
    assert "cannot be written" in mistakes(capsys, "--gpu", "rtx2060s", "--out", "/proc/plan.yaml")[0]


def test_a_plan_file_is_reported_as_it_is(tmp_path: Path, capsys: Capture) -> None:
    place = tmp_path / "plan.yaml"
    write_plan(too_long_plan(), place)
    assert main(["--plan", str(place)]) == 1
    assert capsys.readouterr().out.startswith("DOES NOT FIT")
    assert main(["--plan", str(place), "--json"]) == 1
    assert Plan.model_validate_json(capsys.readouterr().out) == too_long_plan()


def test_a_plan_file_is_run_unchanged(tmp_path: Path, monkeypatch: Patch) -> None:
    run: list[Plan] = []
    asked = trainer_that(monkeypatch, lambda plan: run.append(plan) or 130)
    place, plan = tmp_path / "plan.yaml", make_plan(Request(tier=1, train={"data": str(tmp_path)}))
    write_plan(plan, place)
    assert main(["--plan", str(place), "--execute"]) == 130
    assert main(["--plan", str(place), "--execute", "--resume"]) == 130
    assert main(["--plan", str(place), "--execute", "--replan"]) == 130
    assert run == [plan, plan, plan]
    no_kernel_anew = {"resume": False, "choose": False, "replan": "late"}
    assert asked == [no_kernel_anew, no_kernel_anew | {"resume": True}, no_kernel_anew | {"replan": "always"}]


def test_a_run_of_long_steps_is_stored_while_it_is_under_way_unless_the_user_says_otherwise() -> None:
    short, long = (make_plan(Request(gpu="rtx2060s", model="phi-2", total_tokens=n)) for n in (4096, 400 * 1024))
    assert (short.time.step_seconds.estimate or 0) < 1800 <= (long.time.step_seconds.estimate or 0)
    assert (short.train.save_minutes, long.train.save_minutes) == (0.0, 15.0)
    off = make_plan(Request(gpu="rtx2060s", model="phi-2", total_tokens=400 * 1024, train={"save_minutes": 0.0}))
    assert off.train.save_minutes == 0.0
    often = make_plan(Request(gpu="rtx2060s", model="phi-2", total_tokens=4096, train={"save_minutes": 1.0}))
    assert often.train.save_minutes == 1.0


def changed(plan: Plan, **settings: Any) -> Plan:
    """The plan with settings changed by hand, as an editor would leave it."""
    return plan.model_copy(update=settings)


def test_a_plan_whose_settings_were_changed_by_hand_is_not_run(
    tmp_path: Path, monkeypatch: Patch, capsys: Capture
) -> None:
    trainer_that(monkeypatch, lambda plan: pytest.fail("trained"))
    lean = ("gradient_checkpointing", "nf4_weights")  # room for the changed length as well
    plan = make_plan(Request(total_tokens=4096, required=lean, train={"data": str(tmp_path)}))
    place = tmp_path / "plan.yaml"
    write_plan(changed(plan, context=2048, target=4096, total_tokens=6144), place)
    told = mistakes(capsys, "--plan", str(place), "--execute")
    assert "its figures are not those of its settings: memory.gpu." in told[0]
    write_plan(changed(plan, context=0, target=2**20, total_tokens=2**20), place)
    assert main(["--plan", str(place), "--execute"]) == 1
    assert "Planned again today, the plan does not fit" in capsys.readouterr().err


def test_a_plan_made_with_other_facts_is_run_as_it_stands_with_a_word(
    tmp_path: Path, monkeypatch: Patch, capsys: Capture
) -> None:
    run: list[Plan] = []
    trainer_that(monkeypatch, lambda plan: run.append(plan) or 0)
    plan = make_plan(Request(tier=1, train={"data": str(tmp_path)}))
    gpu = plan.memory.gpu.model_copy(update={"budget_bytes": plan.memory.gpu.budget_bytes - 1})
    older = changed(
        plan,
        memory=plan.memory.model_copy(update={"gpu": gpu}),
        provenance=plan.provenance.model_copy(update={"profile_sha256": "0" * 64}),
    )
    place = tmp_path / "plan.yaml"
    write_plan(older, place)
    assert main(["--plan", str(place), "--execute"]) == 0
    assert run == [older]
    assert "the card's profile changed; planned again today it still fits" in capsys.readouterr().err


def edited(plan: Plan, *, raised: int = 0, budget: int = 0, high: int = 0, hashed: str = "") -> Plan:
    """The plan with a term, the budget or the bound changed by hand so that its sums are right, and a hash as well."""
    gpu, peak = plan.memory.gpu, plan.memory.gpu.peak_bytes
    phases = {phase: dict(terms) for phase, terms in gpu.phases.items()}
    phases[gpu.peak_phase]["activations/mlp"] += raised
    expected = peak.expected + raised
    bound = expected + calibration().reserve_bytes(expected, "gpu") if raised else peak.high + high
    memory = gpu.model_copy(
        update={
            "phases": phases,
            "budget_bytes": gpu.budget_bytes + budget,
            "peak_bytes": peak.model_copy(update={"expected": expected, "high": bound}),
        }
    )
    provenance = plan.provenance.model_copy(update={hashed: "0" * 64} if hashed else {})
    return changed(plan, memory=plan.memory.model_copy(update={"gpu": memory}), provenance=provenance)


@pytest.mark.parametrize("hashed", ["", "profile_sha256", "calibration_sha256"])
@pytest.mark.parametrize("how", [{"raised": -(2**20)}, {"budget": -(2**20)}, {"high": 2**20}])
def test_a_figure_changed_with_a_hash_that_has_no_part_in_it_is_noticed(
    hashed: str, how: dict[str, int], tmp_path: Path, monkeypatch: Patch, capsys: Capture
) -> None:
    trainer_that(monkeypatch, lambda plan: 0)
    plan = make_plan(Request(tier=1, train={"data": str(tmp_path)}))
    place = tmp_path / "plan.yaml"
    write_plan(edited(plan, hashed=hashed, **how), place)
    explains = {"budget": "profile_sha256", "high": "calibration_sha256"}
    if explains.get(next(iter(how))) == hashed:  # that much can have followed from it
        assert main(["--plan", str(place), "--execute"]) == 0
        return
    told = mistakes(capsys, "--plan", str(place), "--execute")
    assert "its figures are not those of its settings: memory.gpu." in told[0]
    assert ("That is not for" in told[0]) is bool(hashed)


def test_data_fills_a_plan_that_names_none_and_changes_no_other(
    tmp_path: Path, monkeypatch: Patch, capsys: Capture
) -> None:
    run: list[Plan] = []
    trainer_that(monkeypatch, lambda plan: run.append(plan) or 0)
    place, plan = tmp_path / "plan.yaml", make_plan(Request(tier=1))
    write_plan(plan, place)
    assert "there is nothing to train on" in mistakes(capsys, "--plan", str(place), "--execute")[0]
    assert main(["--plan", str(place), "--execute", "--data", str(tmp_path)]) == 0
    assert run == [plan.model_copy(update={"train": plan.train.model_copy(update={"data": str(tmp_path)})})]
    capsys.readouterr()
    write_plan(example_plan(train={"data": "elsewhere"}), place)
    told = mistakes(capsys, "--plan", str(place), "--execute", "--data", str(tmp_path))
    assert "a plan file is run unchanged" in told[0]


def test_what_does_not_fit_is_not_trained(tmp_path: Path, monkeypatch: Patch, capsys: Capture) -> None:
    planning_gives(monkeypatch, too_long_plan())
    trainer_that(monkeypatch, lambda plan: pytest.fail("trained"))
    assert main(["--gpu", "rtx2060s", "--execute", "--data", str(tmp_path)]) == 1
    told = capsys.readouterr().err
    assert told == f"error: --execute: nothing was trained. {too_long_plan().summary}\n"


def test_without_the_train_extra_training_says_how_to_get_it(
    tmp_path: Path, monkeypatch: Patch, capsys: Capture
) -> None:
    planning_gives(monkeypatch, example_plan())
    monkeypatch.setitem(sys.modules, "trainer.run", None)
    assert main(["--gpu", "rtx2060s", "--execute", "--data", str(tmp_path)]) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: --execute: training needs the train extra")
    assert told.endswith("pip install 'tierplan[train]' brings it.\n")


def test_a_mistake_found_while_training_is_told(tmp_path: Path, monkeypatch: Patch, capsys: Capture) -> None:
    def fail(plan: Plan) -> int:
        raise PlanError("the tokenizer", "is missing.")

    planning_gives(monkeypatch, example_plan())
    trainer_that(monkeypatch, fail)
    assert main(["--gpu", "rtx2060s", "--execute", "--data", str(tmp_path)]) == 2
    assert capsys.readouterr().err == "error: the tokenizer: is missing.\n"


def test_execute_without_a_card_named_plans_for_this_machine(
    tmp_path: Path, monkeypatch: Patch, capsys: Capture
) -> None:
    requests = planning_gives(monkeypatch, example_plan())
    asked = trainer_that(monkeypatch, lambda plan: 0)
    monkeypatch.setattr(planner.machine, "detect_local", lambda: object())
    assert main(["--execute", "--data", str(tmp_path)]) == 0

    def none_here() -> None:
        raise PlanError("--gpu local", "no driver answers here.")

    monkeypatch.setattr(planner.machine, "detect_local", none_here)
    assert main(["--execute", "--data", str(tmp_path)]) == 0
    assert [request.gpu for request in requests] == ["local", "cpu"]
    assert asked == [{"resume": False, "choose": True, "replan": "late"}] * 2
    told = capsys.readouterr().err
    assert told == "No card to train on: no driver answers here. Planning for the CPU.\n"


def test_a_plan_for_a_card_of_ones_own_finds_its_profile_again(
    monkeypatch: Patch, tmp_path: Path, capsys: Capture
) -> None:
    card, place = tmp_path / "mine.yaml", tmp_path / "plan.yaml"
    shipped = (Path(planner.__file__).parents[1] / "hwprofiles" / "rtx2060s.yaml").read_text(encoding="utf-8")
    card.write_text(shipped.replace("id: rtx2060s", "id: mine", 1), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    assert main(["--gpu", "mine.yaml", "--tier", "1", "--out", str(place)]) == 0
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert main(["check", str(place)]) == 0
    card.unlink()
    capsys.readouterr()
    (told,) = mistakes(capsys, "check", str(place))
    assert f"card mine: its profile {card} is not there any more." in told and "check FILE --gpu CARD" in told
