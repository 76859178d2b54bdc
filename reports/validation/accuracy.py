"""Errors of the gradients in 16 bits: layers in passes beside plain transformers and PEFT, against float32.

    python -m reports.validation.accuracy OUT [--gpu CARD] [--model NAME] [--tokens N] [--seeds N]

The same random weights (16 bits, so that float32 holds them exactly), the same adapters and the same tokens go through
three: transformers and PEFT in float32, the same under autocast as its Trainer runs it, and the streamed executor as a
plan sets it up. What is told is the norm of what all adapters' gradients differ by from those in float32, as a share of
their norm, and the same of the loss. OUT gets the record.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from planner.plan import Plan
from planner.planning import Request, make_plan
from trainer.built import BuiltRun
from trainer.data import Batch, synthetic_batch
from trainer.record import environment, revision
from trainer.session import build
from trainer.step import nothing

Gradients = dict[str, Tensor]
ADAPTER_SCALE = 0.02  # of random entries; PEFT starts half of the matrices at zero, where half of the gradients are


def plan_of(gpu: str, model: str, tokens: int) -> Plan:
    """Layers in passes, in several chunks and groups, with 16-bit weights."""
    return make_plan(
        Request(
            gpu=gpu,
            model=f"random:{model}",
            total_tokens=tokens,
            required=("streamed", "mixed_precision", "lora", "chunked_loss"),
            excluded=("nf4_weights", "checkpoint_int8", "checkpoint_nf4", "streamed_weights", "adamw_8bit"),
            knobs={"lora": {"rank": 16}, "streamed": {"chunk": max(64, tokens // 4), "heads": 3, "staging": "host"}},
        )
    )


def fill_adapters(built: BuiltRun, seed: int) -> None:
    """Random entries in every adapter matrix."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in built.trained:
        parameter.data.copy_(ADAPTER_SCALE * torch.randn(parameter.shape, generator=generator))


def stock_of(built: BuiltRun, dtype: torch.dtype) -> PeftModel:
    """Plain transformers and PEFT with the weights of a run: frozen ones in a dtype, adapters in float32."""
    config = built.base.config.__class__.from_dict(built.base.config.to_dict())
    config._attn_implementation = "sdpa"
    with torch.device(built.device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    ours: Any = built.model.peft_config["default"]
    lora = LoraConfig(
        r=ours.r,
        lora_alpha=ours.lora_alpha,
        target_modules=ours.target_modules,
        lora_dropout=0.0,
        task_type="CAUSAL_LM",
    )
    adapted = get_peft_model(model, lora)
    held = built.model.state_dict()
    for name, tensor in adapted.state_dict().items():
        tensor.copy_(held[name])
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return adapted.train()


def stock_step(model: PeftModel, batch: Batch, autocast: torch.dtype | None) -> tuple[float, Gradients]:
    """Loss and gradients as plain transformers give them."""
    device = batch.inputs.device.type
    with torch.autocast(device, dtype=autocast, enabled=autocast is not None):
        logits = model(input_ids=batch.inputs, use_cache=False).logits
    loss = cross_entropy(logits.float().flatten(0, 1), batch.targets.flatten())
    loss.backward()
    return float(loss.detach()), _gradients(model)


def our_step(built: BuiltRun, batch: Batch) -> tuple[float, Gradients]:
    """Loss and gradients of the streamed executor."""
    loss = built.loss(batch, torch.tensor(float(batch.trained), device=built.device), nothing)
    loss.backward()
    return float(loss.detach()), _gradients(built.model)


def _gradients(model: PeftModel) -> Gradients:
    return {name: p.grad.double().cpu() for name, p in model.named_parameters() if p.grad is not None}


def error(found: Gradients, reference: Gradients) -> float:
    """The norm of the difference as a share of the reference's."""
    assert found.keys() == reference.keys(), found.keys() ^ reference.keys()
    apart = sum(float((found[name] - reference[name]).square().sum()) for name in reference)
    whole = sum(float(each.square().sum()) for each in reference.values())
    return float((apart / whole) ** 0.5)


def one_seed(plan: Plan, seed: int) -> dict[str, float]:
    """Errors of both for one set of weights, adapters and tokens."""
    plan = plan.model_copy(update={"train": plan.train.model_copy(update={"seed": seed})})
    built = build(plan)
    fill_adapters(built, seed)
    vocab = built.base.config.vocab_size
    batch = synthetic_batch(1, plan.total_tokens, plan.target, vocab, seed, 1).to(built.device)
    exact_loss, exact = stock_step(stock_of(built, torch.float32), batch, None)
    stock_loss, stock = stock_step(stock_of(built, built.dtype), batch, built.dtype)
    our_loss, ours = our_step(built, batch)
    built.close()
    return {
        "stock": error(stock, exact),
        "streamed": error(ours, exact),
        "stock_loss": abs(stock_loss / exact_loss - 1),
        "streamed_loss": abs(our_loss / exact_loss - 1),
    }


def measured(gpu: str, model: str, tokens: int, seeds: int) -> dict[str, Any]:
    """The record, but for what it was measured on."""
    torch.backends.cuda.matmul.allow_tf32 = False
    plan = plan_of(gpu, model, tokens)
    each = [one_seed(plan, seed) for seed in range(seeds)]
    median = {name: statistics.median(one[name] for one in each) for name in each[0]}
    return {
        "what": "relative error of all adapters' gradients against float32",
        "model": model,
        "tokens": tokens,
        "dtype": plan.knobs("mixed_precision")["dtype"],
        "streamed": dict(plan.knobs("streamed")),
        "each": each,
        "median": median,
        "ratio": median["streamed"] / median["stock"],
    }


def asked_for(description: str, *, tokens: int, **count: int) -> argparse.Namespace:
    """What the command line says: the record, card, model and tokens, and how many there are of one thing."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("out", type=Path)
    parser.add_argument("--gpu", default="h200-sxm")
    parser.add_argument("--model", default="llama-3.2-1b")
    for name, many in {"tokens": tokens, **count}.items():
        parser.add_argument(f"--{name}", type=int, default=many)
    return parser.parse_args()


def write_record(out: Path, found: dict[str, Any]) -> None:
    """The record, and on what it was measured."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    whole = found | {"environment": environment(device), "revision": revision()}
    out.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")


def main() -> int:
    """See the module's docstring."""
    asked = asked_for("errors of gradients in 16 bits", tokens=4096, seeds=5)
    found = measured(asked.gpu, asked.model, asked.tokens, asked.seeds)
    write_record(asked.out, found)
    print(f"stock {found['median']['stock']:.3e}, streamed {found['median']['streamed']:.3e}, {found['ratio']:.3f} x")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
