"""Rows that grow from stage to stage: the same targets in every one, the peak in the last, and a plan for each."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli_fixture import Capture, answered, mistakes
from hypothesis import given
from hypothesis import strategies as st
from run_folder import lines, record, stopped_and_resumed
from test_memory_on_fake_tensors import CLOSE, TERABYTE, shortened
from trainer_tiny import make_plan as made_by_hand
from trainer_tiny import save_model, write_sources

from planner.cli import main
from planner.cli_validate import SHORT, _shortened
from planner.compose import problems
from planner.epoch import epoch
from planner.errors import PlanError
from planner.hardware import load_profile
from planner.model import load_model
from planner.optimizations import all_optimizations
from planner.optimizations.base import Situation
from planner.plan import Plan, Stage, Train
from planner.plan_stages import plan_stages
from planner.plan_time import StepClock
from planner.planning import Request, make_plan, solved
from planner.stages import cuts, mean_seconds, shapes, stage_of, steps_in
from trainer import running
from trainer.data import NOT_TRAINED, Batch, Row, epochs
from trainer.fake_step import counted, predicted
from trainer.progress import time_left
from trainer.rates import RateFound
from trainer.run import execute
from trainer.stages import by_stage, cut_by_stage, stage_begun
from trainer.stages import shortened as cut_row

STAGED: dict[str, dict[str, Any]] = {"lora": {"rank": 2, "alpha": 4}, "context_stages": {"stages": 3}}


@given(st.integers(1, 200), st.integers(1, 7))
def test_each_stage_has_its_share_of_the_steps_and_comes_in_its_turn(steps: int, stages: int) -> None:
    found = [stage_of(step, steps, stages) for step in range(steps)]
    assert found == sorted(found) and set(found) <= set(range(stages))
    assert max(found.count(stage) for stage in range(stages)) - min(found.count(stage) for stage in range(stages)) <= 1
    begun = [stage_begun(done, steps, stages) for done in range(steps + 1)]
    assert [stage for stage in begun if stage is not None] == sorted({*found} - {found[0]})


@given(st.integers(1, 200), st.integers(1, 7))
def test_steps_of_a_stage_are_counted_as_they_come(steps: int, stages: int) -> None:
    found = [stage_of(step, steps, stages) for step in range(steps)]
    assert steps_in(steps, stages) == [found.count(stage) for stage in range(stages)]


def test_the_time_left_goes_by_what_each_stage_takes() -> None:
    assert time_left([1.0, 1.0, 2.0], 3, 6, (1.0, 2.0, 4.0)) == pytest.approx(2 + 4 + 4)
    assert time_left([2.0], 5, 6, (1.0, 2.0, 4.0)) == pytest.approx(2.0), "of a run that went on, its last step alone"
    assert time_left([3.0, 3.0], 2, 10, (1.0,)) == pytest.approx(24.0)
    assert time_left([3.0], 10, 10, (1.0, 5.0)) == 0.0


@given(st.integers(1, 300), st.integers(1, 300), st.integers(1, 310), st.integers(0, 5))
def test_a_cut_row_trains_what_it_trained(inputs: int, trained: int, most: int, begin: int) -> None:
    trained = min(trained, inputs)
    row = Row(torch.arange(begin, begin + inputs + 1), trained)
    pieces = cut_row(row, most)
    targets = [int(token) for piece in pieces for token in piece.tokens[piece.inputs - piece.trained + 1 :]]
    assert targets == row.tokens[inputs - trained + 1 :].tolist()
    assert all(0 < piece.trained <= piece.inputs <= most for piece in pieces)
    assert len(pieces) == -(-trained // most), "no more rows than are planned"


@given(st.integers(1, 64), st.integers(1, 4096), st.integers(1, 8), st.integers(1, 7))
def test_a_stage_takes_no_more_tokens_than_the_last(pieces: int, target: int, batch: int, stages: int) -> None:
    total = pieces * cuts(stages)[0]
    target = min(target, total)
    *shorter, last = shapes(total, target, batch, stages)
    assert (last.rows, last.total, last.target) == (batch, total, target)
    assert all(shape.rows * shape.total <= batch * total for shape in shorter)
    assert all(batch * target <= shape.rows * shape.target < batch * target + shape.rows for shape in shorter)


def test_batches_grow_and_train_the_same() -> None:
    generator = random.Random(3)
    rows = [Row(torch.arange(length + 1), length) for length in (generator.randint(1, 64) for _ in range(23))]
    cut = cut_by_stage(64, 3, 12, 2)
    whole, staged = (list(islice(epochs(rows, 4, 5, how), 24)) for how in (None, cut))
    for number, (batch, short) in enumerate(zip(whole, staged, strict=True)):
        most = (16, 32, 64)[number // 2 * 3 // 12]
        assert short.inputs.shape[1] == min(most, batch.inputs.shape[1])
        assert short.trained == batch.trained
        seen = [sorted(each.targets[each.targets != NOT_TRAINED].tolist()) for each in (batch, short)]
        assert seen[0] == seen[1]


CASES: tuple[tuple[str, str, int, dict[str, Any]], ...] = (
    ("h200-sxm", "llama-3.2-1b", 8192, {"excluded": ("streamed",)}),
    ("rtx2060s", "phi-2", 32768, {"required": ("streamed",)}),
    ("rtx3090", "gemma-3-1b", 16384, {}),
    ("rtx4090", "mistral-7b-v0.1", 8192, {"target": 5000, "excluded": ("streamed",)}),
    ("rtx3060-12gb", "qwen3-1.7b", 65536, {"required": ("streamed", "checkpoint_int8"), "target": 9000}),
    ("h200-sxm", "phi-2", 2048, {"excluded": ("exact_attention", "gradient_checkpointing", "streamed")}),
    ("h200-sxm", "gemma-2-2b", 4096, {"excluded": ("streamed",), "train": {"batch": 3}}),
    ("rtx4090", "qwen3-30b-a3b", 4096, {"host_bytes": TERABYTE}),
    ("rtx3090", "starcoder2-3b", 131072, {"required": ("streamed", "sequence_blocks"), "host_bytes": TERABYTE}),
    ("h200-sxm", "llama-3.2-3b", 8192, {"excluded": ("streamed", "chunked_loss"), "target": 1000}),
    # Rows of the last stage are longer than the model's window, those before are not, and take more.
    ("rtx2060s", "starcoder2-3b", 8192, {"required": ("streamed",), "train": {"batch": 12}}),
)


def _staged(card: str, model: str, total: int, more: dict[str, Any]) -> Request:
    required = (*more.get("required", ()), "context_stages")
    return Request(**{"gpu": card, "model": model, "total_tokens": total, **more, "required": required})


@pytest.mark.parametrize(("card", "model", "total", "more"), CASES, ids=lambda value: str(value)[:20])
def test_the_plan_takes_what_its_largest_stage_does_and_each_is_the_plan_of_its_own_length(
    card: str, model: str, total: int, more: dict[str, Any]
) -> None:
    plan = make_plan(_staged(card, model, total, more))
    assert plan.verdict == "fits" and len(plan.stages) == 3
    last, held = plan.stages[-1], plan.memory.gpu.peak_bytes
    assert (last.rows, last.total_tokens, last.target) == (plan.train.batch, plan.total_tokens, plan.target)
    assert last.step_seconds == plan.time.step_seconds.estimate
    assert held == max((stage.peak_bytes for stage in plan.stages), key=lambda peak: peak.expected)
    assert plan.memory.host.peak_bytes == max(stage.host_peak_bytes for stage in plan.stages)
    sums = [sum(terms.values()) for terms in plan.memory.gpu.phases.values()]
    assert max(sums) == held.expected, "phases are those of that stage"
    for stage in plan.stages:
        own = _alone(plan, stage, card)
        assert own.memory.gpu.peak_bytes == stage.peak_bytes and own.memory.host.peak_bytes == stage.host_peak_bytes
        assert own.time.step_seconds.estimate == pytest.approx(stage.step_seconds, rel=1e-5)


def test_a_window_can_make_a_shorter_stage_the_largest() -> None:
    plan = make_plan(_staged(*CASES[-1]))
    assert plan.stages[1].peak_bytes.high == plan.memory.gpu.peak_bytes.high > plan.stages[-1].peak_bytes.high


def test_a_stage_that_takes_too_long_is_refused_by_its_number() -> None:
    """Layers in passes go row by row, and rows of sixteen tokens are many."""
    given = {"required": ("streamed", "sequence_blocks"), "knobs": {"context_stages": {"stages": 7}}}
    plan = make_plan(_staged("rtx2060s", "qwen3-1.7b", 1024, given))
    first, last = plan.stages[0].step_seconds, plan.stages[-1].step_seconds
    assert first is not None and last is not None and first > 1.5 * last
    with pytest.raises(PlanError, match=r"stages=7: a step of stage 1, of 16 tokens, takes .*, and the limit is"):
        make_plan(_staged("rtx2060s", "qwen3-1.7b", 1024, given | {"max_step_seconds": (first + last) / 2}))


def test_other_stages_in_a_file_are_told_by_their_number(tmp_path: Path, capsys: Capture) -> None:
    plan = make_plan(_staged(*CASES[0]))
    one = plan.stages[0].model_copy(update={"host_peak_bytes": 1})
    for name, stages, told in (
        ("none", [], "stages: 0 in the file, 3 now"),
        ("edited", [one, *plan.stages[1:]], "stages.1.host_peak_bytes: 1 in the file"),
    ):
        file = tmp_path / f"{name}.yaml"
        file.write_text(plan.model_copy(update={"stages": stages}).to_yaml(), encoding="utf-8")
        assert main(["check", str(file)]) == 0 and told in capsys.readouterr().out
        (wrong,) = mistakes(capsys, "--plan", str(file), "--execute", "--data", str(tmp_path))
        assert "its figures are not those of its settings: stages" in wrong


def test_a_stage_that_does_not_fit_is_refused_by_its_number() -> None:
    card, model, total, more = CASES[-1]
    most = make_plan(_staged(card, model, total, more)).stages[-1].peak_bytes.high
    limits = solved(_staged(card, model, total, more)).limits
    found = solved(_staged(card, model, total, more)).found
    with pytest.raises(PlanError, match=r"stages=3: stage 1, 48 rows of 2,048 tokens, takes .* more than the card has"):
        plan_stages(found, replace(limits, gpu_bytes=most), 12)


def _alone(plan: Plan, stage: Stage, card: str) -> Plan:
    """The plan of a run whose rows are all as in one stage, with the same settings."""
    choices = {name: values for name, values in _knobs(plan).items() if name != "context_stages"}
    others = tuple(sorted(set(all_optimizations()) - set(choices)))
    return make_plan(
        Request(
            gpu=card,
            model=plan.model.source,
            total_tokens=stage.total_tokens,
            target=stage.target,
            host_bytes=plan.memory.host.budget_bytes,
            disk_bytes=plan.memory.disk.budget_bytes,
            required=tuple(choices),
            excluded=others,
            knobs=choices,
            train={"batch": stage.rows},
        )
    )


def _knobs(plan: Plan) -> dict[str, dict[str, Any]]:
    """Knobs that are set, of each choice."""
    return {
        choice.id: {name: value for name, value in choice.knobs.items() if value is not None and name != "alpha"}
        for choice in plan.choices
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "executor"),
    [("llama-3.2-1b", "resident"), ("gemma-3-1b", "resident"), ("llama-3.2-1b", "streamed"), ("phi-2", "streamed")],
)
def test_each_stage_takes_what_is_planned(tmp_path: Path, model: str, executor: str) -> None:
    """The largest micro-batch of each, counted on fake tensors."""
    streamed = executor == "streamed"
    total = 4096 if streamed else 2048
    knobs = {"streamed": {"chunk": 1024, "heads": 2, "staging": "host"}} if streamed else {}
    plan = make_plan(
        Request(
            gpu="rtx3090",
            model=f"random:{shortened(model, 7 if model == 'gemma-3-1b' else 2, tmp_path / model)}",
            total_tokens=total,
            required=("context_stages", *(("streamed",) if streamed else ("gradient_checkpointing",))),
            excluded=() if streamed else ("streamed",),
            knobs={"lora": {"rank": 8}, "context_stages": {"stages": 2}, **knobs},
            host_bytes=TERABYTE,
        )
    )
    for stage in plan.stages:
        own = _alone(plan, stage, "rtx3090")
        found, said = counted(own).phases, predicted(own)
        assert max(said.values()) == pytest.approx(max(found[phase] for phase in said if phase in found), rel=CLOSE)


@pytest.mark.parametrize(("target", "batch", "stages"), [(8192, 1, 3), (4500, 1, 5), (1500, 3, 4), (17, 3, 3)])
def test_an_epoch_takes_the_mean_of_the_stages(target: int, batch: int, stages: int) -> None:
    from planner.data_profile import DataProfile

    data = DataProfile(sizes=[4 * 8193] * 10, tokens=[8193] * 10, exact=True, basis="made up")
    asked = {"excluded": ("streamed",), "target": target, "knobs": {"context_stages": {"stages": stages}}}
    request = _staged("rtx3090", "llama-3.2-1b", 8192, asked | {"train": {"batch": batch}})
    mean = mean_seconds(make_plan(request).stages)
    found = epoch(data, Train(validation=0.1, batch=batch), StepClock(solved(request).found, 1))
    assert mean is not None and found.steps == 9 // batch
    assert found.hours == pytest.approx(found.steps * mean / 3600, rel=1e-3)
    whole = Request("rtx3090", "llama-3.2-1b", total_tokens=8192, target=target, excluded=("streamed",))
    longer = epoch(data, Train(validation=0.1), StepClock(solved(whole).found, 1)).hours
    assert longer is not None and found.hours is not None and found.hours < longer


def test_what_packs_rows_and_what_cuts_them_are_not_on_together() -> None:
    situation = Situation(load_profile("rtx3090"), load_model("phi-2"), TERABYTE)
    wrong = problems({"lora", "context_stages", "sequence_packing"}, situation)
    assert {*wrong} == {"context_stages", "sequence_packing"}


def test_a_length_that_cannot_be_cut_is_refused_with_one_that_can(capsys: Capture) -> None:
    words = ("--gpu", "rtx3090", "--model", "llama-3.2-1b", "--with", "context_stages", "--context")
    assert mistakes(capsys, *words, "4094")[0] == (
        "error: context_stages.stages=3: cuts rows in 4, and 4,094 tokens are no multiple of that. --context 4092 is "
        "one."
    )
    assert len(answered(capsys, *words, "4092", "--json")["stages"]) == 3
    few = answered(capsys, *words, "4092", "--set", "train.steps=2", "--json")["warnings"]
    assert any("Some of the 3 stages of context_stages have no step" in warning for warning in few)


@pytest.fixture
def data(tmp_path: Path) -> str:
    return str(write_sources(tmp_path / "data", 12))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    save_model("llama", tmp_path / "model")
    return tmp_path / "model"


def _plan(model: Path, data: str, out: Path, choices: dict[str, dict[str, Any]] = STAGED, **more: Any) -> Plan:
    given = {"steps": 6, "accumulation": 2, "validation": 0.25, "evaluation_rows": 3, "total_tokens": 48, **more}
    return made_by_hand(model, choices=choices, data=data, out=str(out), **given)


def test_a_run_in_stages_trains_the_same_tokens_and_another_model(
    tmp_path: Path, data: str, model: Path, capsys: Capture
) -> None:
    assert execute(_plan(model, data, tmp_path / "staged")) == 0
    told = capsys.readouterr().out
    assert "Stage 2 of 3: rows of up to 24 tokens." in told and "Stage 3 of 3: rows of up to 48 tokens." in told
    assert execute(_plan(model, data, tmp_path / "whole", {"lora": {"rank": 2, "alpha": 4}})) == 0
    staged, whole = ([line for line in lines(tmp_path / name) if "taken" in line] for name in ("staged", "whole"))
    assert [line["trained_tokens"] for line in staged] == [line["trained_tokens"] for line in whole]
    assert [line["lr"] for line in staged] == [line["lr"] for line in whole]
    assert all(one["loss"] != other["loss"] for one, other in zip(staged, whole, strict=True))
    found = record(tmp_path / "staged")["step_seconds"]
    grouped = by_stage(found["each"], 6, 3)
    assert [len(each) for each in grouped] == [2, 2, 2]
    assert found["stages"] == pytest.approx([np.median(each) for each in grouped], rel=1e-4)
    assert found["median"] == pytest.approx(found["stages"][-1], rel=1e-4)


def test_one_stage_long_enough_for_all_is_the_run_without(tmp_path: Path, data: str, model: Path) -> None:
    """With rows no longer than the first stage has them nothing is cut."""
    for name, choices in (("staged", STAGED), ("whole", {"lora": STAGED["lora"]})):
        assert execute(_plan(model, data, tmp_path / name, choices, total_tokens=1024)) == 0
    assert record(tmp_path / "staged")["losses"] == record(tmp_path / "whole")["losses"]


def test_a_run_that_goes_on_is_in_the_stage_where_it_was(
    tmp_path: Path, data: str, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert execute(_plan(model, data, tmp_path / "through", save_minutes=1e-9)) == 0
    stopped_and_resumed(_plan(model, data, tmp_path / "stopped", save_minutes=1e-9), monkeypatch, after=3)
    assert record(tmp_path / "stopped")["losses"] == record(tmp_path / "through")["losses"]


def test_layers_in_passes_go_by_stages_as_whole_ones(tmp_path: Path, data: str, model: Path) -> None:
    passes = {
        **STAGED,
        "streamed": {"kernel": "cpu", "chunk": 16, "heads": 1, "staging": "host"},
        "chunked_loss": {"rows": 8},
    }
    assert execute(_plan(model, data, tmp_path / "streamed", passes, executor="streamed")) == 0
    assert execute(_plan(model, data, tmp_path / "resident")) == 0
    losses = [record(tmp_path / name)["losses"] for name in ("streamed", "resident")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_a_range_test_of_the_rate_has_whole_rows(
    tmp_path: Path, data: str, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Losses that jump where rows get longer would say nothing of the rate."""
    widths: list[int] = []
    search = running.search_rate

    def watched(asked: Any, built: Any, train: Train, batches: Callable[[], Iterator[Batch]], *more: Any) -> RateFound:
        def seen() -> Iterator[Batch]:
            for batch in batches():
                widths.append(batch.inputs.shape[1])
                yield batch

        return search(asked, built, train, seen, *more)

    monkeypatch.setattr(running, "search_rate", watched)
    choices = {**STAGED, "rate_range_test": {"steps": 6, "low": 1e-5, "high": 1e-1}}
    assert execute(_plan(model, data, tmp_path / "run", choices)) == 0
    assert len(widths) >= 6 and 48 in widths[:4] and min(widths) > 12, "the first stage would cut them at 12"
    assert [line["tokens"] for line in lines(tmp_path / "run") if "taken" in line]


def test_validating_meets_the_last_stage_before_it_is_held_to_its_bound() -> None:
    plan = make_plan(_staged(*CASES[0]))
    steps = _shortened(plan, SHORT).train.steps
    assert steps is not None and steps_in(steps, 3)[-1] > running.HELD_STEPS
    plain = make_plan(Request("h200-sxm", "llama-3.2-1b", total_tokens=8192))
    assert _shortened(plain, SHORT).train.steps == SHORT["steps"]
