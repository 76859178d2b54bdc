"""`plan validate`: what is run, what is counted, where it is written, and what is said of it."""

from __future__ import annotations

import json
import subprocess
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from cli_fixture import Capture, answered, mistakes
from trainer_tiny import save_model

from planner import validating
from planner.cli import main
from planner.errors import PlanError
from planner.measurements import Failure, Record, Spread, read_failures, read_record
from planner.planning import Request, make_plan
from planner.units import MIB
from planner.validating import Job, card_here, done_before, how_for, job_of, run_apart, validate
from planner.validation_page import page as made_page
from planner.validation_report import document, sentences
from reports.render.records import FOLDER as RECORDS
from reports.render.records import on_cards, records
from trainer.allocator import rounded_up
from trainer.device import allocator_settings, rehearsing, take_device
from trainer.fake_step import counted

SMALL = Request("rtx2060s", "random:llama-3.2-1b", total_tokens=1024)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny") / "model"
    save_model("llama", folder)
    return folder


def test_a_plan_is_run_on_the_cpu_and_its_record_tells_of_it(tiny: Path, tmp_path: Path, capsys: Capture) -> None:
    words = ("--gpu", "cpu", "--model", str(tiny), "--context", "64", "--set", "lora.rank=4")
    out = tmp_path / "records"
    found = answered(capsys, "validate", *words, "--out", str(out), "--json")
    (run,) = found["runs"]
    assert (run["how"], run["total_tokens"], run["within_bound"], found["failed"]) == ("run", 64, True, [])
    record = read_record(out / f"{run['name']}.json")
    assert record.content["evaluation"]["after"]["rows"] == 1 and len(record.content["losses"]) == 2
    frozen = record.content["plan"] | {"train": record.content["plan"]["train"] | {"data": None, "out": "run"}}
    assert frozen["memory"]["gpu"]["budget_bytes"] == record.predicted["high_bytes"]  # held to its bound
    assert (out / "plans" / f"{run['name']}.yaml").is_file()
    assert found["summary"]["allocated"]["count"] == 1 and "reserved" not in found["summary"]
    # What is done already is found again and not run, unless it is asked for.
    before = (out / f"{run['name']}.json").stat().st_mtime_ns
    assert main(["validate", *words, "--out", str(out)]) == 0
    assert "run before" in capsys.readouterr().out
    assert (out / f"{run['name']}.json").stat().st_mtime_ns == before
    # A record of other settings by the same name is no answer.
    assert (
        "of a plan with other settings"
        in mistakes(capsys, "validate", *words[:-1], "lora.rank=8", "--out", str(out))[0]
    )
    assert main(["validate", "--report", str(out)]) == 0
    assert "More than the bound of the card: none." in capsys.readouterr().out


@pytest.mark.parametrize("four_bit", ["--with", "--without"])
def test_a_model_in_a_folder_is_counted_by_its_shape(
    tiny: Path, tmp_path: Path, capsys: Capture, four_bit: str
) -> None:
    words = ("--rehearse", "rtx2060s", "--model", str(tiny), "--context", "256", four_bit, "nf4_weights", "--count")
    found = answered(capsys, "validate", *words, "--out", str(tmp_path), "--json")
    assert found["summary"]["allocated"]["largest"] < 0.01 and not found["failed"]


