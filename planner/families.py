"""The model families tierplan knows: what config.json leaves unsaid about each, as transformers 5.23 builds it.

A family is known once every fact here was compared with the class in transformers, parameter by parameter
(``tests/test_model_against_transformers.py``). Nothing is guessed for a family that is not in the table.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class Family:
    """Structure and defaults of one ``model_type``. ``absent`` means: config.json has no such field.

    Attributes:
        attention: linears of attention, in the order query, key, value, output.
        mlp: linears of the MLP; the last leads back to the model's width. Three of them mean a gate.
        biased: linears that always have a bias.
        bias_switches: config field (false if absent) to the linears that get a bias from it.
        qk_norm: whether queries and keys are normed, or the config field (false if absent) that says so.
        absent_kv_heads: key/value heads if absent; None: as many as query heads.
        null_kv_heads: null is allowed and means as many as query heads.
        absent_head_size: head size if absent; None: width divided by heads.
        null_head_size: null is allowed and means width divided by heads.
        always_divides: the width has to be a multiple of the heads even where a head size is given.
        absent_rotary_factor: part of each head that is turned, if absent; None: always whole heads.
        window: which layers may have a sliding window.
    """

    model_type: str
    architecture: str
    attention: tuple[str, str, str, str] = ("q_proj", "k_proj", "v_proj", "o_proj")
    mlp: tuple[str, ...] = ("gate_proj", "up_proj", "down_proj")
    biased: frozenset[str] = frozenset()
    bias_switches: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    head_bias: bool = False
    norm: Literal["layernorm", "rmsnorm"] = "rmsnorm"
    norms_per_layer: int = 2
    parallel_block: bool = False
    qk_norm: bool | str = False
    absent_kv_heads: int | None = None
    null_kv_heads: bool = True
    absent_head_size: int | None = None
    null_head_size: bool = False
    always_divides: bool = False
    absent_rotary_factor: float | None = None
    window: Literal["no layer", "every layer", "upper layers"] = "no layer"
    residual_dropout: str | None = None
    embedding_dropout: str | None = None
    absent_activation: str = "silu"
    absent_context: int = 2048


_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        Family(
            "llama",
            "LlamaForCausalLM",
            bias_switches={
                "attention_bias": _ATTENTION,
                "mlp_bias": ("gate_proj", "up_proj", "down_proj"),
            },
            null_head_size=True,
            always_divides=True,
        ),
        Family(
            "mistral",
            "MistralForCausalLM",
            absent_kv_heads=8,
            null_kv_heads=False,
            null_head_size=True,
            window="every layer",
            absent_context=131072,
        ),
        Family(
            "phi",
            "PhiForCausalLM",
            attention=("q_proj", "k_proj", "v_proj", "dense"),
            mlp=("fc1", "fc2"),
            biased=frozenset({"q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2"}),
            head_bias=True,
            norm="layernorm",
            norms_per_layer=1,
            parallel_block=True,
            qk_norm="qk_layernorm",
            absent_rotary_factor=0.5,
            residual_dropout="resid_pdrop",
            embedding_dropout="embd_pdrop",
            absent_activation="gelu_new",
        ),
        Family(
            "qwen2",
            "Qwen2ForCausalLM",
            biased=frozenset({"q_proj", "k_proj", "v_proj"}),
            absent_kv_heads=32,
            window="upper layers",
            absent_context=32768,
        ),
        Family(
            "qwen3",
            "Qwen3ForCausalLM",
            bias_switches={"attention_bias": _ATTENTION},
            qk_norm=True,
            absent_kv_heads=32,
            absent_head_size=128,
            window="upper layers",
            absent_context=32768,
        ),
    )
}

# Alike in every family that has windows.
ABSENT_WINDOW = 4096
ABSENT_FULL_LAYERS = 28  # max_window_layers: the layers below it see everything

ABSENT_ROPE_THETA = 10000.0

# Kinds of rotary scaling, with what each cannot do without (config.json, rope_scaling or rope_parameters).
ROPE_NEEDS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "longrope": ("short_factor", "long_factor"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}

# Names of activations in transformers 5.23 that take no parameter of their own.
ACTIVATIONS: frozenset[str] = frozenset(
    {
        "gelu", "gelu_10", "gelu_accurate", "gelu_fast", "gelu_new", "gelu_python", "gelu_python_tanh",
        "gelu_pytorch_tanh", "hardswish", "laplace", "leaky_relu", "linear", "mish", "quick_gelu", "relu", "relu2",
        "relu6", "sigmoid", "silu", "sqrtsoftplus", "swish", "tanh",
    }
)  # fmt: skip

DTYPES: frozenset[str] = frozenset({"float16", "bfloat16", "float32", "float64"})

# Fields that give the sizes: without any one of them a model has no shape.
SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")


def known_model_types() -> str:
    """The families by name, for messages."""
    return ", ".join(sorted(FAMILIES))
