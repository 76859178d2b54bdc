"""Compiled layers give the same gradients, keep what the formulas say they keep, and serve rows of any length."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import test_trainer_parity as parity
import torch
from test_trainer_parity import _assert_same, _batch, _grouped_products_of_any_type, _stock_of, folders
from torch import Tensor
from torch._dynamo.utils import counters
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile
from trainer_tiny import ARCHITECTURES, CONFIGS, make_plan, save_model
from transformers import PreTrainedModel

from planner.compose import compose
from planner.errors import PlanError
from planner.hardware import load_profile
from planner.ledger import Device
from planner.model import load_model
from planner.optimizations import by_id
from planner.optimizations.base import Situation
from planner.optimizations.executor.compiled_layers import CompiledLayers
from planner.planning import Request
from planner.planning import make_plan as plan_for
from trainer import compiled, session
from trainer.built import BuiltRun
from trainer.checkpointing import DeviceStore
from trainer.compiled import compile_layers
from trainer.data import Batch, synthetic_batch
from trainer.layers import layers_of
from trainer.measure import Recorder, resident_tensors
from trainer.probing import compile_first, probe
from trainer.step import evaluate, nothing

__all__ = ["_grouped_products_of_any_type", "folders"]
PARTITIONED = "aot_eager_decomp_partition"
"""Traces and partitions as Inductor does, and runs op by op: no code is made, which is what takes long."""
KNOBS = {"lora": {"rank": 4, "alpha": 8}, "exact_attention": {"kernel": "cpu"}, "chunked_loss": {"rows": 16}}


@pytest.fixture(autouse=True)
def _nothing_compiled() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture
def partitioned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "BACKEND", PARTITIONED)


@pytest.mark.parametrize(("family", "checkpointed"), [("llama", True), ("qwen3", False), ("phi", False)])
def test_a_step_equals_stock_step(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, partitioned: None, family: str, checkpointed: bool
) -> None:
    """Whose norms are in float64 on both sides, as in tests/test_trainer_parity.py."""
    wide = parity._wide_norms

    def compiled_and_wide(model: PreTrainedModel) -> None:
        wide(model)
        if model.config._attn_implementation.startswith("tierplan"):
            compile_layers(model)

    monkeypatch.setattr(parity, "_wide_norms", compiled_and_wide)
    batch, store = _batch(31), DeviceStore() if checkpointed else None
    ours = parity._ours(folders[family], batch, kernel="cpu", store=store, rows=5)
    assert counters["stats"]["unique_graphs"] > 1
    _assert_same(ours, _stock_of(folders[family], batch))


# What a layer keeps, and what a step takes

SIZES = {"hidden_size": 256, "intermediate_size": 704, "num_attention_heads": 8, "max_position_embeddings": 4096}
ROWS, RANK, TOTAL = 64, 8, 1024
HALF = {"mixed_precision": {"dtype": "bfloat16"}}


def _larger(family: str, folder: Path) -> Path:
    """A model whose activations are larger than its weights."""
    config = CONFIGS[family]()
    config.update(SIZES | ({"head_dim": 32} if getattr(config, "head_dim", None) else {}))
    config.architectures = [ARCHITECTURES[family]]
    config.save_pretrained(folder)
    return folder


def _built(family: str, folder: Path, *others: str) -> tuple[BuiltRun, dict[str, dict[str, Any]]]:
    choices = KNOBS | HALF | {"compiled_layers": {}} | {name: {} for name in others}
    choices |= {"lora": {"rank": RANK, "alpha": 8}, "chunked_loss": {"rows": ROWS}}
    plan = make_plan(f"random:{_larger(family, folder)}", family=family, choices=choices, total_tokens=TOTAL)
    return session.build(plan), choices


def _said(folder: Path, choices: dict[str, dict[str, Any]]) -> tuple[dict[str, int], dict[str, int]]:
    """Bytes of each term, and the peak of each phase, as a plan for a card has them; what no tensor holds left out."""
    situation = Situation(load_profile("rtx4090"), load_model(str(folder)), 2**40)
    made = compose(choices, choices | {"exact_attention": {"kernel": "flash"}}, situation)
    letters = made.at(batch=1, total=TOTAL, target=TOTAL, workspace=0, rank=RANK)
    unseen = ("runtime/workspace", "attention/workspace")
    phases = made.ledger.by_phase(letters, (Device.GPU,))
    peaks = {phase.value: sum(n for name, n in terms.items() if name not in unseen) for phase, terms in phases.items()}
    return {name: term.bytes(letters) for name, term in made.ledger.terms.items()}, peaks


def _synthetic(built: BuiltRun, tokens: int) -> Batch:
    return synthetic_batch(1, tokens, tokens, built.base.config.vocab_size, 0)


def _step(built: BuiltRun, tokens: int) -> None:
    batch = _synthetic(built, tokens)
    built.loss(batch, torch.tensor(float(batch.trained)), nothing).backward()


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi"])
def test_a_layer_keeps_what_the_formulas_say(tmp_path: Path, partitioned: None, family: str) -> None:
    """All its storages but weights; rotary tables are among them, which layers share, and the casts of adapters."""
    built, choices = _built(family, tmp_path)
    layer, kept = layers_of(built.base)[1], dict[int, int]()
    own = layer.forward

    def told(*args: Any, **kwargs: Any) -> Tensor:
        def keep(tensor: Tensor) -> Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with saved_tensors_hooks(keep, lambda tensor: tensor):
            return own(*args, **kwargs)

    layer.forward = told  # type: ignore[assignment]
    batch = _synthetic(built, TOTAL)
    loss = built.loss(batch, torch.tensor(float(batch.trained)), nothing)
    del loss
    for tensor in (*built.base.parameters(), *built.base.buffers()):
        kept.pop(tensor.untyped_storage().data_ptr(), None)
    terms, _ = _said(tmp_path, choices)
    layers = built.base.config.num_hidden_layers
    names = ("norms", "hidden", "adapters", "mlp")
    of_layers = sum(terms[f"activations/{name}"] for name in names)
    of_layers += terms["attention/qkv"] + terms["attention/output"] + terms["attention/scores"]
    said = (of_layers + terms["adapters/casts"]) / layers + terms["activations/inputs"] / (layers - 1)
    said += terms["activations/rotary"]
    assert sum(kept.values()) == pytest.approx(said, rel=0.01)


def test_code_made_for_the_cpu_takes_no_more_than_planned(tmp_path: Path) -> None:
    """The peak of a real step, op by op from the allocator. Code for a card is made by the same rules, by another part.

    A step in rows of any other length runs what was compiled, and a step without autograd is compiled as well.
    """
    built, choices = _built("llama", tmp_path, "gradient_checkpointing")
    batch = _synthetic(built, TOTAL)
    stays = {
        each.untyped_storage().data_ptr(): each for each in [*resident_tensors(built), batch.inputs, batch.targets]
    }
    _step(built, 96)
    graphs = counters["stats"]["unique_graphs"]
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        _step(built, TOTAL)
    assert profiled.profiler is not None
    events = [each for each in profiled.profiler.kineto_results.events() if each.name() == "[memory]"]
    live = peak = sum(each.untyped_storage().nbytes() for each in stays.values())
    for event in sorted(events, key=lambda each: each.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    _, said = _said(tmp_path, choices)
    assert 0.8 * max(said.values()) < peak <= max(said.values())
    for tokens in (77, built.base.config.head_dim, built.base.config.hidden_size):  # as long as a width is, too
        _step(built, tokens)
    assert counters["stats"]["unique_graphs"] == graphs


# Where it cannot be had


@pytest.mark.parametrize(
    ("card", "model", "beside", "why"),
    [
        ("rtx2060s", "llama-3.2-1b", (), "compute capability ≥ 8.0"),
        ("rtx3090", "mistral-7b-v0.1", (), "layers with a window"),
        ("rtx4090", "qwen3-30b-a3b", (), "has experts"),
        ("rtx3090", "llama-3.2-1b", ("sequence_packing",), "packed documents would be a graph of its own"),
        ("rtx3090", "llama-3.2-1b", ("streamed",), "cut at their attention"),
        ("rtx3090", "llama-3.2-1b", ("nf4_weights",), "the compiler keeps each 16-bit matrix"),
        ("rtx3090", "llama-3.2-1b", ("lora",), "needs exact_attention"),
    ],
)
def test_where_it_cannot_be_had(card: str, model: str, beside: tuple[str, ...], why: str) -> None:
    known = replace(Situation(load_profile(card), load_model(model), 2**35), chosen=frozenset(beside))
    assert any(why in reason for reason in by_id("compiled_layers").reasons(known))


def test_a_plan_with_it_is_faster_and_is_made_only_where_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    needed = ("gradient_checkpointing", "checkpoint_offload")
    asked = Request("rtx3090", "llama-3.2-1b", total_tokens=8192, required=needed)
    without, with_norms = plan_for(asked), plan_for(replace(asked, excluded=("fused_norm",)))
    with_it = plan_for(replace(asked, required=(*needed, "compiled_layers")))
    assert "compiled_layers" not in {choice.id for choice in without.choices}
    assert "compiled_layers" in {choice.id for choice in with_it.choices} and with_it.verdict == "fits"
    peaks = [plan.memory.gpu.peak_bytes.expected for plan in (with_it, without, with_norms)]
    assert peaks[0] <= peaks[1] < peaks[2], "norms are one operation each with both"
    seconds = [plan.time.step_seconds.estimate for plan in (with_it, without)]
    assert seconds[0] is not None and seconds[1] is not None and seconds[0] < seconds[1]
    warned = "No run with compiled_layers on a card is recorded"
    assert not any(warned in told for told in with_it.warnings)
    monkeypatch.setattr(CompiledLayers, "measured", False)
    again = plan_for(replace(asked, required=(*needed, "compiled_layers")))
    assert any(warned in told for told in again.warnings)


def test_a_compiler_that_gives_up_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("no compiler was found")

    monkeypatch.setattr(compiled, "BACKEND", broken)
    save_model("llama", tmp_path)
    built = session.build(make_plan(tmp_path, choices=KNOBS | {"compiled_layers": {}}, total_tokens=48))
    with pytest.raises(PlanError, match=r"compiled_layers: torch\.compile cannot compile LlamaDecoderLayer here"):
        _step(built, 48)


def test_too_little_memory_for_the_compiler_is_told_as_such(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run then goes on by a smaller plan, as after any step that is out of memory."""

    def full(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(compiled, "BACKEND", full)
    save_model("llama", tmp_path)
    built = session.build(make_plan(tmp_path, choices=KNOBS | {"compiled_layers": {}}, total_tokens=48))
    with pytest.raises(torch.OutOfMemoryError):
        _step(built, 48)


def test_layers_in_pieces_are_not_compiled(tmp_path: Path) -> None:
    save_model("llama", tmp_path)
    streamed = {"streamed": {"kernel": "cpu", "chunk": 16, "heads": 2, "staging": "host"}}
    choices = {"lora": {"rank": 4, "alpha": 8}, "chunked_loss": {"rows": 16}, "compiled_layers": {}} | streamed
    with pytest.raises(PlanError, match="whole layers to be compiled"):
        session.build(make_plan(tmp_path, choices=choices, total_tokens=48))


def test_layers_are_compiled_on_short_rows_before_the_probe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, partitioned: None
) -> None:
    """And what that takes is in no peak; adapters and their gradients are as they were."""
    monkeypatch.setattr("trainer.probing.COMPILED_ON", 16)
    monkeypatch.setattr(Recorder, "counting", lambda *_: nullcontext())  # torch compiles nothing while it is counted
    save_model("llama", tmp_path)
    plan = make_plan(tmp_path, choices=KNOBS | {"compiled_layers": {}}, total_tokens=48)
    told: list[tuple[str, list[int]]] = []
    with Recorder(torch.device("cpu")) as recorder:
        built = session.build(plan)
        before = [parameter.detach().clone() for parameter in built.trained]
        probe(plan, built, recorder, lambda what, tokens: told.append((what, [*tokens])))
    assert told == [("compiling layers", [16]), ("probe step", [48]), ("probe evaluation", [48])]  # one row in a batch
    for parameter, value in zip(built.trained, before, strict=True):
        assert torch.equal(parameter, value) and parameter.grad is not None and not parameter.grad.any()


def test_fewer_rows_run_what_was_compiled(tmp_path: Path, partitioned: None) -> None:
    """The last batch of an epoch has fewer, down to one."""
    save_model("llama", tmp_path)
    plan = make_plan(tmp_path, choices=KNOBS | {"compiled_layers": {}}, total_tokens=48, batch=4)
    built = session.build(plan)
    compile_first(plan, built)
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in built.trained)
    graphs = counters["stats"]["unique_graphs"]
    for rows in (4, 3, 1):
        batch = synthetic_batch(rows, 48, 48, built.base.config.vocab_size, 0)
        built.loss(batch, torch.tensor(float(batch.trained)), nothing).backward()
        evaluate(built.loss, [batch], built.device)
    assert counters["stats"]["unique_graphs"] == graphs