def test_a_count_takes_no_disk(tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = ("--rehearse", "rtx2060s", "--model", "llama-3.2-1b", "--context", "4K", "--with", "checkpoint_disk")
    # More than any machine of ours has.
    found = answered(capsys, "validate", *words, "--disk", "9000TiB", "--count", "--json")
    assert found["summary"]["allocated"]["largest"] < 0.01 and not found["failed"]


@pytest.mark.parametrize("executor", ["resident", "streamed"])
def test_where_there_is_no_card_bytes_are_counted(tmp_path: Path, capsys: Capture, executor: str) -> None:
    on = "--with" if executor == "streamed" else "--without"
    words = ("--rehearse", "rtx2060s", "--model", "llama-3.2-1b", "--context", "1K", on, "streamed", "--count")
    found = answered(capsys, "validate", *words, "--out", str(tmp_path), "--json")
    (run,) = found["runs"]
    assert (run["how"], run["executor"]) == ("counted", executor)
    assert run["layers_run"] == (2 if executor == "streamed" else 16)
    record = read_record(tmp_path / f"{run['name']}.json")
    assert record.allocated == pytest.approx(record.expected, rel=0.01)
    peak = record.content["plan"]["memory"]["gpu"]["peak_bytes"]
    assert record.predicted == {f"{name}_bytes": size for name, size in peak.items()}
    # Of the bound the workspaces, which are not seen, are taken off.
    assert record.over == record.allocated + peak["expected"] - record.expected - peak["high"] < 0
    host = record.content["measured"]["host"]["pinned_bytes"], record.content["predicted"]["host"]["pinned_bytes"]
    assert host[0] == host[1] and ("pinned" in found["summary"]) == (executor == "streamed")
    assert "host" not in found["summary"] and "time" not in found["summary"]


def test_a_plan_file_is_put_to_the_test_as_it_stands_but_for_its_length_of_training(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    plan = make_plan(replace(SMALL, model="llama-3.2-1b", train={"steps": 900}))
    file.write_text(plan.to_yaml(), encoding="utf-8")
    assert main(["validate", str(file), "--out", str(tmp_path / "out"), "--count"]) == 0
    record = read_record(tmp_path / "out" / "mine.json")
    assert record.content["plan"]["train"]["steps"] == 2
    assert record.content["model"]["source"] == "random:llama-3.2-1b"  # nothing is downloaded
    assert record.content["plan"]["memory"] == plan.document()["memory"]


def test_counting_some_layers_of_a_streamed_model_finds_what_all_of_them_take() -> None:
    plan = make_plan(replace(SMALL, required=("streamed",)))
    some, whole = counted(plan, 2), counted(plan)
    assert (some.layers, whole.layers) == (2, 16)
    assert max(some.phases.values()) == pytest.approx(max(whole.phases.values()), rel=1e-4)
    assert some.pinned == whole.pinned


def test_a_run_that_fails_leaves_all_that_it_said_and_no_record(tiny: Path, tmp_path: Path, capsys: Capture) -> None:
    words = ["validate", "--gpu", "cpu", "--model", str(tiny), "--context", "64", "--out", str(tmp_path / "out")]
    plan = make_plan(Request("cpu", str(tiny), total_tokens=64, train={"steps": 2}))
    lost = plan.model_copy(update={"model": plan.model.model_copy(update={"source": str(tmp_path / "gone")})})
    name = job_of(plan, "run").name
    made = run_apart(Job(name, lost, "run"), _written(lost, tmp_path), tmp_path, None)
    assert isinstance(made, Failure) and "gone" in made.told
    assert "gone" in (tmp_path / f"{name}.failed.txt").read_text() and not (tmp_path / f"{name}.json").exists()
    assert main(["validate", "--report", str(tmp_path)]) == 1
    assert f"No record: {name}" in capsys.readouterr().out.replace("\n", " ")
    late = run_apart(Job(name, plan, "run"), _written(plan, tmp_path), tmp_path, None, limit_seconds=0.01)
    assert isinstance(late, Failure) and "stopped after" in late.told
    # A run that works takes the mark of the failure away.
    assert main([*words[:-1], str(tmp_path)]) == 0
    assert not (tmp_path / f"{name}.failed.txt").exists()


def _written(plan: Any, folder: Path) -> Path:
    file = folder / "plan.yaml"
    file.write_text(plan.to_yaml(), encoding="utf-8")
    return file


def test_what_was_done_before_answers_the_same_question_alone(tmp_path: Path) -> None:
    plan = make_plan(replace(SMALL, required=("streamed",)))
    job = job_of(plan, "count", "one")
    assert done_before(job, tmp_path, None) is None
    made = run_apart(job, _written(job.plan, tmp_path), tmp_path, job.layers)
    assert isinstance(made, Record) and done_before(job, tmp_path, None) == made
    assert done_before(replace(job, how="rehearse"), tmp_path, None) is None  # more than counting can be done
    with pytest.raises(PlanError, match="is of 2 layers, and 4 are asked for"):
        done_before(job, tmp_path, 4)
    other = job_of(make_plan(replace(SMALL, required=("streamed",), total_tokens=2048)), "count", "one")
    with pytest.raises(PlanError, match="other settings"):
        done_before(other, tmp_path, None)
    old = made.content["environment"] | {"packages": made.content["environment"]["packages"] | {"torch": "1.0"}}
    (tmp_path / "one.json").write_text(json.dumps(made.content | {"environment": old}), encoding="utf-8")
    with pytest.raises(PlanError, match=r"was made with torch 1\.0"):
        done_before(job, tmp_path, None)
    # What is run again and fails has no record any more.
    lost = job.plan.model_copy(update={"model": job.plan.model.model_copy(update={"source": "random:nowhere"})})
    assert isinstance(run_apart(Job("one", lost, "count"), _written(lost, tmp_path), tmp_path, 2), Failure)
    assert not (tmp_path / "one.json").exists()


def test_a_child_that_is_killed_is_said_to_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ended = subprocess.CompletedProcess([], -9, "Training: 1 document\n", "")
    monkeypatch.setattr(validating, "_child", lambda *_, **__: ended)
    made = run_apart(Job("one", make_plan(SMALL), "run"), tmp_path / "plan.yaml", tmp_path, None)
    assert made == Failure("one", "no record was made: it was ended by signal 9.")
    assert "Training: 1 document" in (tmp_path / "one.failed.txt").read_text(encoding="utf-8")
    assert read_failures(tmp_path) == (made,)


def test_all_predictions_are_written_before_the_first_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[set[str]] = []

    def nothing_runs(job: Job, *_: Any) -> Failure:
        seen.append({path.stem for path in (tmp_path / "plans").iterdir()})
        return Failure(job.name, "not run")

    monkeypatch.setattr(validating, "run_apart", nothing_runs)
    jobs = [Job(name, make_plan(SMALL), "run") for name in ("one", "other")]
    told = list(validate(jobs, tmp_path))
    assert [job.name for job, _, _ in told] == ["one", "other"] and seen == [{"one", "other"}] * 2


def test_what_is_done_with_a_plan_depends_on_the_card_that_is_here() -> None:
    plan, on_cpu = make_plan(SMALL), make_plan(Request("cpu", "smollm2-135m", total_tokens=64))
    assert how_for(on_cpu, "Any", rehearse=False, count=False) == "run"
    assert how_for(plan, "", rehearse=False, count=False) == "count"
    assert how_for(plan, "nvidia  geforce RTX 2060 super", rehearse=False, count=False) == "run"
    assert how_for(plan, "NVIDIA H200", rehearse=True, count=False) == "rehearse"
    assert how_for(plan, "NVIDIA H200", rehearse=True, count=True) == "count"
    for asked in ({"rehearse": True, "count": False}, {"rehearse": False, "count": True}):
        with pytest.raises(PlanError, match="the plan is for the CPU"):
            how_for(on_cpu, "NVIDIA H200", **asked)
    with pytest.raises(PlanError, match=r"this machine has a NVIDIA H200.*--rehearse rtx2060s"):
        how_for(plan, "NVIDIA H200", rehearse=False, count=False)
    assert card_here() == (torch.cuda.get_device_name(0) if torch.cuda.is_available() else "")


def test_another_card_stands_in_only_while_a_plan_is_rehearsed_and_is_held_to_its_budget(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plan, held = make_plan(SMALL), []
    card = SimpleNamespace(name="NVIDIA H200", total_memory=10 * plan.memory.gpu.budget_bytes)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: card)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda share, _: held.append(share))
    with pytest.raises(PlanError, match="this machine has a NVIDIA H200"):
        take_device(plan)
    with rehearsing():
        assert take_device(plan) == torch.device("cuda", 0)
        budget = plan.memory.gpu.budget_bytes
        assert held == [pytest.approx((budget - rounded_up(allocator_settings())) / card.total_memory)]
        assert rounded_up(allocator_settings()) > 0, "the trainer's own settings"
        card.total_memory = plan.memory.gpu.peak_bytes.high
        with pytest.raises(PlanError, match="Only a card with more memory"):
            take_device(plan)
    with pytest.raises(PlanError, match="this machine has a NVIDIA H200"):
        take_device(plan)


def test_a_rehearsal_takes_the_workspace_of_the_planned_card() -> None:
    turing, hopper = make_plan(SMALL), make_plan(replace(SMALL, gpu="h200-sxm"))
    # cuBLAS reads pairs of KiB and counts.
    for plan, size in ((turing, 2 * 4096 + 8 * 16), (hopper, 32_768)):
        (config,) = validating._like(plan).values()
        numbers = list(map(int, config.removeprefix(":").split(":")))
        assert sum(kib * count for kib, count in zip(numbers[::2], numbers[1::2], strict=True)) == size
        # Where autograd computes in a thread of its own, that has one too.
        assert max(terms.get("runtime/workspace", 0) for terms in plan.memory.gpu.phases.values()) in (
            size << 10,
            size << 11,
        )


def test_what_is_said_of_records_is_what_they_hold() -> None:
    spread = Spread.of([(90.0, 100.0), (101.0, 100.0), (100.0, 100.0), (130.0, 100.0)])
    assert spread is not None and (spread.count, spread.under) == (4, 1)
    assert (spread.median, spread.percentile_95, spread.largest) == pytest.approx((0.055, 0.3, 0.3))
    assert Spread.of([]) is None
    found = on_cards(records())
    said = document(found, [])["summary"]
    assert said["reserved"]["under"] == sum(record.over > 0 for record in found) == 1
    assert said["host"]["under"] == sum(record.host_over > 0 for record in found)
    assert said["allocated"]["under"] == sum(record.error < 0 for record in found)
    stood_in = [Record(each.name, each.content | {"how": "rehearsed"}) for each in found]
    assert not {"driver", "time"} & document(stood_in, [])["summary"].keys()  # those are of the card that stands in
    assert said["driver"]["count"] == sum(record.measured["driver_bytes"] is not None for record in found)
    (over,) = (record.name for record in found if record.over > 0)
    assert f"More than the bound of the card: {over}." in sentences(found, [])
    assert main(["validate", "--report", str(RECORDS)]) == 1


def test_a_file_that_is_no_record_is_named(tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "odd.failed.txt").write_bytes(b"\xff\xfe")
    for odd in ({"model": {}}, [], {"model": {"id": "a"}, "total_tokens": 3, "predicted": {"gpu": {}}}):
        (tmp_path / "odd.json").write_text(json.dumps(odd), encoding="utf-8")
        assert "odd.json: is no record of a run" in mistakes(capsys, "validate", "--report", str(tmp_path))[0]
    with pytest.raises(PlanError, match="cannot be read"):
        read_record(tmp_path / "missing.json")
    assert Record("a", {"total_tokens": 7}).tokens == 7


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("", "names neither a plan nor a card"),
        ("--gpu rtx2060s --rehearse rtx3090", "each names the card to plan for"),
        ("--rehearse rtx2060x", "Did you mean rtx2060 or rtx2060s"),
        ("--report nowhere", "is no folder"),
        ("--report . --rehearse rtx2060s", "runs nothing"),
        ("nofile.yaml", "cannot be read"),
        ("nofile.yaml --model phi-2", "a plan file is complete already"),
        ("--rehearse rtx2060s --context 8X", "a count takes K"),
        ("--rehearse rtx2060s --model phi-9", "Did you mean phi-4 or phi-2"),
        ("--gpu cpu --layers none", "is no number of layers"),
        ("--gpu cpu --model smollm2-135m --context 64 --count", "the plan is for the CPU"),
        ("--rehearse cpu --model smollm2-135m --context 64", "the plan is for the CPU"),
        ("--report . --again", "runs nothing"),
        (
            "--gpu rtx2060s --model llama-3.1-70b --context 512K --count",
            "there is nothing to run. llama-3.1-70b on NVIDIA GeForce RTX 2060 SUPER does not fit",
        ),
    ],
)
def test_a_mistake_is_explained(words: str, told: str, tmp_path: Path, capsys: Capture) -> None:
    out = [] if "--report" in words else ["--out", str(tmp_path / "out")]
    assert any(told in line for line in mistakes(capsys, "validate", *words.split(), *out))
    assert not (tmp_path / "out").exists()


