"""Runs that are stopped anywhere and gone on with end as if nobody had stopped them, to the last bit."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from run_folder import lines
from trainer_tiny import make_plan, save_model, write_sources

from planner.errors import PlanError
from planner.optimizations import all_optimizations
from planner.plan import Choice, Plan
from trainer import running, saving, stored_files
from trainer.output import RunFolder
from trainer.run import execute
from trainer.saving import FOLDER, STATE, Saver, digest, load
from trainer.streamed.loss import StreamedLoss

STREAMED: dict[str, dict[str, Any]] = {
    "lora": {"rank": 4, "alpha": 8},
    "chunked_loss": {"rows": 16},
    "streamed": {"chunk": 8, "heads": 2, "staging": "host", "kernel": "cpu"},
}
RESIDENT: dict[str, dict[str, Any]] = {
    "lora": {"rank": 4, "alpha": 8},
    "gradient_checkpointing": {},
    "chunked_loss": {"rows": 16},
    "exact_attention": {"kernel": "cpu"},
}
ALWAYS = 1e-9  # minutes: whenever there is a chance to
STEPS, PARTS, LAYERS = 2, 2, 3


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("resume")
    save_model("llama", folder / "model")
    write_sources(folder / "data")
    return folder


def _plan(place: Path, out: Path, choices: dict[str, dict[str, Any]] = STREAMED, **given: Any) -> Plan:
    options: dict[str, Any] = {
        "steps": STEPS,
        "lr": 1e-2,
        "batch": 2,
        "accumulation": PARTS,
        "evaluation_rows": 3,
        "validation": 0.25,
        "save_minutes": ALWAYS,
        "warmup": 0.5,
    }
    executor = "streamed" if "streamed" in choices else "resident"
    return make_plan(
        place / "model", data=str(place / "data"), out=str(out), choices=choices, executor=executor, **(options | given)
    )


@pytest.fixture(scope="module")
def whole(place: Path) -> Path:
    out = place / "whole"
    assert execute(_plan(place, out)) == 0
    return out


def _assert_same_run(out: Path, other: Path) -> None:
    varying = {"seconds", "tokens_per_second", "allocated_bytes"}
    one, two = ([{k: v for k, v in line.items() if k not in varying} for line in lines(each)] for each in (out, other))
    assert one == two
    name = "adapter/adapter_model.safetensors"
    assert (out / name).read_bytes() == (other / name).read_bytes()
    records = [json.loads((each / "measurement.json").read_text()) for each in (out, other)]
    for key in ("losses", "evaluation", "skipped_steps", "data"):
        assert records[0][key] == records[1][key]
    assert not (out / FOLDER).exists()


def _stopping(at: int) -> Callable[[StreamedLoss, int], None]:
    """Interrupts right after what is stored between the so many-th two layers of the training steps."""
    own, count = Saver._after_layer, 0

    def after(self: Any, layer: int) -> None:
        nonlocal count
        own(self, layer)
        if self._schedule is None:
            return  # the probe step
        count += 1
        if count == at:
            raise KeyboardInterrupt

    return after


@pytest.mark.parametrize("at", range(1, STEPS * PARTS * LAYERS + 1))
def test_a_run_that_is_stopped_between_any_two_layers_ends_as_if_it_was_not(
    place: Path,
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    at: int,
) -> None:
    plan = _plan(place, tmp_path / "out")
    with monkeypatch.context() as patched:
        patched.setattr(Saver, "_after_layer", _stopping(at))
        assert execute(plan) == 130
    step, rest = divmod(at - 1, PARTS * LAYERS)
    part, layers = divmod(rest, LAYERS)
    told = capsys.readouterr().out
    # The last layer of a micro-batch is stored with what follows it, and the interruption came before.
    layer = max(1, LAYERS - 1 - layers)
    assert f"--execute --resume` goes on in step {step + 1}, micro-batch {part + 1}, layer {layer} backward." in told
    assert execute(plan, resume=True) == 0
    _assert_same_run(tmp_path / "out", whole)
    record = json.loads((tmp_path / "out" / "measurement.json").read_text())
    assert record["resumed"] == [{"steps": step, "micro_batches": part, "layer": layer - 1}]
    assert set(record["measured"]["phases"]) >= {"forward", "backward", "optimizer", "attention_backward", "evaluate"}


def test_a_run_may_be_stopped_again_and_again(
    place: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, rounds = _plan(place, tmp_path / "out"), 0
    with monkeypatch.context() as patched:
        while True:
            patched.setattr(Saver, "_after_layer", _stopping(2))
            code = execute(plan, resume=rounds > 0)
            rounds += 1
            patched.undo()
            if code == 0:
                break
            assert code == 130 and rounds < 20
    assert rounds > 4
    _assert_same_run(tmp_path / "out", whole)


@pytest.mark.parametrize("stop_after", range(STEPS))
@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit"])
def test_a_run_that_is_stopped_between_steps_ends_as_if_it_was_not(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop_after: int, optimizer: str
) -> None:
    choices = RESIDENT | ({"adamw_8bit": {}} if optimizer == "adamw_8bit" else {})
    assert execute(_plan(place, tmp_path / "whole", choices)) == 0
    steps = running.train_steps

    def interrupted(*args: Any) -> Any:
        made = steps(*args)
        for _ in range(stop_after):
            yield next(made)
        next(made)  # the step before is stored now; this one is lost
        raise KeyboardInterrupt

    plan = _plan(place, tmp_path / "out", choices)
    with monkeypatch.context() as patched:
        patched.setattr(running, "train_steps", interrupted)
        patched.setattr(Saver, "part_done", lambda *_: None)
        assert execute(plan) == 130
    assert execute(plan, resume=True) == 0
    _assert_same_run(tmp_path / "out", tmp_path / "whole")


def test_between_micro_batches_the_resident_executor_is_stored_too(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert execute(_plan(place, tmp_path / "whole", RESIDENT)) == 0
    own = Saver.part_done

    def stop(self: Any, part: int, total: torch.Tensor) -> None:
        own(self, part, total)
        raise KeyboardInterrupt

    plan = _plan(place, tmp_path / "out", RESIDENT)
    with monkeypatch.context() as patched:
        patched.setattr(Saver, "part_done", stop)
        assert execute(plan) == 130
    assert load(tmp_path / "out", plan).where == "in step 1, micro-batch 2"
    with patch.object(running, "compile_first", wraps=running.compile_first) as compiling:
        assert execute(plan, resume=True) == 0
    assert compiling.call_count == 1  # before the step that goes on: no probe step has run layers yet
    _assert_same_run(tmp_path / "out", tmp_path / "whole")


@pytest.fixture
def stopped(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run that was interrupted inside its second step."""
    with monkeypatch.context() as patched:
        patched.setattr(Saver, "_after_layer", _stopping(PARTS * LAYERS + 1))
        assert execute(_plan(place, tmp_path / "out")) == 130
    return tmp_path / "out"


