"""A run that gets too little memory goes on by a smaller plan, and ends as one that had enough."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from run_folder import lines, record
from trainer_tiny import save_model, write_sources

from planner.cli_check import planned_again
from planner.errors import PlanError
from planner.plan import Plan
from planner.plan_file import load_plan
from planner.planning import Request, make_plan
from trainer import replanning, run, running, training
from trainer.run import execute
from trainer.saving import FOLDER, STATE, Saved

STEPS = 4
TOLD = "CUDA out of memory. Tried to allocate 256.00 KiB. GPU 0 has a total capacity of 8.00 GiB."


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("replanning")
    save_model("llama", folder / "model")
    write_sources(folder / "data")
    return folder


def _plan(place: Path, out: Path, total: int = 96, **given: Any) -> Plan:
    train = {"data": str(place / "data"), "out": str(out), "steps": STEPS, "lr": 1e-2, "validation": 0.25}
    return make_plan(
        Request(
            gpu="cpu",
            model=str(place / "model"),
            total_tokens=total,
            excluded=("mixed_precision",),
            knobs={"lora": {"rank": 4}},
            train=train | {"evaluation_rows": 2, "accumulation": 2, "warmup": 0.5} | given,
        )
    )


def _failing(at: int, told: str = TOLD) -> Callable[..., float]:
    """Forward and backward passes of which the so many-th, of training alone, runs out of memory once."""
    own, count = training.forward_backward, 0

    def step(built: Any, parts: Any, recorder: Any, *more: Any) -> float:
        nonlocal count
        count += 1
        if count == at:
            recorder.mark("backward")
            raise torch.OutOfMemoryError(told)
        return own(built, parts, recorder, *more)

    return step


@pytest.fixture(scope="module")
def whole(place: Path) -> Path:
    out = place / "whole"
    assert execute(_plan(place, out)) == 0
    return out


@pytest.mark.parametrize("at", range(1, STEPS + 1))
def test_a_run_that_is_out_of_memory_in_a_step_goes_on_with_it_by_a_smaller_plan(
    place: Path,
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    at: int,
) -> None:
    plan = _plan(place, tmp_path / "run")
    monkeypatch.setattr(training, "forward_backward", _failing(at))
    assert execute(plan) == 0
    out, now, before = tmp_path / "run", load_plan(tmp_path / "run" / "plan.yaml"), f"plan-until-step-{at - 1}.yaml"
    assert load_plan(out / before).document() == plan.document()
    assert now.memory.gpu.peak_bytes.high <= plan.memory.gpu.peak_bytes.high - 2**20 // 4
    assert {each.id for each in now.choices} - {each.id for each in plan.choices} == {"gradient_checkpointing"}
    steps = [line for line in lines(out) if "step" in line]
    assert [line["step"] for line in steps] == [*range(1, STEPS + 1)]
    one, other = record(out), record(whole)
    assert one["losses"] == pytest.approx(other["losses"], rel=1e-5)
    assert one["losses"][: at - 1] == other["losses"][: at - 1]
    assert one["evaluation"]["after"]["loss"] == pytest.approx(other["evaluation"]["after"]["loss"], rel=1e-5)
    (noted,) = one["replanned"]
    assert (noted["steps"], noted["high_bytes"]) == (at - 1, plan.memory.gpu.peak_bytes.high)
    assert "256.00 KiB" in noted["why"]
    assert one["plan"]["memory"] == now.document()["memory"] and not (out / FOLDER).exists()
    assert len(one["step_seconds"]["each"]) == STEPS
    told = " ".join(capsys.readouterr().out.split())
    assert "Planned again" in told and "with gradient_checkpointing" in told and f"goes on after step {at - 1}" in told


def test_nothing_of_the_plan_before_is_held_on_to(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built, alive = [], []
    own, smaller = run.build, replanning.smaller_plan

    def build(plan: Plan) -> Any:
        made = own(plan)
        built.append(weakref.ref(made.model))
        return made

    def looked(*given: Any, **more: Any) -> Plan | None:
        made = smaller(*given, **more)
        alive.extend(ref() is not None for ref in built)
        return made

    monkeypatch.setattr(run, "build", build)
    monkeypatch.setattr(replanning, "smaller_plan", looked)
    monkeypatch.setattr(training, "forward_backward", _failing(2))
    assert execute(_plan(place, tmp_path / "run")) == 0
    assert alive == [False] and len(built) == 2


def test_no_step_is_lost_where_nothing_smaller_fits(
    place: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, own = _plan(place, tmp_path / "run"), training.forward_backward
    monkeypatch.setattr(training, "forward_backward", _failing(3, TOLD.replace("KiB", "MiB")))
    with pytest.raises(PlanError, match=r"fits in less by no other settings\..*--resume. goes on after step 2"):
        execute(plan)
    assert (tmp_path / "run" / FOLDER / STATE).is_file()
    monkeypatch.setattr(training, "forward_backward", own)
    assert execute(plan, resume=True) == 0
    assert record(tmp_path / "run")["losses"] == record(whole)["losses"]


def test_the_optimiser_is_not_gone_on_from(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some adapters may have changed already."""

    def update(*_: Any) -> None:
        raise torch.OutOfMemoryError(TOLD)

    monkeypatch.setattr(training, "update", update)
    with pytest.raises(PlanError, match="ran out of memory"):
        execute(_plan(place, tmp_path / "run"))


