"""The fused activation is the same function, saves one tensor instead of four, and the plan knows it."""

from pathlib import Path

import pytest
import torch
from transformers import PhiConfig
from transformers.activations import ACT2FN

from planner.machine import cpu_profile
from planner.model import load_model
from planner.optimizations import by_id
from planner.optimizations.base import Situation
from planner.optimizations.mlp.fused_activation import FUSED
from planner.plan import Plan
from planner.planning import Request, make_plan
from trainer.measure import Recorder
from trainer.probing import probe
from trainer.session import build

TOKENS = 512


@pytest.mark.parametrize(("unfused", "fused"), sorted(FUSED.items()))
def test_same_function_and_gradient(unfused: str, fused: str) -> None:
    x = torch.linspace(-12, 12, 4001, dtype=torch.float64, requires_grad=True)
    values, gradients = [], []
    for name in (unfused, fused):
        y = ACT2FN[name](x)
        values.append(y.detach())
        gradients.append(torch.autograd.grad(y.sum(), x)[0])
    assert (values[0] - values[1]).abs().max() < 1e-14
    assert (gradients[0] - gradients[1]).abs().max() < 1e-13


def test_one_saved_tensor_instead_of_four() -> None:
    saved: dict[str, set[int]] = {}
    for name in ("gelu_new", "gelu_pytorch_tanh"):
        x, kept = torch.randn(64, requires_grad=True), []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t) or t, lambda t: t):
            y = ACT2FN[name](x)
        saved[name] = {tensor.data_ptr() for tensor in kept if tensor.numel() == 64}
        assert y.shape == x.shape
    assert len(saved["gelu_new"]) == 4 and len(saved["gelu_pytorch_tanh"]) == 1


def _plan(folder: Path, required: tuple[str, ...], excluded: tuple[str, ...]) -> Plan:
    return make_plan(
        Request(
            gpu="cpu",
            model=f"random:{folder}",
            total_tokens=TOKENS,
            required=(*required, "chunked_loss", "exact_attention"),
            excluded=excluded,
            knobs={"lora": {"rank": 4}, "chunked_loss": {"rows": 64}},
        )
    )


@pytest.mark.parametrize("checkpointing", [True, False])
def test_step_takes_what_was_planned(tmp_path: Path, checkpointing: bool) -> None:
    """Plan, build and probe a small Phi with and without it: the peak falls, each time to what was planned."""
    PhiConfig(
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=8,
        vocab_size=64,
        hidden_act="gelu_new",
        architectures=["PhiForCausalLM"],
    ).save_pretrained(tmp_path)
    layers = "gradient_checkpointing"
    peaks = []
    for fused in (False, True):
        on = (*(("fused_activation",) if fused else ()), *((layers,) if checkpointing else ()))
        off = (*(() if fused else ("fused_activation",)), *(() if checkpointing else (layers,)))
        plan = _plan(tmp_path, on, off)
        with Recorder(torch.device("cpu")) as recorder:
            built = build(plan)
            probe(plan, built, recorder)
        measured = recorder.peak("allocated_bytes")
        assert measured == pytest.approx(plan.memory.gpu.peak_bytes.expected, rel=0.01)
        peaks.append(measured)
    assert peaks[1] < 0.8 * peaks[0]


def test_refused_where_there_is_nothing_to_fuse() -> None:
    situation = Situation(cpu_profile(), load_model("llama-3.2-1b"), 2**35)
    assert by_id("fused_activation").reasons(situation) == ("llama-3.2-1b has silu, which is one operation already",)