@pytest.mark.parametrize(("works", "layer"), [(6, 2), (7, 2), (8, 2), (9, 1)])
def test_a_time_that_fails_leaves_the_one_before(
    place: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    works: int,
    layer: int,
) -> None:
    """The disk is full at each point of storing the second layer: stream, its name, state, its name; and stays so."""
    times, own = 0, stored_files.os.fsync

    def full(handle: int) -> None:
        nonlocal times
        times += 1
        if times > works:
            raise OSError(28, "No space left on device")
        own(handle)

    monkeypatch.setattr(stored_files.os, "fsync", full)
    plan = _plan(place, tmp_path / "out", steps=1, accumulation=1)
    found: list[str] = []

    def look(self: Any, step: int, skips: int) -> None:
        saved = load(tmp_path / "out", plan)
        assert saved.inside is not None and (saved.folder / str(saved.inside.stream)).stat().st_size % 256 == 0
        found.append(saved.where)

    monkeypatch.setattr(Saver, "step_done", look)
    assert execute(plan) == 0
    assert found == [f"in step 1, micro-batch 1, layer {layer} backward"]
    assert "could not be stored (No space left on device); what was stored before stays" in " ".join(
        capsys.readouterr().out.split()
    )


KILLED = """
import os, signal, sys
from pathlib import Path
from planner.plan import Plan
from trainer.run import execute
from trainer.saving import Saver

own = Saver._after_layer
def after(self, layer):
    own(self, layer)
    if self._schedule is not None and self._step == 1:
        os.kill(os.getpid(), signal.SIGKILL)
Saver._after_layer = after
execute(Plan.model_validate_json(Path(sys.argv[1]).read_text()))
"""


