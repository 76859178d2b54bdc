"""Tiny models, a tiny tokenizer and a whole plan for the trainer's tests. Everything is made on the spot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    GptOssConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Phi3Config,
    PhiConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    SmolLM3Config,
    Starcoder2Config,
)

from planner.model import load_model
from planner.plan import Plan

VOCAB = 320

_SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": VOCAB,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": None,
}

CONFIGS = {
    "phi": lambda: PhiConfig(**_SIZES, resid_pdrop=0.1, embd_pdrop=0.1, attention_dropout=0.1),
    "llama": lambda: LlamaConfig(**_SIZES, num_key_value_heads=2, tie_word_embeddings=True),
    "qwen2": lambda: Qwen2Config(
        **_SIZES, num_key_value_heads=4, use_sliding_window=True, sliding_window=9, max_window_layers=1
    ),
    "qwen3": lambda: Qwen3Config(**_SIZES, num_key_value_heads=1, head_dim=32),
    "mistral": lambda: MistralConfig(**_SIZES, num_key_value_heads=2, sliding_window=12),
    "phi3": lambda: Phi3Config(**_SIZES, num_key_value_heads=2, resid_pdrop=0.1, sliding_window=20),
    "gemma2": lambda: Gemma2Config(
        **_SIZES,
        num_key_value_heads=2,
        head_dim=16,
        query_pre_attn_scalar=4,
        sliding_window=8,
        attn_logit_softcapping=0.5,
        final_logit_softcapping=0.3,
    ),
    "gemma3_text": lambda: Gemma3TextConfig(
        **_SIZES, num_key_value_heads=1, head_dim=32, query_pre_attn_scalar=24, sliding_window=8
    ),
    "granite": lambda: GraniteConfig(
        **_SIZES,
        num_key_value_heads=2,
        embedding_multiplier=12.0,
        residual_multiplier=0.22,
        attention_multiplier=0.05,
        logits_scaling=7.0,
    ),
    "smollm3": lambda: SmolLM3Config(**_SIZES, num_key_value_heads=2, no_rope_layers=[1, 0, 1]),
    "starcoder2": lambda: Starcoder2Config(**_SIZES, num_key_value_heads=2, sliding_window=None),
    "gpt2": lambda: GPT2Config(
        **{name: value for name, value in _SIZES.items() if name != "intermediate_size"},
        scale_attn_by_inverse_layer_idx=True,
    ),
    "gpt_neox": lambda: GPTNeoXConfig(**_SIZES, hidden_dropout=0.1, attention_dropout=0.1),
    "gpt_oss": lambda: GptOssConfig(
        **_SIZES,
        num_key_value_heads=2,
        head_dim=16,
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=8,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    ),
    "mixtral": lambda: MixtralConfig(
        **_SIZES, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, router_jitter_noise=0.1
    ),
    "qwen3_moe": lambda: Qwen3MoeConfig(
        **_SIZES, num_key_value_heads=2, head_dim=16, num_experts=6, num_experts_per_tok=3, moe_intermediate_size=48
    ),
}
"""By family: grouped, single and full key/value heads, tied and untied output heads, some with short windows."""

ARCHITECTURES = {
    "phi": "PhiForCausalLM",
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "mistral": "MistralForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "granite": "GraniteForCausalLM",
    "smollm3": "SmolLM3ForCausalLM",
    "starcoder2": "Starcoder2ForCausalLM",
    "gpt2": "GPT2LMHeadModel",
    "gpt_neox": "GPTNeoXForCausalLM",
    "gpt_oss": "GptOssForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
}

TEXT = """def add(first, second):
    return first + second


class Counter:
    def __init__(self, start=0):
        self.value = start

    def step(self, by=1):
        self.value = add(self.value, by)
        return self.value