def test_a_page_is_made_of_records_and_nothing_else_is_overwritten(tmp_path: Path, capsys: Capture) -> None:
    page = tmp_path / "found.md"
    assert main(["validate", "--report", str(RECORDS / "grid"), "--out", str(page)]) == 1  # some left no record
    assert {path.name for path in tmp_path.iterdir()} == {
        "found.md",
        *(f"found-{name}.svg" for name in ("measured", "errors", "bounds", "phases")),
    }
    text = page.read_text(encoding="utf-8")
    for name in ("measured", "errors", "bounds", "phases"):
        assert f"](found-{name}.svg)" in text
        assert ElementTree.parse(tmp_path / f"found-{name}.svg").getroot().tag.endswith("svg")
    many = len(list((RECORDS / "grid").glob("*.json")))
    assert text.count("\n| h200-") + text.count("\n| rtx") == many and "## Phase by phase" in text
    # Once more, of other records: pictures of peaks alone, as nothing was reserved and no run was held out.
    assert main(["validate", "--report", str(RECORDS / "counted"), "--out", str(page)]) == 0
    assert not (tmp_path / "found-bounds.svg").exists()
    assert "found-bounds.svg" not in page.read_text(encoding="utf-8") and "Every run" in page.read_text(
        encoding="utf-8"
    )
    capsys.readouterr()
    (tmp_path / "mine.md").write_text("# My notes\n", encoding="utf-8")
    (tmp_path / "new-errors.svg").write_text("mine", encoding="utf-8")
    for name, why in (("mine.md", "no such page"), ("new.md", "a picture that is there"), ("new.txt", "no name of a")):
        words = ("validate", "--report", str(RECORDS / "grid"), "--out", str(tmp_path / name))
        assert any(why in line for line in mistakes(capsys, *words)), name
    assert (tmp_path / "mine.md").read_text(encoding="utf-8") == "# My notes\n"
    assert (tmp_path / "new-errors.svg").read_text(encoding="utf-8") == "mine" and not (tmp_path / "new.md").exists()
    for name, why in ((".", "is a folder"), ("/", "is a folder"), ("-", "is no file name here"), ("..", "is a folder")):
        words = ("validate", "--report", str(RECORDS / "grid"), "--out", name)
        assert any(why in line for line in mistakes(capsys, *words)), name
    gone = tmp_path / "gone" / "page.md"
    assert "no folder" in mistakes(capsys, "validate", "--report", str(RECORDS), "--out", str(gone))[0]