def test_a_process_that_is_killed_leaves_what_it_stored(place: Path, whole: Path, tmp_path: Path) -> None:
    plan = _plan(place, tmp_path / "out")
    (tmp_path / "plan.json").write_text(plan.to_json())
    root = str(Path(saving.__file__).parents[1])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-c", KILLED, str(tmp_path / "plan.json")]
    done = subprocess.run(command, env=environment, capture_output=True, timeout=600, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert execute(plan, resume=True) == 0
    _assert_same_run(tmp_path / "out", whole)


def test_what_was_logged_after_it_was_stored_is_logged_once(place: Path, whole: Path, stopped: Path) -> None:
    lines = (stopped / "metrics.jsonl").read_text()
    again = json.loads(lines.splitlines()[-1]) | {"step": 2}
    (stopped / "metrics.jsonl").write_text(lines + json.dumps(again) + "\n" + '{"step": 3, "lo')
    assert execute(_plan(place, stopped), resume=True) == 0
    _assert_same_run(stopped, whole)


def test_files_that_were_being_written_are_passed_over(place: Path, whole: Path, stopped: Path) -> None:
    (stopped / FOLDER / f".{STATE}.being-written").write_bytes(b"half")
    (stopped / FOLDER / "stream-9-9-9.bin").write_bytes(b"nobody names it")
    assert execute(_plan(place, stopped), resume=True) == 0
    _assert_same_run(stopped, whole)


def test_other_plans_data_and_files_are_refused(place: Path, whole: Path, stopped: Path, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"of another plan\. `plan --plan .*out/plan\.yaml --execute --resume` goes on"):
        execute(_plan(place, stopped, lr=2e-2), resume=True)
    with pytest.raises(PlanError, match="the run there is complete"):
        execute(_plan(place, whole), resume=True)
    with pytest.raises(PlanError, match="there is none"):
        execute(_plan(place, tmp_path / "nowhere"), resume=True)
    (tmp_path / "empty").mkdir()
    with pytest.raises(PlanError, match=r"nothing is stored there.*train\.save_minutes=15"):
        execute(_plan(place, tmp_path / "empty"), resume=True)
    shutil.copytree(place / "data", tmp_path / "data")
    (tmp_path / "data" / "one_more.py").write_text("print('more')\n" * 20)
    moved = _plan(place, stopped)
    state = torch.load(stopped / FOLDER / STATE, weights_only=True)
    elsewhere = moved.model_copy(update={"train": moved.train.model_copy(update={"data": str(tmp_path / "data")})})
    torch.save(state | {"plan": saving.fingerprint(elsewhere)}, stopped / FOLDER / STATE)
    with pytest.raises(PlanError, match="data are not those that the run was trained on"):
        execute(elsewhere, resume=True)
    (stopped / FOLDER / STATE).write_bytes(b"no zip file")
    with pytest.raises(PlanError, match="cannot be read"):
        execute(moved, resume=True)


@pytest.mark.parametrize(("name", "knob"), [("gradient_noise", "kind"), ("rate_range_test", "rule")])
def test_a_run_from_before_there_was_a_knob_goes_on(place: Path, tmp_path: Path, name: str, knob: str) -> None:
    """Its plan file lacks the knob, which is filled in when that is read, and is the same plan for that."""
    known = all_optimizations()[name]
    knobs = {each.name: each.before or each.choices(None)[0] for each in known.knobs}  # type: ignore[arg-type]
    plan = _plan(place, tmp_path, RESIDENT | {name: knobs})
    lacking = [
        Choice.model_construct(id=each.id, reason=each.reason, knobs={k: v for k, v in each.knobs.items() if k != knob})
        for each in plan.choices
    ]
    before = plan.model_copy(update={"choices": lacking})
    assert before.document() != plan.document() and saving.fingerprint(before) == saving.fingerprint(plan)
    other = _plan(place, tmp_path, RESIDENT | {name: knobs | {knob: next(iter(_others(name, knob)))}})
    assert saving.fingerprint(other) != saving.fingerprint(plan)


def _others(name: str, knob: str) -> set[Any]:
    (known,) = (each for each in all_optimizations()[name].knobs if each.name == knob)
    return {*known.choices(None)} - {known.before}  # type: ignore[arg-type]


def test_too_little_disk_is_refused_before_the_first_step(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = _plan(place, tmp_path / "out")
    own, begin = shutil.disk_usage, RunFolder.begin

    def fill(self: Any) -> None:
        begin(self)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: own(path)._replace(free=300_000))

    monkeypatch.setattr(RunFolder, "begin", fill)
    # 43.50 KiB of adapters and as many of gradients, 87.16 KiB of moments, 2 × 32 tokens of 64 floats, all of it twice.
    said = r"takes up to 380\.33 KiB on disk while a step is stored, and 292\.97 KiB are free"
    with pytest.raises(PlanError, match=said):
        execute(plan)
    assert not (tmp_path / "out" / FOLDER).exists()


def test_nothing_is_stored_unless_asked_for(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Saver, "save", lambda *_: pytest.fail("stored"))
    assert execute(_plan(place, tmp_path / "out", save_minutes=0.0)) == 0


def test_no_more_often_than_every_so_many_minutes(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = []
    own = Saver.save
    monkeypatch.setattr(Saver, "save", lambda self, inside=None: (saved.append(inside), own(self, inside)))
    assert execute(_plan(place, tmp_path / "out", save_minutes=60.0)) == 0
    assert saved == [None]  # when it began


def test_digest_knows_order_tokens_and_targets(place: Path) -> None:
    from trainer.data import Row

    rows = [Row(torch.tensor([1, 2, 3], dtype=torch.int32), 2), Row(torch.tensor([4, 5], dtype=torch.int32), 1)]
    others = [rows[::-1], rows[:1], [rows[0], Row(rows[1].tokens, 0)], [rows[0], Row(rows[1].tokens + 1, 1)]]
    assert len({digest(each) for each in [rows, *others]}) == 5
