"""What other estimators say of the grid's runs with whole layers, beside what was planned and measured.

    pip install accelerate deepspeed llm-analysis
    python -m reports.validation.peers OUT

accelerate's `estimate-memory` tells the size of the weights and of training all of them with Adam; DeepSpeed's
estimators tell model states of ZeRO, again of all parameters; llm-analysis tells weights, gradients, optimiser states
and activations of a batch. None of them knows adapters. So of each the figure is told that is nearest to LoRA over
frozen weights, which leaves gradients and states of frozen parameters out, and the one of its own for training. OUT
gets the figures of every run as JSON. Nothing is downloaded: models are made of the shipped configs, without data.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from planner.measurements import Record, read_records
from planner.model import SHIPPED, load_model

GRID = Path(__file__).with_name("grid")
PACKAGES = ("accelerate", "deepspeed", "llm-analysis")
ACCELERATE_DTYPES = {"nf4": "int4", "float16": "float16", "bfloat16": "float16", "float32": "float32"}


@cache
def empty_model(model: str) -> Any:
    """The model without data, in float32, as accelerate makes one."""
    config = AutoConfig.from_pretrained(SHIPPED / model)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def weights_of(record: Record) -> str:
    """In what the frozen linears of a run are held."""
    on = {choice["id"] for choice in record.content["plan"]["choices"]}
    return "nf4" if "nf4_weights" in on else str(record.content["dtype"])


def by_accelerate(record: Record) -> dict[str, int | None]:
    """The table of `accelerate estimate-memory`: size of the weights, and of training them with Adam."""
    from accelerate.commands.estimate import estimate_training_usage
    from accelerate.utils import calculate_maximum_sizes

    total, _ = calculate_maximum_sizes(empty_model(record.content["model"]["id"]))
    dtype = ACCELERATE_DTYPES[weights_of(record)]
    training = max(estimate_training_usage(total, dtype).values())
    width = {"float32": 1, "float16": 2, "int4": 8}[dtype]
    return {"nearest": total // width, "training": training if training != -1 else None}


def by_deepspeed(record: Record) -> dict[str, int | None]:
    """ZeRO 2 on one card: with states in host memory, which leaves the weights, and with all on the card."""
    from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs

    count = sum(parameter.numel() for parameter in empty_model(record.content["model"]["id"]).parameters())
    away, here = (estimate_zero2_model_states_mem_needs(count, cpu_offload=offload)[1] for offload in (True, False))
    return {"nearest": away, "training": here}


def by_llm_analysis(record: Record) -> dict[str, int | None]:
    """Its training with the weights' width, batch and length of the run; nearest: weights and activations."""
    from llm_analysis.analysis import ActivationRecomputation, LLMAnalysis
    from llm_analysis.config import DtypeConfig, GPUConfig, ModelConfig

    shape = load_model(record.content["model"]["id"])
    on = {choice["id"] for choice in record.content["plan"]["choices"]}
    bits = {"nf4": 4, "float32": 32}.get(weights_of(record), 16)
    wide = 32 if bits == 32 else 16
    model = ModelConfig(
        name=shape.id,
        num_layers=shape.layers,
        n_head=shape.heads,
        hidden_dim=shape.width,
        vocab_size=shape.vocab,
        max_seq_len=record.tokens,
        num_key_value_heads=shape.kv_heads,
        ffn_embed_dim=shape.mlp_width,
    )
    card = GPUConfig(
        name="any",  # it asks for rates, which decide nothing in memory
        mem_per_GPU_in_GB=10_000,
        hbm_bandwidth_in_GB_per_sec=1000,
        intra_node_bandwidth_in_GB_per_sec=100,
        intra_node_min_message_latency=1e-6,
        peak_fp16_TFLOPS=100,
        peak_i8_TFLOPS=100,
        peak_i4_TFLOPS=100,
    )
    dtype = DtypeConfig(name="run", weight_bits=bits, activation_bits=wide, embedding_bits=wide)
    made = LLMAnalysis(model, card, dtype, achieved_tflops=50, achieved_memory_bandwidth_GBs=500).training(
        batch_size_per_gpu=1,
        gradient_accumulation_steps=1,
        global_batch_size=1,
        seq_len=record.tokens,
        total_num_tokens=record.tokens,
        activation_recomputation=ActivationRecomputation.FULL
        if "gradient_checkpointing" in on
        else ActivationRecomputation.NONE,
        flash_attn="exact_attention" in on,
        mlp_gated_linear_units=shape.gated_mlp,
    )
    weights, activations = (made[f"{name}_memory_per_gpu"] for name in ("weight", "activation"))
    return {"nearest": int(weights + activations), "training": int(made["(weight+op_state+grad+act)_memory_per_gpu"])}


PEERS = {"accelerate": by_accelerate, "deepspeed": by_deepspeed, "llm-analysis": by_llm_analysis}


def figures(record: Record) -> Mapping[str, Any]:
    """What each says of one run, beside what was planned and measured."""
    peers: dict[str, Any] = {}
    for name, of in PEERS.items():
        try:
            peers[name] = of(record)
        except (AssertionError, ValueError, TypeError, ZeroDivisionError) as error:
            peers[name] = {"refused": f"{type(error).__name__}: {error}".splitlines()[0]}
    return {"measured": record.allocated, "planned": record.expected, "peers": peers}


def main() -> int:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(
        prog="python -m reports.validation.peers", description=str(__doc__).splitlines()[0]
    )
    parser.add_argument("out", type=Path)
    given = parser.parse_args()
    runs = {record.name: figures(record) for record in read_records(GRID) if record.content["executor"] == "resident"}
    found = {"packages": {name: version(name) for name in PACKAGES}, "runs": runs}
    given.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
