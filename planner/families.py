"""The model families tierplan knows: what config.json leaves unsaid about each, as transformers 5.23 builds it.

A family is known once every fact here was compared with the class in transformers, parameter by parameter
(``tests/test_model_against_transformers.py``). Nothing is guessed for a family that is not in the table.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal


# Families are looked up, never compared or printed; what that would need made half of this file's time to load.
@dataclass(frozen=True, eq=False, repr=False)
class Family:
    """Structure and defaults of one ``model_type``. ``absent`` means: config.json has no such field.

    Attributes:
        names: fields that the family calls otherwise than usual: every name it takes, the one that counts first.
        attention: linears of attention: query, key, value and output; or one for the first three, and output.
        mlp: linears of the MLP; the last leads back to the model's width. Three mean a gate, none mean experts.
        fused_gate_up: the first linear of the MLP gives gate and up projection in one.
        conv1d: what stands here as linears are Conv1D modules.
        absent_mlp_ratio: width of the MLP over that of the model, if absent or null; None: the field has to be there.
        clamped_experts: gate and up projection of experts are clamped, and the experts taken alone share the softmax.
        wide_expert_weights: what experts give is weighted in float32.
        expert_biases: router and experts have biases; ``expert_width``: field with the width of one expert.
        biased: linears that always have a bias.
        bias_switches: config field to the linears that get a bias from it; ``absent_bias``: its value if absent.
        norms_per_layer: norms as wide as the model; ``output_norms`` of them norm what attention and MLP give.
        norm_one_plus: RMSNorm multiplies by one plus its weight, in float32.
        parallel_block: attention and MLP read the same input, or the config field (true if absent) that says so.
        qk_norm: whether queries and keys are normed, or the config field (false if absent) that says so.
        grouped_heads: there may be fewer key/value heads than query heads; if not, their field is not looked at.
        absent_kv_heads: key/value heads if absent; None: as many as query heads.
        null_kv_heads: null is allowed and means as many as query heads.
        absent_head_size: head size if absent; None: width divided by heads.
        null_head_size: null is allowed and means width divided by heads.
        fixed_head_size: it is always width divided by heads, and a field that says otherwise is refused.
        always_divides: the width has to be a multiple of the heads even where a head size is given.
        learned_positions: a learned row for each position instead of a rotary embedding.
        rope_kinds: the only kinds of rotary embedding the family takes; empty: any. ``rope_aliases``: other names.
        absent_rope, absent_theta: kind and base of the rotary embedding if absent.
        absent_local_theta: base of a second one, for layers with a window; None: one serves all layers.
        half_tables: cosines and sines are kept once, not once for each half of a head.
        absent_rotary_factor: part of each head that is turned, if absent; None: always whole heads.
        rope_free_interval: if absent, every so many-th layer turns nothing; None: every layer turns.
        window: which layers may have a sliding window; ``window_switch``: only if use_sliding_window is true.
        absent_window: the window if absent; None: there is none then.
        window_pattern: if absent, every so many-th layer sees everything and the others slide.
        absent_dropout: every dropout rate if absent.
        narrow_softmax: the attention that transformers writes out has its softmax in the dtype of the scores.
        attention_softcap, final_softcap: field with the cap by tanh of scores or logits, and its value if absent.
        root_embedding: embeddings are multiplied by the root of the width.
        multipliers: embeddings, residuals and logits are scaled by the numbers in Granite's fields.
        numbers: fields with a positive number that no size and no step follows from.
        refused: switches that make another kind of model of it; they must be false, null or absent.
    """

    model_type: str
    architecture: str
    names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    attention: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
    mlp: tuple[str, ...] = ("gate_proj", "up_proj", "down_proj")
    fused_gate_up: bool = False
    conv1d: bool = False
    absent_mlp_ratio: int | None = None
    expert_biases: bool = False
    clamped_experts: bool = False
    wide_expert_weights: bool = False
    expert_width: str = "intermediate_size"
    biased: frozenset[str] = frozenset()
    bias_switches: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    absent_bias: bool = False
    head_bias: bool = False
    absent_tied: bool = False
    norm: Literal["layernorm", "rmsnorm"] = "rmsnorm"
    norms_per_layer: int = 2
    output_norms: int = 0
    norm_one_plus: bool = False
    parallel_block: bool | str = False
    qk_norm: bool | str = False
    grouped_heads: bool = True
    absent_kv_heads: int | None = None
    null_kv_heads: bool = True
    absent_head_size: int | None = None
    null_head_size: bool = False
    fixed_head_size: bool = False
    always_divides: bool = False
    learned_positions: bool = False
    rope_kinds: tuple[str, ...] = ()
    rope_aliases: Mapping[str, str] = field(default_factory=dict)
    absent_rope: str = "default"
    absent_theta: float = 10000.0
    absent_local_theta: float | None = None
    half_tables: bool = False
    absent_rotary_factor: float | None = None
    rope_free_interval: int | None = None
    window: Literal["no layer", "every layer", "upper layers", "by pattern", "rope-free layers"] = "no layer"
    window_switch: bool = False
    absent_window: int | None = 4096
    window_pattern: int = 2
    residual_dropout: str | None = None
    embedding_dropout: str | None = None
    absent_dropout: float = 0.0
    attention_softcap: tuple[str, float | None] | None = None
    final_softcap: tuple[str, float | None] | None = None
    narrow_softmax: bool = False
    attention_sinks: bool = False
    root_embedding: bool = False
    multipliers: bool = False
    numbers: tuple[str, ...] = ()
    refused: tuple[str, ...] = ()
    absent_activation: str = "silu"
    absent_context: int = 2048


_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_ATTENTION_BIAS: dict[str, tuple[str, ...]] = {"attention_bias": _ATTENTION}
_MLP_BIAS: dict[str, tuple[str, ...]] = {"mlp_bias": ("gate_proj", "up_proj", "down_proj")}
_EXPERT_NAMES = {"num_local_experts": ("num_local_experts", "num_experts")}
_GPT2_LINEARS = ("c_attn", "c_proj", "c_fc")
_STARCODER2_LINEARS = (*_ATTENTION, "c_fc", "c_proj")

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        Family(
            "gemma2",
            "Gemma2ForCausalLM",
            names={"hidden_act": ("hidden_activation",)},
            bias_switches=_ATTENTION_BIAS,
            absent_tied=True,
            norms_per_layer=4,
            output_norms=2,
            norm_one_plus=True,
            absent_kv_heads=4,
            null_kv_heads=False,
            absent_head_size=256,
            always_divides=True,
            window="by pattern",
            attention_softcap=("attn_logit_softcapping", 50.0),
            final_softcap=("final_logit_softcapping", 30.0),
            root_embedding=True,
            numbers=("query_pre_attn_scalar",),
            refused=("use_bidirectional_attention",),
            absent_activation="gelu_pytorch_tanh",
            absent_context=8192,
        ),
        # Its config has a cap of the scores too, which the class of transformers does not apply.
        Family(
            "gemma3_text",
            "Gemma3ForCausalLM",
            names={"hidden_act": ("hidden_activation",)},
            bias_switches=_ATTENTION_BIAS,
            absent_tied=True,
            norms_per_layer=4,
            output_norms=2,
            norm_one_plus=True,
            qk_norm=True,
            absent_kv_heads=4,
            null_kv_heads=False,
            absent_head_size=256,
            always_divides=True,
            absent_theta=1_000_000.0,
            absent_local_theta=10_000.0,
            window="by pattern",
            window_pattern=6,
            final_softcap=("final_logit_softcapping", None),
            root_embedding=True,
            numbers=("query_pre_attn_scalar",),
            refused=("use_bidirectional_attention",),
            absent_activation="gelu_pytorch_tanh",
            absent_context=131072,
        ),
        Family(
            "gpt2",
            "GPT2LMHeadModel",
            names={
                "hidden_size": ("n_embd", "hidden_size"),
                "intermediate_size": ("n_inner",),
                "num_hidden_layers": ("n_layer", "num_hidden_layers"),
                "num_attention_heads": ("n_head", "num_attention_heads"),
                "max_position_embeddings": ("n_positions", "max_position_embeddings"),
                "hidden_act": ("activation_function",),
                "attention_dropout": ("attn_pdrop",),
            },
            attention=("c_attn", "c_proj"),
            mlp=("c_fc", "c_proj"),
            conv1d=True,
            absent_mlp_ratio=4,
            biased=frozenset(_GPT2_LINEARS),
            absent_tied=True,
            norm="layernorm",
            grouped_heads=False,
            fixed_head_size=True,
            learned_positions=True,
            narrow_softmax=True,
            residual_dropout="resid_pdrop",
            embedding_dropout="embd_pdrop",
            absent_dropout=0.1,
            refused=("add_cross_attention",),
            absent_activation="gelu_new",
            absent_context=1024,
        ),
        Family(
            "gpt_neox",
            "GPTNeoXForCausalLM",
            names={"rope_theta": ("rotary_emb_base",), "partial_rotary_factor": ("rotary_pct",)},
            attention=("query_key_value", "dense"),
            mlp=("dense_h_to_4h", "dense_4h_to_h"),
            biased=frozenset({"dense_h_to_4h", "dense_4h_to_h"}),
            bias_switches={"attention_bias": ("query_key_value", "dense")},
            absent_bias=True,
            norm="layernorm",
            parallel_block="use_parallel_residual",
            grouped_heads=False,
            fixed_head_size=True,
            absent_rotary_factor=0.25,
            residual_dropout="hidden_dropout",
            embedding_dropout="hidden_dropout",
            absent_activation="gelu",
        ),
        Family(
            "gpt_oss",
            "GptOssForCausalLM",
            names=_EXPERT_NAMES,
            mlp=(),
            expert_biases=True,
            clamped_experts=True,
            bias_switches=_ATTENTION_BIAS,
            absent_bias=True,
            absent_kv_heads=8,
            null_kv_heads=False,
            absent_head_size=64,
            absent_rope="yarn",
            absent_theta=150_000.0,
            half_tables=True,
            window="by pattern",
            absent_window=128,
            narrow_softmax=True,
            attention_sinks=True,
            absent_context=131072,
        ),
        Family(
            "granite",
            "GraniteForCausalLM",
            bias_switches=_ATTENTION_BIAS | _MLP_BIAS,
            multipliers=True,
            numbers=("attention_multiplier",),
        ),
        Family(
            "llama",
            "LlamaForCausalLM",
            bias_switches=_ATTENTION_BIAS | _MLP_BIAS,
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
            "mixtral",
            "MixtralForCausalLM",
            names=_EXPERT_NAMES,
            mlp=(),
            wide_expert_weights=True,
            absent_kv_heads=8,
            null_kv_heads=False,
            null_head_size=True,
            absent_theta=1_000_000.0,
            window="every layer",
            absent_window=None,
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
        # Its config has a dropout on the embeddings too, which the class of transformers does not apply.
        Family(
            "phi3",
            "Phi3ForCausalLM",
            attention=("qkv_proj", "o_proj"),
            mlp=("gate_up_proj", "down_proj"),
            fused_gate_up=True,
            rope_kinds=("default", "longrope"),
            rope_aliases={"su": "longrope", "yarn": "longrope"},
            absent_rotary_factor=1.0,
            window="every layer",
            absent_window=None,
            residual_dropout="resid_pdrop",
            absent_context=4096,
        ),
        Family(
            "qwen2",
            "Qwen2ForCausalLM",
            biased=frozenset({"q_proj", "k_proj", "v_proj"}),
            absent_kv_heads=32,
            window="upper layers",
            window_switch=True,
            absent_context=32768,
        ),
        Family(
            "qwen3",
            "Qwen3ForCausalLM",
            bias_switches=_ATTENTION_BIAS,
            qk_norm=True,
            absent_kv_heads=32,
            absent_head_size=128,
            window="upper layers",
            window_switch=True,
            absent_context=32768,
        ),
        Family(
            "qwen3_moe",
            "Qwen3MoeForCausalLM",
            names={"num_local_experts": ("num_experts", "num_local_experts")},
            mlp=(),
            expert_width="moe_intermediate_size",
            bias_switches=_ATTENTION_BIAS,
            qk_norm=True,
            absent_kv_heads=4,
            null_kv_heads=False,
            window="every layer",
            window_switch=True,
            absent_context=32768,
        ),
        Family(
            "smollm3",
            "SmolLM3ForCausalLM",
            bias_switches=_ATTENTION_BIAS | _MLP_BIAS,
            absent_tied=True,
            absent_kv_heads=4,
            absent_theta=2_000_000.0,
            rope_free_interval=4,
            window="rope-free layers",
            window_switch=True,
            absent_window=None,
            absent_context=32768,
        ),
        Family(
            "starcoder2",
            "Starcoder2ForCausalLM",
            mlp=("c_fc", "c_proj"),
            bias_switches={"use_bias": _STARCODER2_LINEARS},
            absent_bias=True,
            absent_tied=True,
            norm="layernorm",
            absent_kv_heads=2,
            null_kv_heads=False,
            null_head_size=True,
            window="every layer",
            absent_window=None,
            residual_dropout="residual_dropout",
            embedding_dropout="embedding_dropout",
            absent_activation="gelu_pytorch_tanh",
            absent_context=4096,
        ),
    )
}

# Families whose saved tensors planner/baseline.py has formulas for. Of others only shape and counts are known.
# fmt: off
MEMORY_DERIVED: frozenset[str] = frozenset({
    "gemma2", "gemma3_text", "gpt2", "gpt_neox", "gpt_oss", "granite", "llama", "mistral", "mixtral", "phi", "phi3",
    "qwen2", "qwen3", "qwen3_moe", "smollm3", "starcoder2",
})
# fmt: on

DTYPES: frozenset[str] = frozenset({"float16", "bfloat16", "float32", "float64"})

# Fields that give the sizes: without any one of them a model has no shape.
SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")


def known_model_types() -> str:
    """The families by name, for messages."""
    return ", ".join(sorted(FAMILIES))
