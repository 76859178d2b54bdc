"""What each family leaves unsaid, against transformers: small models drawn at random, windows, scalings, defaults."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_model_against_transformers import agree, agree_on_positions, build

from planner.activations import ACTIVATIONS
from planner.config_positions import ROPE_NEEDS
from planner.families import FAMILIES, Family
from planner.model_config import read_shape

transformers = pytest.importorskip("transformers")


@st.composite
def configs(draw: st.DrawFn) -> dict[str, Any]:
    """Small configs of every known family, with switches thrown and fields left out at random."""
    name = draw(st.sampled_from(sorted(FAMILIES)))
    family = FAMILIES[name]
    kv_heads, group = draw(st.sampled_from([1, 2, 3])), draw(st.sampled_from([1, 2, 4]))
    heads, layers = kv_heads * group, draw(st.integers(1, 3))
    config: dict[str, Any] = {
        "model_type": name,
        "hidden_size": heads * draw(st.sampled_from([8, 16] if name == "gpt_neox" else [4, 8, 20])),
        "intermediate_size": draw(st.integers(1, 40)),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": draw(st.integers(3, 50)),
    }
    if not family.mlp:
        config |= {"num_local_experts": draw(st.integers(2, 4)), "num_experts_per_tok": draw(st.integers(1, 2))}
        config |= {family.expert_width: draw(st.integers(1, 30))}
    optional: dict[str, st.SearchStrategy[Any]] = {
        "head_dim": st.sampled_from([4, 8, 12]),
        "max_position_embeddings": st.sampled_from([64, 8192]),
        "tie_word_embeddings": st.booleans(),
        "attention_bias": st.booleans(),
        "mlp_bias": st.booleans(),
        "use_bias": st.booleans(),
        "hidden_act": st.sampled_from(["silu", "gelu_new", "relu2"]),
        "attention_dropout": st.sampled_from([0, 0.25]),
        "rope_theta": st.sampled_from([100, 5e5]),
        "torch_dtype": st.sampled_from(["float16", "bfloat16", None]),
        "dtype": st.sampled_from(["float32", None]),
        "sliding_window": st.sampled_from([8, 100]),
        "use_sliding_window": st.booleans(),
    }
    # Phi norms queries over width / heads, which runs only where that is the size of a head.
    if name == "phi" or family.fixed_head_size:
        del optional["head_dim"]
    if name == "phi":
        optional |= {"qk_layernorm": st.booleans(), "partial_rotary_factor": st.sampled_from([0.5, 1.0])}
    if name in ("gemma2", "gemma3_text"):
        optional |= {"final_logit_softcapping": st.sampled_from([7.5, None])}
        optional |= {"attn_logit_softcapping": st.sampled_from([20.0, None])}
        optional |= {"sliding_window_pattern": st.integers(1, 4)}
    if name == "gemma3_text":
        optional |= {"rope_local_base_freq": st.sampled_from([200.0, 3e4])}
    if name == "granite":
        factors = ("embedding_multiplier", "residual_multiplier", "logits_scaling", "attention_multiplier")
        optional |= dict.fromkeys(factors, st.sampled_from([0.5, 12.0]))
    if name == "smollm3":
        turned = st.lists(st.sampled_from([0, 1]), min_size=layers, max_size=layers + 1)
        optional |= {"no_rope_layers": turned, "no_rope_layer_interval": st.integers(1, 4)}
    if name == "gpt_neox":
        optional |= {"use_parallel_residual": st.booleans(), "rotary_pct": st.sampled_from([0.5, 1.0])}
    if family.window in ("by pattern", "upper layers"):
        kinds = st.sampled_from(["full_attention", "sliding_attention"])
        if not family.window_switch:
            optional |= {"layer_types": st.lists(kinds, min_size=layers, max_size=layers)}
        optional |= {"max_window_layers": st.integers(0, 3)}
    for dropout in {family.residual_dropout, family.embedding_dropout} - {None}:
        optional |= {str(dropout): st.sampled_from([0.0, 0.125])}
    for field, values in optional.items():
        if draw(st.booleans()):
            config[field] = draw(values)
    if family.absent_kv_heads is None and draw(st.booleans()):
        del config["num_key_value_heads"]
    if name != "phi3" and draw(st.booleans()):
        scaling = {"rope_type": "linear", "factor": 2.0, "rope_theta": 300.0}
        if name != "gemma3_text":
            config[draw(st.sampled_from(["rope_scaling", "rope_parameters"]))] = scaling
        elif draw(st.booleans()):
            config["rope_scaling"] = scaling
        else:
            kept = draw(st.sampled_from([{"rope_theta": 50.0}, {"rope_type": "default"}]))
            config["rope_parameters"] = {"full_attention": scaling, "sliding_attention": kept}
    return {family.names.get(field, (field,))[0]: value for field, value in config.items()}


@given(config=configs())
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_random_small_models(config: dict[str, Any]) -> None:
    agree(read_shape(config, "config.json", "tiny"), build(copy.deepcopy(config)))


SMALL = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2,
    "num_key_value_heads": 1, "vocab_size": 10,
}  # fmt: skip
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
EVERY_LAYER = [name for name, family in FAMILIES.items() if family.window == "every layer" and not family.window_switch]


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "qwen3_moe", "smollm3", *EVERY_LAYER])
@pytest.mark.parametrize(
    "change",
    [
        {},
        {"sliding_window": None},
        {"sliding_window": 8},
        {"sliding_window": 8, "use_sliding_window": True},
        {"use_sliding_window": True, "num_hidden_layers": 30},
        {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 1},
        {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 0},
        {"sliding_window": 8, "use_sliding_window": True, "num_hidden_layers": 9},
    ],
)
def test_windows(family: str, change: dict[str, Any]) -> None:
    experts = {} if FAMILIES[family].mlp else EXPERTS
    config = {"model_type": family, **SMALL, **experts, **change}
    agree_on_positions(read_shape(config, "config.json", "tiny"), build(dict(config)))


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text", "gpt_oss"])
@pytest.mark.parametrize(
    "change",
    [
        {},
        {"sliding_window": 8},
        {"sliding_window": 8, "num_hidden_layers": 13},
        {"sliding_window": 8, "layer_types": ["full_attention", "sliding_attention", "full_attention"]},
        {"sliding_window": 8, "layer_types": ["sliding_attention"] * 3},
        {"layer_types": ["full_attention"] * 3},
        {"sliding_window": 100, "max_position_embeddings": 100},
    ],
)
def test_alternating_layers(family: str, change: dict[str, Any]) -> None:
    experts = {} if FAMILIES[family].mlp else EXPERTS
    config = {"model_type": family, "head_dim": 8, **SMALL, **experts, **change}
    agree_on_positions(read_shape(config, "config.json", "tiny"), build(copy.deepcopy(config)))


@pytest.mark.parametrize("kind", ["longrope", "su", "yarn"])
def test_long_factors(kind: str) -> None:
    config = {"model_type": "phi3", **SMALL, "pad_token_id": 0, "partial_rotary_factor": 0.5}
    config["rope_scaling"] = {"type": kind, "short_factor": [1.0, 1.5], "long_factor": [2, 3]}
    shape = read_shape(config, "config.json", "tiny")
    assert (shape.rope_type, shape.rotary_width) == ("longrope", 4)
    if kind == "longrope":  # the two others are older names, which the class takes after building refuses them
        agree_on_positions(shape, build(copy.deepcopy(config)))


def test_what_the_classes_leave_to_a_default() -> None:
    from transformers.activations import ACT2FN
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    assert set(ACT2FN) >= set(ACTIVATIONS)
    assert set(ROPE_INIT_FUNCTIONS) >= set(ROPE_NEEDS) - {"default"}


@pytest.mark.parametrize("family", FAMILIES.values(), ids=list(FAMILIES))
def test_defaults(family: Family) -> None:
    defaults = transformers.AutoConfig.for_model(family.model_type)

    def default(name: str) -> Any:
        return getattr(defaults, family.names.get(name, (name,))[0], None)

    assert default("max_position_embeddings") == family.absent_context
    assert default("hidden_act") == family.absent_activation
    assert defaults.tie_word_embeddings is family.absent_tied
    heads = default("num_key_value_heads")
    assert heads == (family.absent_kv_heads or (default("num_attention_heads") if family.grouped_heads else None))
    if family.absent_head_size is not None:
        assert defaults.head_dim == family.absent_head_size
    for switch in family.bias_switches:
        assert getattr(defaults, switch) is family.absent_bias
    if family.window == "every layer" and family.window_switch:
        assert defaults.sliding_window is None and defaults.use_sliding_window is False
    elif family.window != "no layer" and not family.window_switch:
        assert defaults.sliding_window == family.absent_window
    for name in (family.residual_dropout, family.embedding_dropout):
        assert name is None or getattr(defaults, name) == family.absent_dropout
    assert default("attention_dropout") == family.absent_dropout
    for cap in (family.attention_softcap, family.final_softcap):
        assert cap is None or getattr(defaults, cap[0]) == cap[1]
    for name in family.numbers:
        assert getattr(defaults, name) > 0
    if not family.learned_positions:
        rope = defaults.rope_parameters
        if family.absent_local_theta is not None:
            assert rope["sliding_attention"]["rope_theta"] == family.absent_local_theta
            rope = rope["full_attention"]
        assert (rope["rope_type"], rope["rope_theta"]) == (family.absent_rope, family.absent_theta)
        assert rope.get("partial_rotary_factor") == family.absent_rotary_factor
