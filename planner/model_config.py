"""From the text of a config.json to a ModelShape, with everything that is wrong with it said at once."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from planner.activations import ACTIVATIONS
from planner.config_fields import ABSENT, Fields, kind, shown
from planner.config_positions import (
    check_long_factors,
    read_rope_free_layers,
    read_rotary,
    read_windows,
)
from planner.errors import PlanError, did_you_mean, raise_all
from planner.families import DTYPES, FAMILIES, SIZES, Family, known_model_types
from planner.model_shape import Linear, ModelShape

MOST_LAYERS = 1000
MOST_EXPERTS = 100_000
LARGEST_FILE = 4 * 2**20  # bytes; the longest published config.json are some hundred KiB


def parse_config(content: bytes, where: str) -> dict[str, Any]:
    """The JSON object in ``content``. ``where`` names the file in messages.

    Raises:
        PlanError: not UTF-8, not JSON (with line and column), not an object, or absurdly large.
    """
    if len(content) > LARGEST_FILE:
        raise PlanError(where, f"is larger than any config.json ({LARGEST_FILE >> 20} MiB at most).")
    try:
        config = json.loads(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise PlanError(where, f"is not UTF-8 text (byte {error.start}).") from error
    except json.JSONDecodeError as error:
        position = f"line {error.lineno}, column {error.colno}"
        raise PlanError(where, f"is not JSON: {error.msg} at {position}.") from error
    except (RecursionError, ValueError) as error:
        what = "is nested too deeply" if isinstance(error, RecursionError) else "holds a number of too many digits"
        raise PlanError(where, f"is not a config.json: it {what}.") from error
    if not isinstance(config, dict):
        raise PlanError(where, f"holds {kind(config)}, where a config.json holds an object.")
    return config


def read_shape(config: Mapping[str, Any], where: str, id: str, hub_id: str | None = None) -> ModelShape:
    """The shape that transformers would build from ``config``. ``where`` names the file in messages.

    Raises:
        PlanError: an unknown family, remote code, or fields missing or absurd (all of them in one error).
    """
    family = _family(config, where)
    fields = Fields(config, where, family.names)
    _check_architecture(fields, family)

    width, heads, vocab = (fields.whole(name) for name in ("hidden_size", "num_attention_heads", "vocab_size"))
    layers = fields.whole("num_hidden_layers", most=MOST_LAYERS)
    mlp_width = _mlp_width(fields, family, width)
    experts, experts_per_token = _experts(fields, family, layers)
    context = fields.whole("max_position_embeddings", absent=family.absent_context)
    kv_heads = _kv_heads(fields, family, heads)
    head_size = _head_size(fields, family, width, heads)

    biased = set(family.biased)
    for switch, names in family.bias_switches.items():
        # A switch for attention and one for the MLP never differ in what their absence means.
        if fields.flag(switch, family.absent_bias):
            biased.update(names)
    qk_norm = fields.flag(family.qk_norm) if isinstance(family.qk_norm, str) else family.qk_norm
    parallel = family.parallel_block
    parallel = fields.flag(parallel, absent=True) if isinstance(parallel, str) else parallel
    tied_head = fields.flag("tie_word_embeddings", family.absent_tied)

    rope_free_layers = read_rope_free_layers(fields, family, layers)
    windows = read_windows(fields, family, layers, context, rope_free_layers)
    rotary = None if family.learned_positions else read_rotary(fields, family)
    rotary_width = int(head_size * rotary.factor) if rotary else 0
    if rotary and head_size:
        if rotary_width < 2 or rotary_width % 2:
            fields.refuse("head_dim", f"rotary embedding needs an even number of dimensions; it gets {rotary_width}.")
        check_long_factors(fields, rotary.kind, rotary_width)
    two_rotaries = rotary is not None and rotary.local_theta is not None
    kinds_of_layers = (windows.named > 0) + (windows.named < layers) if two_rotaries else 1

    activation = fields.text("hidden_act", absent=family.absent_activation)
    if activation and activation not in ACTIVATIONS:
        fields.refuse("hidden_act", f"unknown activation {activation!r}.", did_you_mean(activation, ACTIVATIONS))
    residual = fields.rate(family.residual_dropout, family.absent_dropout)
    embedding = fields.rate(family.embedding_dropout, family.absent_dropout)
    attention = fields.rate("attention_dropout", family.absent_dropout)
    attention_softcap = fields.positive(*family.attention_softcap) if family.attention_softcap else None
    final_softcap = fields.positive(*family.final_softcap) if family.final_softcap else None
    scales = ("embedding_multiplier", "residual_multiplier", "logits_scaling")
    scales_found = [fields.number(name) if family.multipliers else None for name in scales]
    embedding_scale, residual_multiplier, logits_divisor = scales_found
    for name in family.numbers:
        fields.number(name)
    for name in family.refused:
        if fields.value(name, None) not in (None, False):
            fields.refuse(
                name, f"is {shown(fields.value(name))}, and what that makes is no decoder of one kind of layer."
            )
    dtype = _dtype(fields)
    quantized = _quantized(fields)
    fields.refuse_misspelt()
    raise_all(fields.errors)

    # LayerNorm has a weight and a bias, RMSNorm a weight.
    vectors = 2 if family.norm == "layernorm" else 1
    # Phi norms its queries and keys over width / heads even where another head size is given.
    normed_head = width // heads if family.norm == "layernorm" else head_size
    qk_parameters = 2 * vectors * normed_head if qk_norm else 0
    return ModelShape(
        id=id,
        model_type=family.model_type,
        architecture=family.architecture,
        hub_id=hub_id,
        layers=layers,
        width=width,
        mlp_width=mlp_width,
        heads=heads,
        kv_heads=kv_heads,
        head_size=head_size,
        vocab=vocab,
        native_context=context,
        linears=_linears(family, biased, width, mlp_width, heads * head_size, kv_heads * head_size),
        conv1d=family.conv1d,
        fused_qkv=len(family.attention) == 2,
        fused_gate_up=family.fused_gate_up,
        gated_mlp=len(family.mlp) != 2 or family.fused_gate_up,
        experts=experts,
        experts_per_token=experts_per_token,
        expert_biases=family.expert_biases,
        clamped_experts=family.clamped_experts,
        wide_expert_weights=family.wide_expert_weights,
        parallel_block=parallel,
        tied_head=tied_head,
        head_bias=family.head_bias,
        qk_norm=qk_norm,
        norm=family.norm,
        norm_one_plus=family.norm_one_plus,
        norms_per_layer=family.norms_per_layer,
        output_norms_per_layer=family.output_norms,
        norm_parameters_per_layer=family.norms_per_layer * vectors * width + qk_parameters,
        final_norm_parameters=vectors * width,
        activation=activation,
        residual_dropout=residual,
        embedding_dropout=embedding,
        attention_dropout=attention,
        attention_softcap=attention_softcap,
        final_softcap=final_softcap,
        narrow_softmax=family.narrow_softmax,
        attention_sinks=family.attention_sinks,
        embedding_scale=width**0.5 if family.root_embedding else embedding_scale,
        residual_multiplier=residual_multiplier,
        logits_divisor=logits_divisor,
        sliding_window=windows.window,
        sliding_layers=windows.layers,
        learned_positions=family.learned_positions,
        rope_free_layers=rope_free_layers,
        rotary_tables=kinds_of_layers if rotary else 0,
        rotary_width=rotary_width,
        rotary_table_width=rotary_width // 2 if family.half_tables else rotary_width,
        rope_theta=rotary.theta if rotary else 0.0,
        rope_local_theta=rotary.local_theta if rotary else None,
        rope_type=rotary.kind if rotary else "none",
        config_dtype=dtype,
        quantized=quantized,
    )


def _family(config: Mapping[str, Any], where: str) -> Family:
    """The family, or why there is none. Remote code is refused here, before anything else is looked at."""
    known = f"Known model types: {known_model_types()}."
    model_type = config.get("model_type")
    if isinstance(model_type, str) and model_type in FAMILIES:
        return FAMILIES[model_type]
    if "model_type" not in config:
        name = "model_type is missing"
    else:
        name = f"unknown architecture {model_type!r}" if isinstance(model_type, str) else "model_type is no name"
    if config.get("auto_map"):
        raise PlanError(
            where,
            f"{name}; its weights need remote code (auto_map), and code out of a model repository is refused.",
            known,
        )
    missing = [size for size in SIZES if size not in config]
    if missing and isinstance(config.get("text_config"), dict):
        why = "its language model is nested in text_config, so it is part of a larger model."
    elif missing:
        why = f"the usual fields {', '.join(missing)} are missing."
    else:
        why = "it has the usual sizes, but which linears have biases and which norms a layer has is not in the file."
    raise PlanError(where, f"{name}: {why}", known)


def _check_architecture(fields: Fields, family: Family) -> None:
    """``architectures`` has to name the class that the family is built as, whatever code a repository brings."""
    named = fields.config.get("architectures")
    if named is None or named == []:
        return
    if not isinstance(named, list) or not all(isinstance(name, str) for name in named):
        fields.refuse("architectures", f"is {shown(named)}, not a list of class names.")
    elif family.architecture.lower() not in [name.lower() for name in named]:
        code = " and auto_map brings code for it, which is refused" if fields.config.get("auto_map") else ""
        fields.refuse(
            "architectures",
            f"names {', '.join(named)}{code}; model type {family.model_type} is trained as {family.architecture}.",
        )


def _mlp_width(fields: Fields, family: Family, width: int) -> int:
    """Width of the MLP, or of one expert."""
    usual = family.absent_mlp_ratio and max(1, family.absent_mlp_ratio * width)
    return fields.whole("intermediate_size" if family.mlp else family.expert_width, absent=usual, null=usual)


def _experts(fields: Fields, family: Family, layers: int) -> tuple[int, int]:
    """Experts of a layer and how many of them a token takes; 0 and 0 where the MLP is a plain one."""
    if family.mlp:
        return 0, 0
    experts = fields.whole("num_local_experts", most=MOST_EXPERTS)
    per_token = fields.whole("num_experts_per_tok", most=MOST_EXPERTS)
    if experts and per_token > experts:
        fields.refuse("num_experts_per_tok", f"is {per_token}, and there are {experts} experts.")
    if family.expert_width != "intermediate_size":  # a family that can have plain layers in between
        plain = "makes some layers plain; only models are known whose every layer has experts."
        if fields.whole("decoder_sparse_step", absent=1) > 1:
            fields.refuse("decoder_sparse_step", plain)
        if fields.choices("mlp_only_layers", range(max(1, layers)), f"layers from 0 to {layers - 1}"):
            fields.refuse("mlp_only_layers", plain)
    return experts, per_token


def _kv_heads(fields: Fields, family: Family, heads: int) -> int:
    if not family.grouped_heads:
        return heads
    kv_heads = fields.whole(
        "num_key_value_heads",
        absent=family.absent_kv_heads or heads or 1,
        null=(heads or 1) if family.null_kv_heads else None,
    )
    if heads and kv_heads and heads % kv_heads:
        fields.refuse("num_key_value_heads", f"{kv_heads} does not divide the {heads} query heads.")
    return kv_heads


def _head_size(fields: Fields, family: Family, width: int, heads: int) -> int:
    given = fields.value("head_dim")
    from_width = family.absent_head_size is None if given is ABSENT else given is None and family.null_head_size
    from_width = from_width or family.fixed_head_size
    if width and heads and width % heads and (from_width or family.always_divides):
        fields.refuse("hidden_size", f"{width} is not a multiple of the {heads} query heads.")
        return 0
    if not from_width:
        return fields.whole("head_dim", absent=family.absent_head_size)
    size = width // heads if heads else 0
    if family.fixed_head_size and given is not ABSENT and given not in (None, size):
        fields.refuse("head_dim", f"is {shown(given)}, but {family.model_type} always has width / heads, {size}.")
    return size


def _dtype(fields: Fields) -> str | None:
    """``dtype`` (transformers 5) before ``torch_dtype`` (before that); None where neither says anything."""
    name = "torch_dtype" if fields.value("dtype", None) is None else "dtype"
    value = fields.value(name, None)
    if value is None:
        return None
    if not isinstance(value, str) or value not in DTYPES:
        fields.refuse(name, f"is {shown(value)}.", f"Known: {', '.join(sorted(DTYPES))}.")
        return None
    return value


def _quantized(fields: Fields) -> str | None:
    quantization = fields.value("quantization_config", None)
    if quantization is None:
        return None
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    if not isinstance(method, str) or not method:
        fields.refuse("quantization_config", "does not name its quant_method.")
        return None
    return method


def _linears(
    family: Family, biased: set[str], width: int, mlp_width: int, query_width: int, kv_width: int
) -> tuple[Linear, ...]:
    *inward, output = family.attention
    widths = [query_width, kv_width, kv_width] if len(inward) == 3 else [query_width + 2 * kv_width]
    attention = [
        *(
            Linear(name, width, outputs, name in biased, "attention")
            for name, outputs in zip(inward, widths, strict=True)
        ),
        Linear(output, query_width, width, output in biased, "attention"),
    ]
    if not family.mlp:
        return tuple(attention)
    *upward, down = family.mlp
    up_width = 2 * mlp_width if family.fused_gate_up else mlp_width
    return (
        *attention,
        *(Linear(name, width, up_width, name in biased, "mlp") for name in upward),
        Linear(down, mlp_width, width, down in biased, "mlp"),
    )
