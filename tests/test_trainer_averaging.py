"""Averages of the adapters are what their definitions say, and they are what a run saves, judges and plans for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from trainer_tiny import make_plan, save_model, write_sources

from planner.documents import read_documents
from planner.errors import PlanError
from planner.optimizations import all_optimizations
from planner.plan import Plan
from planner.planning import Request
from planner.planning import make_plan as planned
from trainer.averaging import Averages, Averaging
from trainer.built import BuiltRun
from trainer.data import evaluation_batches, prepare
from trainer.measure import Recorder, exact_terms
from trainer.probing import probe
from trainer.run import execute
from trainer.session import build
from trainer.shown import put_averages
from trainer.step import evaluate
from trainer.training import train_steps

STEPS = 8


def _values(count: int = STEPS) -> list[list[Tensor]]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, 5), (7, 2)]
    return [[torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes] for _ in range(count + 1)]


def _ema(values: list[list[Tensor]], decay: float) -> list[Tensor]:
    average = [value.clone() for value in values[0]]
    for step, present in enumerate(values[1:], start=1):
        keep = min(decay, step / (step + 9))
        average = [keep * old + (1 - keep) * new for old, new in zip(average, present, strict=True)]
    return average


def _swa(values: list[list[Tensor]], first: int) -> list[Tensor]:
    return [torch.stack(each).mean(0) for each in zip(*values[first:], strict=True)]


def _run(values: list[list[Tensor]], how: Averaging) -> Averages:
    trained = [value.clone() for value in values[0]]
    averages = Averages(trained, how)
    for step, present in enumerate(values[1:], start=1):
        for value, new in zip(trained, present, strict=True):
            value.copy_(new)
        averages.update(step, STEPS)
    return averages


@pytest.mark.parametrize("place", ["gpu", "host"])
@pytest.mark.parametrize("decay", [0.5, 0.9])
def test_moving_average_is_its_definition(decay: float, place: str) -> None:
    values = _values()
    found = _run(values, Averaging.of("ema", decay, place)).tensors
    for one, other in zip(found, _ema(values, decay), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("place", ["gpu", "host"])
def test_swa_is_the_mean_of_the_last_quarter(place: str) -> None:
    values = _values()
    found = _run(values, Averaging.of("swa", 0.999, place)).tensors
    for one, other in zip(found, _swa(values, first=7), strict=True):  # after steps 7 and 8 of 8
        torch.testing.assert_close(one, other, rtol=1e-13, atol=1e-13)


def test_before_any_step_nothing_is_put_in_place() -> None:
    (start,) = _values(0)
    trained = [value.clone() for value in start]
    averages = Averages(trained, Averaging.of("swa", 0.999, "gpu"))
    trained[0].add_(1)
    averages.update(1, STEPS)  # before the last quarter
    averages.put()
    assert torch.equal(trained[0], start[0] + 1)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("averaging")
    save_model("llama", folder / "model")
    write_sources(folder / "data")
    return folder


def _plan(place: Path, out: Path, averaging: dict[str, Any] | None) -> Plan:
    choices: dict[str, dict[str, Any]] = {"lora": {"rank": 4, "alpha": 8}, "exact_attention": {"kernel": "cpu"}}
    if averaging is not None:
        choices["weight_averaging"] = {"kind": "ema", "decay": 0.8, "place": "gpu"} | averaging
    given = {"steps": STEPS, "lr": 1e-2, "evaluation_rows": 5, "validation": 0.25}
    return make_plan(place / "model", data=str(place / "data"), out=str(out), choices=choices, **given)


def _trained(plan: Plan) -> tuple[BuiltRun, list[list[Tensor]]]:
    """A run step by step, with the adapters before the first and after each."""
    built = build(plan)
    data = prepare(
        read_documents(Path(str(plan.train.data))), built.tokenise, length=32, target=None, validation=0.25, seed=0
    )
    with Recorder(built.device) as recorder:
        probe(plan, built, recorder)
        snapshots = [[p.detach().double() for p in built.trained]]
        for _ in train_steps(plan, built, data, recorder):
            snapshots.append([p.detach().double() for p in built.trained])
    return built, snapshots


@pytest.mark.parametrize("averaging", [{}, {"place": "host"}, {"kind": "swa"}], ids=str)
def test_a_run_saves_and_judges_its_averages(place: Path, tmp_path: Path, averaging: dict[str, Any]) -> None:
    plan = _plan(place, tmp_path / "run", averaging)
    assert execute(plan) == 0
    built, snapshots = _trained(plan)
    wanted = _swa(snapshots, first=7) if averaging.get("kind") == "swa" else _ema(snapshots, 0.8)
    put_averages(built)
    names = [name for name, parameter in built.model.named_parameters() if parameter.requires_grad]
    saved = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    for name, average, last, parameter in zip(names, wanted, snapshots[-1], built.trained, strict=True):
        found = saved[name.replace(".default", "")]
        assert torch.equal(found, parameter)
        torch.testing.assert_close(found.double(), average, rtol=1e-5, atol=1e-7)
        assert not torch.allclose(found.double(), last, rtol=1e-4)
    data = prepare(read_documents(place / "data"), built.tokenise, length=32, target=None, validation=0.25, seed=0)
    judged = evaluate(built.loss, evaluation_batches(data.validation, 5, 1, 0), built.device)
    record = json.loads((tmp_path / "run" / "measurement.json").read_text())
    assert record["evaluation"]["after"]["loss"] == pytest.approx(judged.loss, rel=1e-6)
    counted = record["measured"]["terms"].get("averages")
    assert counted == (0 if averaging.get("place") == "host" else record["measured"]["terms"]["adapters"])


def test_averaging_changes_no_step(place: Path, tmp_path: Path) -> None:
    with_it, without = (_trained(_plan(place, tmp_path, averaging)) for averaging in ({}, None))
    for one, other in zip(with_it[1][-1], without[1][-1], strict=True):
        assert torch.equal(one, other)
    assert exact_terms(without[0])["averages"] == 0


def test_it_is_on_only_where_asked_for_and_costs_what_it_copies() -> None:
    plain, asked = (planned(Request(tier=3, required=names)) for names in ((), ("weight_averaging",)))
    assert not plain.knobs("weight_averaging")
    off = next(each for each in plain.rejected if each.id == "weight_averaging")
    assert off.reasons[0].startswith("on only where it is asked for, by --with weight_averaging")
    size = 4 * 24 * 32 * 46_080  # rank 24: 46,080 inputs and outputs in each of 32 layers
    for phase, terms in asked.memory.gpu.phases.items():
        assert terms["averages/adapters"] == size == terms["adapters/weights"], phase
    host = planned(Request(tier=3, required=("weight_averaging",), knobs={"weight_averaging": {"place": "host"}}))
    assert host.memory.host.terms["averages/adapters"] == size
    assert asked.memory.gpu.peak_bytes.expected - plain.memory.gpu.peak_bytes.expected == size
    assert host.memory.gpu.peak_bytes == plain.memory.gpu.peak_bytes
    assert all(not each.free for each in all_optimizations().values() if each.asked)


def test_a_refusal_says_that_it_fits_without() -> None:
    """A rank whose adapters only just fit: their average is what is too much."""
    knobs = {"lora": {"rank": 384}}
    request = Request(total_tokens=1024, knobs=knobs)
    assert planned(request).verdict == "fits"
    refused = planned(Request(total_tokens=1024, knobs=knobs, required=("weight_averaging",)))
    assert refused.verdict == "does-not-fit"
    assert any(line.startswith("leaving out --with weight_averaging fits: ") for line in refused.nearest)


def test_knobs_of_what_is_off_are_refused() -> None:
    with pytest.raises(PlanError, match="off unless --with weight_averaging asks for it"):
        planned(Request(tier=1, knobs={"weight_averaging": {"decay": 0.9}}))