def test_a_run_that_is_to_show_that_its_bound_suffices_is_not_planned_again(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "forward_backward", _failing(2))
    with pytest.raises(PlanError, match="ran out of memory, though the plan's bound"):
        execute(_plan(place, tmp_path / "run"), replan="never")


@pytest.fixture
def greedy(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The first probe step takes more than any bound."""
    own, count = running.probe, 0

    def probe(plan: Plan, built: Any, recorder: Any, announce: Any) -> Any:
        nonlocal count
        found = own(plan, built, recorder, announce)
        count += 1
        if count == 1:
            recorder._book("backward", allocated_bytes=plan.memory.gpu.peak_bytes.high + 1000)
        return found

    monkeypatch.setattr(running, "probe", probe)
    yield
    gc.collect()


@pytest.mark.usefixtures("greedy")
def test_the_probe_step_stops_a_run_unless_it_may_plan_again(place: Path, whole: Path, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="more than the plan's bound"):
        execute(_plan(place, tmp_path / "stopped"))
    assert record(tmp_path / "stopped")["losses"] == []


@pytest.mark.usefixtures("greedy")
def test_the_probe_step_is_answered_with_a_smaller_plan(place: Path, whole: Path, tmp_path: Path) -> None:
    plan = _plan(place, tmp_path / "run")
    assert execute(plan, replan="always") == 0
    now, found = load_plan(tmp_path / "run" / "plan.yaml"), record(tmp_path / "run")
    assert now.memory.gpu.peak_bytes.high < plan.memory.gpu.peak_bytes.high - 1000
    assert found["losses"] == pytest.approx(record(whole)["losses"], rel=1e-5)
    assert found["measured"]["gpu"]["allocated_bytes"] <= now.memory.gpu.peak_bytes.high
    assert not list((tmp_path / "run").glob("plan-until-*"))


def test_a_probe_step_without_memory_is_answered_with_a_shorter_sequence(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, count = running.probe, 0

    def probe(*given: Any) -> Any:
        nonlocal count
        count += 1
        if count == 1:
            raise torch.OutOfMemoryError(TOLD.replace("256.00 KiB", "2.00 MiB"))
        return own(*given)

    monkeypatch.setattr(running, "probe", probe)
    plan = _plan(place, tmp_path / "run", 200)
    assert execute(plan, replan="always") == 0
    assert load_plan(tmp_path / "run" / "plan.yaml").total_tokens < plan.total_tokens


@pytest.mark.parametrize("replan", ["always", "late"])
def test_memory_that_runs_out_while_held_out_rows_are_judged_before_training(
    place: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, replan: replanning.Replan
) -> None:
    own, count, plan = running.evaluate, 0, _plan(place, tmp_path / "run")

    def evaluate(*given: Any) -> Any:
        nonlocal count
        count += 1
        if count == 1:
            raise torch.OutOfMemoryError(TOLD)
        return own(*given)

    monkeypatch.setattr(running, "evaluate", evaluate)
    if replan == "late":
        with pytest.raises(PlanError, match=r"256.00 KiB"):
            execute(plan, replan=replan)
        return
    assert execute(plan, replan=replan) == 0
    now, found = load_plan(tmp_path / "run" / "plan.yaml"), record(tmp_path / "run")
    assert now.memory.gpu.peak_bytes.high < plan.memory.gpu.peak_bytes.high
    assert found["losses"] == pytest.approx(record(whole)["losses"], rel=1e-5)
    judged = [line["evaluation"] for line in lines(tmp_path / "run") if "evaluation" in line]
    assert judged == ["before", "after"]


def test_without_held_out_rows_the_first_step_is_gone_on_with(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing has been logged by then."""
    monkeypatch.setattr(training, "forward_backward", _failing(1))
    assert execute(_plan(place, tmp_path / "run", validation=0.0)) == 0
    assert [line["step"] for line in lines(tmp_path / "run")] == [*range(1, STEPS + 1)]


def test_a_run_that_is_stored_while_it_is_under_way_goes_on_twice_and_is_resumed(
    place: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, out, own = _plan(place, tmp_path / "run", save_minutes=1e-9), tmp_path / "run", training.forward_backward
    failing, again = _failing(2), _failing(2, TOLD.replace("KiB", "MiB"))
    monkeypatch.setattr(training, "forward_backward", failing)
    steps = running.train_steps

    def interrupted(*given: Any) -> Iterator[dict[str, Any]]:
        for step in steps(*given):
            yield step
            if step["step"] == 2:
                raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(running, "train_steps", interrupted)
        assert execute(plan) == 130
    now = load_plan(out / "plan.yaml")
    assert planned_again(now).verdict == "fits"
    with pytest.raises(PlanError, match=r"another plan.*plan.yaml --execute --resume"):
        execute(plan, resume=True)
    monkeypatch.setattr(training, "forward_backward", again)
    with pytest.raises(PlanError, match=r"fits in less by no other settings.*goes on after step"):
        execute(now, resume=True)
    monkeypatch.setattr(training, "forward_backward", own)
    assert execute(now, resume=True) == 0
    found = record(out)
    assert found["losses"] == pytest.approx(record(whole)["losses"], rel=1e-5)
    assert [each["steps"] for each in found["replanned"]] == [1] and len(found["resumed"]) == 2
    assert not (out / FOLDER).exists()
    with pytest.raises(PlanError, match="complete"):
        execute(now, resume=True)


def test_an_update_that_has_begun_is_not_made_twice(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory that runs out once the optimiser is through, as where averages are updated."""
    own, count = training.wait_for, 0

    def wait(device: torch.device) -> None:
        nonlocal count
        count += 1
        if count == 2:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1000 bytes.")
        own(device)

    monkeypatch.setattr(training, "wait_for", wait)
    with pytest.raises(PlanError, match="can't allocate memory"):
        execute(_plan(place, tmp_path / "run"))


@pytest.mark.parametrize("error", [PlanError("card x", "is gone."), KeyboardInterrupt()])
def test_what_was_done_is_stored_before_anything_is_planned(
    place: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    plan = _plan(place, tmp_path / "run")

    def gone(*_: Any, **__: Any) -> None:
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(training, "forward_backward", _failing(3))
        patched.setattr(replanning, "smaller_plan", gone)
        if isinstance(error, PlanError):
            with pytest.raises(PlanError, match=r"256.00 KiB.*card x: is gone.*goes on after step 2"):
                execute(plan)
        else:
            assert execute(plan) == 130
    assert execute(plan, resume=True) == 0
    assert record(tmp_path / "run")["losses"] == record(whole)["losses"]
    assert record(tmp_path / "run")["replanned"] == []


def test_memory_that_runs_out_while_a_run_is_put_back_ends_with_words(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, own = _plan(place, tmp_path / "run"), Saved.restore
    count = 0

    def restore(self: Saved, built: Any) -> None:
        nonlocal count
        count += 1
        if count == 1:
            raise torch.OutOfMemoryError(TOLD.replace("KiB", "MiB"))
        own(self, built)

    monkeypatch.setattr(training, "forward_backward", _failing(2))
    monkeypatch.setattr(Saved, "restore", restore)
    with pytest.raises(PlanError, match=r"fits in less by no other settings.*goes on after step 1"):
        execute(plan)


def test_a_backward_pass_that_fails_leaves_nothing_on_the_card(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was ready in the queue of this thread holds on to tensors, unless it is drained."""
    alive: list[int] = []
    seen: list[weakref.ref[Any]] = []
    own, smaller, count = run.build, replanning.smaller_plan, 0

    def build(plan: Plan) -> Any:
        made = own(plan)
        if not seen:
            seen.extend(weakref.ref(parameter) for parameter in made.model.parameters())

            def fail(_: Any) -> None:
                nonlocal count
                count += 1
                if count == 5:  # of the probe step's two passes, and one of training
                    raise torch.OutOfMemoryError(TOLD)

            made.trained[len(made.trained) // 2].register_hook(fail)
        return made

    def looked(*given: Any, **more: Any) -> Plan | None:
        alive.append(sum(ref() is not None for ref in seen))
        return smaller(*given, **more)

    monkeypatch.setattr(run, "build", build)
    monkeypatch.setattr(replanning, "smaller_plan", looked)
    assert execute(_plan(place, tmp_path / "run")) == 0
    assert alive == [0]
