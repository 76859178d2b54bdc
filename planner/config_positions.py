"""How a config.json tells positions apart: rotary embeddings, layers without one, and which layers see a window."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from planner.config_fields import Fields, is_number, shown
from planner.families import Family

ABSENT_FULL_LAYERS = 28  # max_window_layers: the layers below it see everything

# Kinds of rotary scaling, with what each cannot do without (config.json, rope_scaling or rope_parameters).
ROPE_NEEDS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "longrope": ("short_factor", "long_factor"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}

FULL, SLIDING = "full_attention", "sliding_attention"


@dataclass(frozen=True)
class Rotary:
    """Kind and base of the rotary embedding, the base for layers with a window, and the part of a head it turns."""

    kind: str
    theta: float
    local_theta: float | None
    factor: float


@dataclass(frozen=True)
class Windows:
    """The window, None where it is not shorter than the context, and how many layers have it.

    ``named`` counts the layers that are of the sliding kind, however long the window is.
    """

    window: int | None
    layers: int
    named: int


def read_rotary(fields: Fields, family: Family) -> Rotary:
    """The rotary embedding from ``rope_parameters`` or from the older fields.

    transformers lets ``rope_scaling`` win where both are there.
    """
    if family.absent_local_theta is not None:
        return _two_rotaries(fields, family, family.absent_local_theta)
    label = "rope_scaling" if fields.value("rope_scaling", None) else "rope_parameters"
    rope = fields.value(label, None)
    if rope is None:
        rope = {"rope_type": family.absent_rope} | dict.fromkeys(ROPE_NEEDS[family.absent_rope], 1)
    elif not isinstance(rope, dict):
        fields.refuse(label, f"is {shown(rope)}, not an object.")
        rope = {}
    elif rope and all(isinstance(value, dict) for value in rope.values()):
        fields.refuse(label, f"differs by kind of layer, which {family.model_type} cannot have.")
        rope = {}
    theta = _theta(fields, "rope_theta", rope, family.absent_theta)
    return Rotary(_kind(fields, family, label, rope), theta, None, _factor(fields, family, rope))


def _two_rotaries(fields: Fields, family: Family, absent_local_theta: float) -> Rotary:
    """One rotary embedding for layers that see everything, which alone is scaled, and one for those with a window."""
    scaling, kinds = fields.value("rope_scaling", None) or {}, fields.value("rope_parameters", None)
    for label, rope in (("rope_scaling", scaling), ("rope_parameters", kinds)):
        if rope is not None and not isinstance(rope, dict):
            fields.refuse(label, f"is {shown(rope)}, not an object.")
            scaling, kinds = {}, None
    by_kind = {kind: (kinds or {}).get(kind) or {} for kind in (FULL, SLIDING)}
    if kinds and not (kinds.keys() <= by_kind.keys() and all(isinstance(each, dict) for each in by_kind.values())):
        fields.refuse("rope_parameters", f"has to hold an object for {FULL} and one for {SLIDING}, nothing else.")
        by_kind = {FULL: {}, SLIDING: {}}
    full = (by_kind[FULL] if kinds else {"rope_type": "default"}) | scaling
    label = "rope_scaling" if scaling else "rope_parameters"
    _kind(fields, family, "rope_parameters", by_kind[SLIDING])
    return Rotary(
        _kind(fields, family, label, full),
        _theta(fields, "rope_theta", full, family.absent_theta),
        _theta(fields, "rope_local_base_freq", by_kind[SLIDING], absent_local_theta),
        _factor(fields, family, full),
    )


def _kind(fields: Fields, family: Family, label: str, rope: Mapping[str, Any]) -> str:
    kind = rope.get("rope_type", rope.get("type", "default"))
    kind = family.rope_aliases.get(kind, kind) if isinstance(kind, str) else kind
    takes = family.rope_kinds or tuple(ROPE_NEEDS)
    if not isinstance(kind, str) or kind not in takes:
        fields.refuse(label, f"has the unknown rope_type {shown(kind)}.", f"Known: {', '.join(takes)}.")
        return "default"
    lacking = [need for need in ROPE_NEEDS[kind] if need not in rope]
    if lacking:
        fields.refuse(label, f"of type {kind} lacks {', '.join(lacking)}.")
    return kind


def _theta(fields: Fields, name: str, rope: Mapping[str, Any], absent: float) -> float:
    theta = rope.get("rope_theta", fields.value(name, absent))
    if is_number(theta) and theta > 0:
        return float(theta)
    fields.refuse(name, f"is {shown(theta)}, not a positive number.")
    return absent


def _factor(fields: Fields, family: Family, rope: Mapping[str, Any]) -> float:
    name = "partial_rotary_factor"
    absent = 1.0 if family.absent_rotary_factor is None else family.absent_rotary_factor
    factor = rope.get(name, fields.value(name, absent))
    if not (is_number(factor) and 0 < factor <= 1):
        fields.refuse(name, f"is {shown(factor)}, not a number above 0 and up to 1.")
    elif family.absent_rotary_factor is None and factor != 1:
        fields.refuse(name, f"is {shown(factor)}, but {family.model_type} always turns whole heads.")
    else:
        return float(factor)
    return absent


def check_long_factors(fields: Fields, kind: str, rotary_width: int) -> None:
    """LongRoPE has a factor for each pair of dimensions that are turned, twice over."""
    label = "rope_scaling" if fields.value("rope_scaling", None) else "rope_parameters"
    rope = fields.value(label, None)
    if kind != "longrope" or not isinstance(rope, dict):
        return
    for name in ROPE_NEEDS["longrope"]:
        factors = rope.get(name, [1.0] * (rotary_width // 2))
        if not isinstance(factors, list) or not all(is_number(each) for each in factors):
            fields.refuse(label, f"has a {name} that is no list of numbers.")
        elif len(factors) != rotary_width // 2:
            fields.refuse(label, f"has {len(factors)} numbers in {name}, where {rotary_width // 2} are turned.")


def read_rope_free_layers(fields: Fields, family: Family, layers: int) -> int:
    """How many layers turn nothing."""
    if family.learned_positions:
        return layers
    if family.rope_free_interval is None:
        return 0
    turned = fields.choices("no_rope_layers", (0, 1), "0 (no rotary embedding) and 1")
    if turned is None:
        return layers // (fields.whole("no_rope_layer_interval", absent=family.rope_free_interval) or layers or 1)
    if len(turned) < layers:
        fields.refuse("no_rope_layers", f"names {len(turned)} layers, {fields.called('num_hidden_layers')} {layers}.")
    return turned[:layers].count(0)


def read_windows(fields: Fields, family: Family, layers: int, context: int, rope_free: int) -> Windows:
    """Which layers see only a window of keys; no layer where the window is not shorter than the context."""
    none = Windows(None, 0, 0)
    kinds = fields.choices("layer_types", (FULL, SLIDING), f"{FULL} and {SLIDING}")
    if kinds is not None and layers and len(kinds) != layers:
        fields.refuse("layer_types", f"names {len(kinds)} layers, {fields.called('num_hidden_layers')} says {layers}.")
    if family.window == "no layer":
        if kinds and SLIDING in kinds:
            fields.refuse("layer_types", f"has {SLIDING}, which {family.model_type} does not have.")
        return none
    if family.window_switch and not fields.flag("use_sliding_window"):
        return none
    if family.window == "every layer":
        named = layers
    elif kinds is not None:
        named = kinds.count(SLIDING)
    elif family.window == "rope-free layers":
        named = rope_free
    elif family.window == "by pattern":
        named = layers - layers // _pattern(fields, family, layers)
    else:
        named = max(0, layers - fields.whole("max_window_layers", absent=ABSENT_FULL_LAYERS, least=0))
    if fields.value("sliding_window", family.absent_window) is None:
        if named and family.window == "by pattern":
            fields.refuse("sliding_window", f"is null, but {named} layers are of the kind {SLIDING}.")
        return none
    window = fields.whole("sliding_window", absent=family.absent_window)
    return Windows(window, named, named) if named and window < context else Windows(None, 0, named)


def _pattern(fields: Fields, family: Family, layers: int) -> int:
    if family.absent_local_theta is None:
        return family.window_pattern  # Gemma 3 alone looks at the field
    return fields.whole("sliding_window_pattern", absent=family.window_pattern) or layers or 1
