"""Families that are unlike Llama, for real: loaded or made by chance, quantised, and stepped; the loss falls."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from trainer_tiny import make_plan, save_model

from trainer import session
from trainer.data import synthetic_batch
from trainer.gradients import Shaping
from trainer.layers import layers_of
from trainer.step import nothing, update

CPU = {"exact_attention": {"kernel": "cpu"}}
ATTENTION = {"gemma2": {"blockwise_attention": {}}}
STEPS, TOKENS = 3, 48


@pytest.mark.parametrize("family", ["gemma2", "gpt2", "gpt_oss", "mistral", "mixtral", "qwen3_moe"])
@pytest.mark.parametrize("source", ["", "random:"], ids=("saved", "random"))
def test_a_quantised_model_learns(tmp_path: Path, family: str, source: str) -> None:
    save_model(family, tmp_path)
    choices = {
        "lora": {"rank": 4, "alpha": 8},
        "chunked_loss": {"rows": 16},
        "gradient_checkpointing": {},
        "nf4_weights": {},
        "mixed_precision": {"dtype": "bfloat16"},
        **ATTENTION.get(family, CPU),
    }
    plan = make_plan(f"{source}{tmp_path}", family=family, choices=choices, total_tokens=TOKENS, lr=1e-3)
    built = session.build(plan)
    linears = [module for module in layers_of(built.base).modules() if isinstance(module, Linear4bit)]
    adapted = [name for name, _ in built.base.named_modules() if name.endswith(".base_layer")]
    assert len(linears) == len(adapted) > 0 and not any("experts" in name or "router" in name for name in adapted)
    batch = synthetic_batch(1, TOKENS, TOKENS, built.base.config.vocab_size, 0)
    losses = []
    for _ in range(STEPS):
        loss = built.loss(batch, torch.tensor(float(batch.trained)), nothing)
        loss.backward()
        update(built.optimizer, built.scaler, lambda: Shaping().shape(built.trained, [], 0, 1.0))
        losses.append(float(loss.detach()))
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0]