"""


def save_model(family: str, folder: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A random model of a family in a folder, with a tokenizer; norms are off one so that they matter."""
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(CONFIGS[family](), dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return model


def save_tokenizer(folder: Path) -> None:
    """A byte-level BPE tokenizer with one control token, learned from a few lines."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=["<end>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([TEXT] * 4, trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(folder)


def write_sources(folder: Path, files: int = 8) -> Path:
    """A folder of small source files, no two alike."""
    folder.mkdir()
    for index in range(files):
        (folder / f"module_{index}.py").write_text(TEXT.replace("add", f"add_{index}") * (1 + index % 3))
    return folder


def make_plan(
    source: str | Path,
    *,
    family: str = "llama",
    choices: dict[str, dict[str, Any]] | None = None,
    **given: Any,
) -> Plan:
    """A plan with generous bounds; ``given`` are keys of ``train`` or of the plan itself."""
    total = given.pop("total_tokens", 32)
    target = given.pop("target", total)
    high = given.pop("high", 2**33)
    phases = {
        "forward": {"weights/linear": 1000},
        "backward": {"weights/linear": 1000, "activations/mlp": 500},
    }
    train = {name: given.pop(name) for name in list(given) if name not in Plan.model_fields}
    document: dict[str, Any] = {
        "schema": "tierplan/1",
        "verdict": "fits",
        "summary": "made by hand",
        "gpu": {
            "id": "cpu",
            "name": "CPU",
            "kind": "cpu",
            "compute_capability": None,
            "visible_bytes": 2**34,
            "context_bytes": 0,
            "context_basis": "none",
        },
        "model": {
            "id": f"tiny-{family}",
            "source": str(source),
            "architecture": ARCHITECTURES[family],
            "parameters": load_model(str(source).removeprefix("random:")).parameters,
            "layers": 3,
            "native_context": 256,
        },
        "objective": "context",
        "tier": None,
        "context": total - target,
        "target": target,
        "total_tokens": total,
        "lora_rank": 4,
        "longest": {"with_target": None, "all_trained": None},
        "choices": [
            {"id": name, "reason": "by hand", "knobs": knobs}
            for name, knobs in ({"lora": {"rank": 4, "alpha": 8}} if choices is None else choices).items()
        ],
        "rejected": [],
        "memory": {
            "gpu": {
                "budget_bytes": 2**34,
                "peak_bytes": {"low": min(1000, high), "expected": min(1500, high), "high": high},
                "peak_phase": "backward",
                "phases": phases,
            },
            "host": {"budget_bytes": 2**34, "peak_bytes": 0, "pinned_bytes": 0, "terms": {}},
        },
        "time": {
            "step_seconds": {"bound": None, "estimate": None},
            "limit_seconds": 86400.0,
            "basis": "none",
        },
        "train": train,
        "provenance": {
            "tierplan": "0",
            "command": "by hand",
            "profile_sha256": "0",
            "model_sha256": "0",
            "calibration_sha256": "0",
        },
    }
    return Plan.model_validate(document | given)


def write_gguf(path: Path) -> None:
    """A random Llama of three layers as a GGUF file, with a tokenizer of single bytes."""
    import gguf

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(256)
    writer.add_embedding_length(64)
    writer.add_block_count(3)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(16)
    writer.add_vocab_size(VOCAB)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ["<end>", *alphabet, "in", "re"]
    words += [f"<unused{index}>" for index in range(VOCAB - len(words))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(words)
    writer.add_token_types([3] + [1] * (VOCAB - 1))
    writer.add_token_merges(["i n", "r e"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    generator = torch.Generator().manual_seed(2)
    shapes = {"token_embd": (VOCAB, 64), "output_norm": (64,)}
    for layer in range(3):
        for name, shape in {
            "attn_norm": (64,), "attn_q": (64, 64), "attn_k": (32, 64), "attn_v": (32, 64),
            "attn_output": (64, 64), "ffn_norm": (64,), "ffn_gate": (96, 64), "ffn_up": (96, 64),
            "ffn_down": (64, 96),
        }.items():  # fmt: skip
            shapes[f"blk.{layer}.{name}"] = shape
    for name, shape in shapes.items():
        values = 0.05 * torch.randn(shape, generator=generator) + float(len(shape) == 1)
        writer.add_tensor(f"{name}.weight", values.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
