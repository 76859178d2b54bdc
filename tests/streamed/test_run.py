"""Whole runs with streamed layers beside the same with resident ones: the same losses, step by step."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from trainer_tiny import make_plan, save_model, write_sources

from planner.plan import Plan
from reports.demo import write_standard_library
from trainer.run import execute

LORA: dict[str, Any] = {"lora": {"rank": 4, "alpha": 8}, "chunked_loss": {"rows": 16}}
RESIDENT = LORA | {"gradient_checkpointing": {}, "exact_attention": {"kernel": "cpu"}}
STREAMED = LORA | {"streamed": {"chunk": 24, "heads": 3, "staging": "host", "kernel": "cpu"}}


def _losses(plan: Plan) -> list[float]:
    assert execute(plan) == 0
    record = json.loads((Path(plan.train.out) / "measurement.json").read_text())
    assert record["executor"] == plan.executor
    return list(record["losses"])


def _plan(source: Path, data: Path, out: Path, choices: dict[str, Any], **given: Any) -> Plan:
    executor = "streamed" if "streamed" in choices else "resident"
    options = {"lr": 1e-2, "batch": 2, "accumulation": 2, "validation": 0.25, "evaluation_rows": 2, "steps": 6}
    return make_plan(source, data=str(data), out=str(out), choices=choices, executor=executor, **(options | given))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("streamed")
    save_model("llama", folder / "model")
    write_sources(folder / "data")
    return folder


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"checkpoint_spacing": {"every": 2}},
        {"kept_attention": {}},
        {"streamed_weights": {}},
        {"checkpoint_disk": {}},
        {"checkpoint_disk": {}, "checkpoint_spacing": {"every": 2}},
        {"streamed": {"staging": "card"}},
    ],
    ids=lambda more: "+".join(more) or "plain",
)
def test_streamed_run_learns_what_a_resident_run_learns(place: Path, tmp_path: Path, more: dict[str, Any]) -> None:
    choices = STREAMED | {name: STREAMED.get(name, {}) | knobs for name, knobs in more.items()}
    resident = _losses(_plan(place / "model", place / "data", tmp_path / "resident", RESIDENT))
    streamed = _losses(_plan(place / "model", place / "data", tmp_path / "streamed", choices))
    assert resident[-1] < resident[0]
    assert streamed == pytest.approx(resident, rel=1e-5)


@pytest.mark.parametrize("form", ["checkpoint_int8", "checkpoint_nf4"])
def test_coded_layer_inputs_leave_the_first_loss_and_still_learn(place: Path, tmp_path: Path, form: str) -> None:
    resident = _losses(_plan(place / "model", place / "data", tmp_path / "resident", RESIDENT, lr=1e-3))
    coded = _losses(_plan(place / "model", place / "data", tmp_path / "coded", STREAMED | {form: {}}, lr=1e-3))
    assert coded[0] == pytest.approx(resident[0], rel=1e-6)  # the forward pass goes on with inputs as they are
    assert coded != pytest.approx(resident, rel=1e-6)
    assert coded[-1] < coded[0]


@pytest.mark.slow
def test_twenty_steps_of_a_real_model(tmp_path: Path, real_model: Path) -> None:
    """SmolLM2-135M on sources of the standard library, 64 tokens at a time."""
    library, data = tmp_path / "whole.jsonl", tmp_path / "library.jsonl"
    write_standard_library(library)
    with library.open(encoding="utf-8") as lines:
        data.write_text("".join(islice(lines, 50)), encoding="utf-8")
    given = {"total_tokens": 64, "batch": 1, "accumulation": 1, "steps": 20, "lr": 1e-4, "validation": 0.02}
    facts = {"id": "smollm2-135m", "source": str(real_model), "architecture": "LlamaForCausalLM", "layers": 30}
    runs = []
    for name, choices in (("resident", RESIDENT), ("streamed", STREAMED)):
        plan = _plan(real_model, data, tmp_path / name, choices, **given)
        plan = plan.model_copy(update={"model": plan.model.model_copy(update=facts)})
        runs.append(_losses(plan))
    assert runs[1] == pytest.approx(runs[0], rel=1e-4)
