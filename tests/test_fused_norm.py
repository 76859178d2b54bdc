"""RMSNorm in one operation is the same function, and the plan knows what it saves."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import pytest
import test_trainer_parity as parity
import torch
from test_trainer_parity import _assert_same, _batch, _grouped_products_of_any_type, _kernel, _stock_of, folders
from torch.nn import functional
from trainer_tiny import CONFIGS, make_plan, save_model
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from planner.errors import PlanError
from planner.families import FAMILIES
from planner.hardware import load_profile
from planner.machine import cpu_profile
from planner.model import load_model
from planner.optimizations import by_id
from planner.optimizations.base import Situation
from planner.planning import Request
from planner.planning import make_plan as plan_for
from trainer import session
from trainer.checkpointing import DeviceStore
from trainer.data import synthetic_batch
from trainer.norms import fuse_norms
from trainer.step import nothing

__all__ = ["_grouped_products_of_any_type", "folders"]
FITTING = sorted(name for name in CONFIGS if FAMILIES[name].norm == "rmsnorm" and not FAMILIES[name].norm_one_plus)
CPU = {"exact_attention": {"kernel": "cpu"}}
TOKENS = 48


@pytest.mark.parametrize("family", FITTING)
@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_step_equals_stock_step(folders: dict[str, Path], family: str, checkpointed: bool) -> None:
    batch, routers_too = _batch(31, 19), parity._wide_norms
    stock = _stock_of(folders[family], batch)
    store = DeviceStore() if checkpointed else None
    with (
        patch.object(parity, "_wide_norms", lambda model: [routers_too(model), fuse_norms(model)]),
        patch.object(functional, "rms_norm", wraps=functional.rms_norm) as one,
    ):
        ours = parity._ours(folders[family], batch, kernel=_kernel(family), store=store, rows=5)
    assert one.call_count > 0
    _assert_same(ours, stock)


def test_in_sixteen_bits_it_is_rounded_no_worse() -> None:
    """Against float64 it is no further off than what transformers writes out, which rounds twice."""
    generator = torch.Generator().manual_seed(1)
    norm = LlamaRMSNorm(256).to(torch.bfloat16)
    norm.weight.data = 1 + 0.1 * torch.randn(256, generator=generator).to(torch.bfloat16)
    hidden = torch.randn(64, 256, generator=generator).to(torch.bfloat16)
    exact = hidden.double()
    exact = norm.weight.double() * exact * torch.rsqrt(exact.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon)
    written_out = (norm(hidden).double() - exact).norm()
    model = torch.nn.Sequential(norm)
    fuse_norms(model)
    assert (model(hidden).double() - exact).norm() <= written_out


def test_a_run_uses_it_in_every_norm(tmp_path: Path) -> None:
    """The plan's choice reaches the norms of the layers, of query and key, and the last one."""
    save_model("qwen3", tmp_path)
    choices = {"lora": {"rank": 4, "alpha": 8}, "chunked_loss": {"rows": 16}, "fused_norm": {}} | CPU
    built = session.build(make_plan(tmp_path, family="qwen3", choices=choices, total_tokens=TOKENS))
    batch = synthetic_batch(1, TOKENS, TOKENS, built.base.config.vocab_size, 0)
    with patch.object(functional, "rms_norm", wraps=functional.rms_norm) as one:
        built.loss(batch, torch.tensor(float(batch.trained)), nothing).backward()
    layers = built.base.config.num_hidden_layers
    assert one.call_count == 4 * layers + 1


@pytest.mark.parametrize("family", ["gemma2", "phi"])
def test_a_model_that_is_other_than_planned_is_refused(tmp_path: Path, family: str) -> None:
    save_model(family, tmp_path)
    attention = {"blockwise_attention": {}} if family == "gemma2" else CPU
    choices = {"lora": {"rank": 4, "alpha": 8}, "fused_norm": {}} | attention
    plan = make_plan(tmp_path, family=family, choices=choices, total_tokens=TOKENS)
    with pytest.raises(PlanError, match="fused_norm: is planned for, and"):
        session.build(plan)


def test_where_it_cannot_be_had() -> None:
    fused, card = by_id("fused_norm"), load_profile("rtx3090")
    reasons = {
        name: fused.reasons(Situation(card, load_model(name), 2**35))
        for name in ("llama-3.2-1b", "phi-2", "gemma-3-1b")
    }
    assert reasons["llama-3.2-1b"] == ()
    assert "LayerNorm" in reasons["phi-2"][0] and "one plus the weight" in reasons["gemma-3-1b"][0]
    assert "needs a graphics card" in fused.reasons(Situation(cpu_profile(), load_model("llama-3.2-1b"), 2**35))[0]


@pytest.mark.parametrize("gpu", ["rtx2060s", "rtx4090"])
def test_a_plan_with_it_takes_less_so_every_plan_has_it(gpu: str) -> None:
    base = Request(gpu, "llama-3.2-1b", total_tokens=4096, excluded=("streamed",), required=("gradient_checkpointing",))
    with_it = plan_for(base)
    without = plan_for(replace(base, excluded=(*base.excluded, "fused_norm")))
    assert "fused_norm" not in {choice.id for choice in without.choices}
    assert {choice.id for choice in with_it.choices} == {*(choice.id for choice in without.choices), "fused_norm"}
    assert with_it.memory.gpu.peak_bytes.expected < without.memory.gpu.peak_bytes.expected
    seconds = [plan.time.step_seconds.estimate for plan in (with_it, without)]
    assert seconds[0] is not None and seconds[1] is not None and seconds[0] < seconds[1]