def test_a_run_that_is_held_to_less_than_its_bound_says_nothing_of_the_bound() -> None:
    more = "1.14 GiB more were asked for in the phase backward, while tensors held 6.85 GiB"
    told = (
        f"59,648 tokens on NVIDIA H200: ran out of memory, though the plan's bound is {{}}: {more}, of 8 GiB allowed."
    )
    less, held = Failure("beyond", told.format("8.29 GiB")), Failure("held", told.format("8 GiB"))
    assert less.held_to_less and not less.out_of_memory
    assert held.out_of_memory and not held.held_to_less
    lines = sentences([], [less, held])
    assert "1 run more ran out of memory, held to less than the bound to see whether it takes it: beyond." in lines
    assert "More than the bound of the card: held." in lines


def test_a_run_that_had_too_little_counts_as_one_whose_bound_was_too_low() -> None:
    found = [record for record in on_cards(records()) if record.over <= 0]
    short, other = (
        Failure("short", "ran out of memory, though the plan's bound is 2.00 GiB"),
        Failure("lost", "no file"),
    )
    told = sentences(found, [short, other])
    assert "1 run more ran out of memory and left no record: there the bound was too low." in told
    assert "More than the bound of the card: short." in told
    assert short.out_of_memory and not other.out_of_memory
    retried = sum(record.retries > 0 for record in found)
    assert any(line.startswith(f"In {retried} runs the allocator came to the limit") for line in told)


