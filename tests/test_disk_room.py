"""The disk that a run trains with: planned only with leave, and asked for before anything is loaded."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from trainer_tiny import make_plan as tiny_plan
from trainer_tiny import save_model, write_sources

from planner.cli import main
from planner.cli_check import differences, planned_again, same_settings
from planner.cli_output import write_plan
from planner.errors import PlanError
from planner.optimizations import all_optimizations
from planner.plan import DiskMemory, Plan
from planner.plan_file import load_plan
from planner.planning import Request, make_plan
from planner.units import GIB
from trainer import disk_room, run
from trainer.disk_room import check_disk, file_system, scratch_folder
from trainer.saving import fingerprint

Capture = pytest.CaptureFixture[str]


def planned(**asked: object) -> Plan:
    return make_plan(Request(gpu="rtx2060s", **asked))  # type: ignore[arg-type]


def test_none_is_used_without_leave() -> None:
    plan = planned(tier=7)
    assert plan.memory.disk.training_bytes == plan.memory.disk.budget_bytes == 0 and "no disk offload" in plan.summary
    assert (
        next(each for each in plan.rejected if each.id == "checkpoint_disk").reasons[0].startswith("uses a disk only")
    )
    with pytest.raises(PlanError, match=r"--with checkpoint_disk.*only with leave"):
        planned(required=("checkpoint_disk",))


def test_with_a_disk_tier_eight_fits_the_reference_card() -> None:
    assert planned(tier=8).verdict == "does-not-fit"
    plan = planned(tier=8, disk_bytes=200 * GIB)
    assert plan.verdict == "fits" and "200 GiB of disk" in plan.summary and plan.total_tokens == 589_824
    disk, phases = plan.memory.disk, plan.time.phases
    inputs = (32 - 2) * 589_824 * 2560 * 2
    assert disk.training_bytes == disk.terms["activations/stored"] == inputs, "whole pages, as it happens"
    assert phases["forward"].disk_bytes == phases["backward"].disk_bytes == inputs
    assert disk.peak_bytes == inputs + disk.terms["adapters/file"]
    assert plan.memory.host.terms["activations/checkpoints"] == 2 * 589_824 * 2560 * 2
    assert "checkpoint_int8" not in {choice.id for choice in plan.choices}, "nothing has to be rounded"


def test_a_small_disk_gets_what_fits_on_it() -> None:
    plan = planned(tier=8, disk_bytes=50 * GIB)
    assert plan.verdict == "fits" and plan.memory.disk.training_bytes <= 50 * GIB
    assert {"checkpoint_disk", "checkpoint_int8"} <= {choice.id for choice in plan.choices}, "inputs are smaller on it"


def test_a_plan_file_with_a_disk_is_planned_again_as_it_is(tmp_path: Path) -> None:
    plan, place = planned(tier=8, disk_bytes=200 * GIB), tmp_path / "plan.yaml"
    write_plan(plan, place)
    assert load_plan(place) == plan and make_plan(same_settings(plan, "rtx2060s")).memory == plan.memory
    assert not list(differences(plan, planned_again(load_plan(place))))


def test_scratch_may_move_to_another_disk_when_a_run_goes_on() -> None:
    plan = planned(tier=8, disk_bytes=200 * GIB)
    moved = plan.model_copy(update={"train": plan.train.model_copy(update={"scratch": "/elsewhere"})})
    other = plan.model_copy(update={"train": plan.train.model_copy(update={"seed": 5})})
    assert fingerprint(moved) == fingerprint(plan) != fingerprint(other)


def test_a_refusal_says_how_much_disk_would_do() -> None:
    told = [line for line in planned(tier=8).nearest if line.startswith("--disk")]
    assert len(told) == 1
    gib = int(told[0].split()[1].removesuffix("GiB"))
    fitting = planned(tier=8, disk_bytes=gib * GIB)
    assert fitting.verdict == "fits"
    rounded = not all(all_optimizations()[choice.id].exact for choice in fitting.choices)
    assert rounded is ("with settings that change the result" in told[0]) is True
    assert planned(tier=8, disk_bytes=(gib - 1) * GIB).verdict == "does-not-fit", "it is the least"


def test_the_command_line_takes_it(capsys: Capture) -> None:
    assert main(["--gpu", "rtx2060s", "--tier", "8", "--disk", "200GiB"]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "Scratch 84.38 GiB of 200 GiB on disk while it trains" in told and "written and read anew" in told
    assert main(["--gpu", "rtx2060s", "--tier", "8", "--disk", "much"]) == 2
    assert "--disk much" in capsys.readouterr().err
    assert main(["tiers", "--gpu", "rtx2060s", "--disk", "200GiB", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["tiers"]
    assert [row["tier"] for row in rows if row["fits"]] == [1, 2, 3, 4, 5, 6, 7, 8]


def small(tmp_path: Path, *, size: int, scratch: str = "") -> Plan:
    plan = tiny_plan(tmp_path, data=str(tmp_path / "data"), out=str(tmp_path / "out"), scratch=scratch)
    disk = DiskMemory(budget_bytes=size, training_bytes=size, peak_bytes=size, terms={"activations/stored": size})
    return plan.model_copy(update={"memory": plan.memory.model_copy(update={"disk": disk})})


@pytest.fixture
def model(tmp_path: Path) -> Path:
    save_model("llama", tmp_path)
    write_sources(tmp_path / "data")
    return tmp_path


def test_too_little_room_is_refused_before_anything_is_loaded(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=3 * GIB))
    monkeypatch.setattr(run, "build", lambda _: pytest.fail("the model was loaded"))
    with pytest.raises(PlanError, match=r"has 3\.00 GiB free") as refused:
        run.execute(small(model, size=4 * GIB))
    assert "--disk 3GiB" in refused.value.nearest and "train.scratch" in refused.value.nearest
    check_disk(small(model, size=3 * GIB))


def test_what_the_run_leaves_on_the_same_disk_counts(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=5 * GIB))
    plan = small(model, size=3 * GIB)
    plan.memory.disk.terms["merging/model"] = 3 * GIB
    with pytest.raises(PlanError, match=r"3\.00 GiB of disk .* and 3\.00 GiB that the run leaves there") as refused:
        check_disk(plan)
    assert "--disk 2GiB" in refused.value.nearest


def test_memory_is_no_disk(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk_room, "file_system", lambda _: "tmpfs")
    with pytest.raises(PlanError, match=r"no disk but memory \(tmpfs\)"):
        check_disk(small(model, size=1))
    check_disk(small(model, size=0))


@pytest.mark.skipif(not os.path.isdir("/dev/shm"), reason="no memory that looks like a disk")
def test_memory_is_known_by_its_file_system(tmp_path: Path) -> None:
    assert file_system(Path("/dev/shm")) == "tmpfs"
    assert file_system(Path("/proc")) == "proc" and file_system(tmp_path) != ""


def test_scratch_lies_where_it_is_told(model: Path, tmp_path: Path) -> None:
    assert scratch_folder(small(model, size=1)) == model / "out"
    assert scratch_folder(small(model, size=1, scratch="~/there")) == Path("~/there").expanduser()
