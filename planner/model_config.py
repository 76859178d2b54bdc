"""From the text of a config.json to a ModelShape, with everything that is wrong with it said at once."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from planner.errors import PlanError, did_you_mean, raise_all
from planner.families import (
    ABSENT_FULL_LAYERS,
    ABSENT_ROPE_THETA,
    ABSENT_WINDOW,
    ACTIVATIONS,
    DTYPES,
    FAMILIES,
    ROPE_NEEDS,
    SIZES,
    Family,
    known_model_types,
)
from planner.model_shape import Linear, ModelShape

LARGEST_SIZE = 2**31
MOST_LAYERS = 1000
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
    except (RecursionError, ValueError) as error:  # nested too deep; an integer of thousands of digits
        raise PlanError(where, f"is not a config.json: {error}.") from error
    if not isinstance(config, dict):
        raise PlanError(where, f"holds {_kind(config)}, where a config.json holds an object.")
    return config


def read_shape(config: Mapping[str, Any], where: str, id: str, hub_id: str | None = None) -> ModelShape:
    """The shape that transformers would build from ``config``. ``where`` names the file in messages.

    Raises:
        PlanError: an unknown family, remote code, or fields missing or absurd (all of them in one error).
    """
    family = _family(config, where)
    fields = _Fields(config, where)
    _check_architecture(fields, family)

    width, mlp_width, layers, heads, vocab = (
        fields.whole(name, most=MOST_LAYERS if name == "num_hidden_layers" else LARGEST_SIZE) for name in SIZES
    )
    context = fields.whole("max_position_embeddings", absent=family.absent_context)
    kv_heads = fields.whole(
        "num_key_value_heads",
        absent=family.absent_kv_heads or heads or 1,
        null=(heads or 1) if family.null_kv_heads else None,
    )
    if heads and kv_heads and heads % kv_heads:
        fields.refuse("num_key_value_heads", f"{kv_heads} does not divide the {heads} query heads.")
    head_size = _head_size(fields, family, width, heads)

    biased = set(family.biased)
    for switch, names in family.bias_switches.items():
        if fields.flag(switch):
            biased.update(names)
    qk_norm = fields.flag(family.qk_norm) if isinstance(family.qk_norm, str) else family.qk_norm
    tied_head = fields.flag("tie_word_embeddings")

    rope_type, rope_theta, factor = _rope(fields, family)
    rotary_width = int(head_size * factor)
    if head_size and (rotary_width < 2 or rotary_width % 2):
        fields.refuse("head_dim", f"rotary embedding needs an even number of dimensions; it gets {rotary_width}.")
    window, sliding_layers = _window(fields, family, layers, context)

    activation = fields.text("hidden_act", absent=family.absent_activation)
    if activation and activation not in ACTIVATIONS:
        fields.refuse("hidden_act", f"unknown activation {activation!r}.", did_you_mean(activation, ACTIVATIONS))
    residual = fields.rate(family.residual_dropout)
    embedding = fields.rate(family.embedding_dropout)
    attention = fields.rate("attention_dropout")
    dtype = _dtype(fields)
    quantized = _quantized(fields)
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
        gated_mlp=len(family.mlp) == 3,
        parallel_block=family.parallel_block,
        tied_head=tied_head,
        head_bias=family.head_bias,
        qk_norm=qk_norm,
        norm=family.norm,
        norms_per_layer=family.norms_per_layer,
        norm_parameters_per_layer=family.norms_per_layer * vectors * width + qk_parameters,
        final_norm_parameters=vectors * width,
        activation=activation,
        residual_dropout=residual,
        embedding_dropout=embedding,
        attention_dropout=attention,
        sliding_window=window,
        sliding_layers=sliding_layers,
        rotary_width=rotary_width,
        rope_theta=rope_theta,
        rope_type=rope_type,
        config_dtype=dtype,
        quantized=quantized,
    )


_ABSENT = object()  # tells a field that is not there from one that is null


class _Fields:
    """Reads fields one by one and keeps every complaint, so that one look at a file finds all that is wrong.

    A reader that complains gives 0, "" or False, which no later check takes for a mistake of its own.
    """

    def __init__(self, config: Mapping[str, Any], where: str) -> None:
        self.config, self.where = config, where
        self.errors: list[PlanError] = []

    def refuse(self, name: str, why: str, nearest: str = "") -> None:
        self.errors.append(PlanError(f"{self.where}: {name}", why, nearest))

    def whole(
        self,
        name: str,
        absent: int | None = None,
        null: int | None = None,
        least: int = 1,
        most: int = LARGEST_SIZE,
    ) -> int:
        """A whole number from ``least`` to ``most``; ``absent`` and ``null`` stand in where they are given."""
        value = self.config.get(name, _ABSENT)
        if value is _ABSENT and absent is not None:
            return absent
        if value is None and null is not None:
            return null
        if value is _ABSENT:
            self.refuse(name, "is missing.")
        elif isinstance(value, bool) or not isinstance(value, int):
            self.refuse(name, f"is {_shown(value)}, not a whole number.")
        elif not least <= value <= most:
            self.refuse(name, f"is {_shown(value)}, outside {least} to {most}.")
        else:
            return value
        return 0

    def flag(self, name: str) -> bool:
        """true or false; false if absent."""
        value = self.config.get(name, False)
        if not isinstance(value, bool):
            self.refuse(name, f"is {_shown(value)}, neither true nor false.")
            return False
        return value

    def rate(self, name: str | None) -> float:
        """A dropout rate, from 0 to below 1; 0 if absent or if the family has no such dropout (None)."""
        value = 0.0 if name is None else self.config.get(name, 0.0)
        if name is not None and not (_is_number(value) and 0 <= value < 1):
            self.refuse(name, f"is {_shown(value)}, not a rate from 0 to below 1.")
            return 0.0
        return float(value)

    def text(self, name: str, absent: str) -> str:
        value = self.config.get(name, absent)
        if not isinstance(value, str) or not value:
            self.refuse(name, f"is {_shown(value)}, not a name.")
            return ""
        return value


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


def _check_architecture(fields: _Fields, family: Family) -> None:
    """``architectures`` has to name the class that the family is built as, whatever code a repository brings."""
    named = fields.config.get("architectures")
    if named is None or named == []:
        return
    if not isinstance(named, list) or not all(isinstance(name, str) for name in named):
        fields.refuse("architectures", f"is {_shown(named)}, not a list of class names.")
    elif family.architecture.lower() not in [name.lower() for name in named]:
        code = " and auto_map brings code for it, which is refused" if fields.config.get("auto_map") else ""
        fields.refuse(
            "architectures",
            f"names {', '.join(named)}{code}; model type {family.model_type} is trained as {family.architecture}.",
        )


def _head_size(fields: _Fields, family: Family, width: int, heads: int) -> int:
    given = fields.config.get("head_dim", _ABSENT)
    from_width = family.absent_head_size is None if given is _ABSENT else given is None and family.null_head_size
    if width and heads and width % heads and (from_width or family.always_divides):
        fields.refuse("hidden_size", f"{width} is not a multiple of the {heads} query heads.")
        return 0
    if from_width:
        return width // heads if heads else 0
    return fields.whole("head_dim", absent=family.absent_head_size)


def _rope(fields: _Fields, family: Family) -> tuple[str, float, float]:
    """Kind, base and turned part of the rotary embedding, from ``rope_parameters`` or from the older fields.

    transformers lets ``rope_scaling`` win where both are there.
    """
    label = "rope_scaling" if fields.config.get("rope_scaling") else "rope_parameters"
    rope = fields.config.get(label) or {}
    if not isinstance(rope, dict):
        fields.refuse(label, f"is {_shown(rope)}, not an object.")
        rope = {}
    elif rope and all(isinstance(value, dict) for value in rope.values()):
        fields.refuse(label, f"differs by kind of layer, which {family.model_type} cannot have.")
        rope = {}

    kind = rope.get("rope_type", rope.get("type", "default"))
    if not isinstance(kind, str) or kind not in ROPE_NEEDS:
        known = f"Known: {', '.join(ROPE_NEEDS)}."
        fields.refuse(label, f"has the unknown rope_type {_shown(kind)}.", known)
        kind = "default"
    lacking = [need for need in ROPE_NEEDS[kind] if need not in rope]
    if lacking:
        fields.refuse(label, f"of type {kind} lacks {', '.join(lacking)}.")

    theta = rope.get("rope_theta", fields.config.get("rope_theta", ABSENT_ROPE_THETA))
    if not (_is_number(theta) and theta > 0):
        fields.refuse("rope_theta", f"is {_shown(theta)}, not a positive number.")
        theta = ABSENT_ROPE_THETA

    name = "partial_rotary_factor"
    whole_heads = family.absent_rotary_factor is None
    absent = 1.0 if family.absent_rotary_factor is None else family.absent_rotary_factor
    factor = rope.get(name, fields.config.get(name, absent))
    if not (_is_number(factor) and 0 < factor <= 1):
        fields.refuse(name, f"is {_shown(factor)}, not a number above 0 and up to 1.")
        factor = absent
    elif whole_heads and factor != 1:
        fields.refuse(name, f"is {_shown(factor)}, but {family.model_type} always turns whole heads.")
        factor = absent
    return kind, float(theta), float(factor)


def _window(fields: _Fields, family: Family, layers: int, context: int) -> tuple[int | None, int]:
    """Sliding window and how many layers have it; (None, 0) where no window is shorter than the context."""
    kinds = fields.config.get("layer_types")
    if kinds is not None and not (
        isinstance(kinds, list) and all(kind in ("full_attention", "sliding_attention") for kind in kinds)
    ):
        fields.refuse("layer_types", "may hold full_attention and sliding_attention, nothing else.")
        kinds = None
    if kinds is not None and layers and len(kinds) != layers:
        fields.refuse("layer_types", f"names {len(kinds)} layers, num_hidden_layers says {layers}.")
    if family.window == "no layer":
        if kinds and "sliding_attention" in kinds:
            fields.refuse("layer_types", f"has sliding_attention, which {family.model_type} does not have.")
        return None, 0
    if family.window == "upper layers" and not fields.flag("use_sliding_window"):
        return None, 0
    if fields.config.get("sliding_window", ABSENT_WINDOW) is None:
        return None, 0
    window = fields.whole("sliding_window", absent=ABSENT_WINDOW)
    if family.window == "every layer":
        sliding = layers
    elif kinds is not None:
        sliding = kinds.count("sliding_attention")
    else:
        full = fields.whole("max_window_layers", absent=ABSENT_FULL_LAYERS, least=0)
        sliding = max(0, layers - full)
    return (window, sliding) if sliding and window < context else (None, 0)


def _dtype(fields: _Fields) -> str | None:
    """``dtype`` (transformers 5) before ``torch_dtype`` (before that); None where neither says anything."""
    name = "torch_dtype" if fields.config.get("dtype") is None else "dtype"
    value = fields.config.get(name)
    if value is None:
        return None
    if not isinstance(value, str) or value not in DTYPES:
        fields.refuse(name, f"is {_shown(value)}.", f"Known: {', '.join(sorted(DTYPES))}.")
        return None
    return value


def _quantized(fields: _Fields) -> str | None:
    quantization = fields.config.get("quantization_config")
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
    query, key, value, output = family.attention
    *upward, down = family.mlp
    return (
        Linear(query, width, query_width, query in biased, "attention"),
        Linear(key, width, kv_width, key in biased, "attention"),
        Linear(value, width, kv_width, value in biased, "attention"),
        Linear(output, query_width, width, output in biased, "attention"),
        *(Linear(name, width, mlp_width, name in biased, "mlp") for name in upward),
        Linear(down, mlp_width, width, down in biased, "mlp"),
    )


def _is_number(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return math.isfinite(value) if isinstance(value, float) else abs(value) < 2**63


def _kind(value: object) -> str:
    names = {list: "a list", str: "a string", type(None): "null", bool: "true or false"}
    return names.get(type(value), "a number")


def _shown(value: object) -> str:
    """A value as JSON would write it, cut where it is long."""
    text = json.dumps(value, default=repr)
    return text if len(text) <= 60 else text[:57] + "..."