def test_what_was_taken_before_a_run_was_held_to_its_bound_is_told_apart() -> None:
    one, other, third = [record for record in on_cards(records()) if record.over <= 0 and record.held_to_bound][:3]
    assert one.before_held is None and one.over_before_held is None
    assert not any("whole budget" in line or "whole card's budget" in line for line in sentences([one, other], []))
    assert "whole budget" not in made_page([one, other], [], {})
    more, less = (_held_late(record, size) for record, size in ((one, 3 * MIB), (other, -MIB)))
    assert (more.over_before_held, less.over_before_held) == (3 * MIB, -MIB)
    assert (more.over, more.step) == (one.over, one.step), "what counts is of the part that was held"
    told = (
        "With the whole card's budget the allocator took more than the bound in 1 of 2 runs, by at most 3.00 MiB; held "
        "to the bound afterwards, 1 of these went on within it. It came to that budget, and gave memory back, in 0 "
        "runs."
    )
    assert told in sentences([more, less, third], [])
    assert any("more than the bound in 0 of 1 run. It came" in line for line in sentences([less], []))
    said = (
        "Of 3 runs all had no more memory than the bound of their plan, 1 from the first step on and 2 in the last 2 "
    )
    assert said in made_page([more, less, third], [], {})
    unknown = _held_late(one, None)
    assert unknown.over_before_held is None and not any("whole card's" in line for line in sentences([unknown], []))


def _held_late(record: Record, over: int | None) -> Record:
    """The record as of a run whose last two steps were held, and that took so much more than the bound before."""
    size = None if over is None else record.predicted["high_bytes"] + over
    steps = len(record.content["step_seconds"]["each"]) - 2
    before = {"steps": steps, "reserved_bytes": size, "driver_bytes": None, "retries": 0}
    return Record(record.name, record.content | {"measured": record.content["measured"] | {"before_held": before}})


def test_some_runs_of_a_page_are_told_by_themselves_as_well() -> None:
    found = on_cards(records())
    some = {record.name for record in found[:5]}
    short = Failure("short", "ran out of memory")
    text = made_page(found, [short], {}, failed={"some": 1}, within={"some": some, "none": {"no-such-run"}})
    models = len({record.content["model"]["id"] for record in found[:5]})
    assert f"### some: 5 runs of {models} models" in text and "### none" not in text
    assert " and 1 that failed |" in text.partition("### some: ")[2]
    assert "### some" not in made_page(found, [], {})
