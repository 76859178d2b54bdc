"""Shapes against the models that transformers builds from the same config.json, and adapters against PEFT's.

Everything is built on torch's meta device: no weights, no download, so the whole depth of an 8B model is cheap.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from planner.families import ACTIVATIONS, FAMILIES, ROPE_NEEDS
from planner.model import ModelShape, list_models, load_model
from planner.model_config import read_shape

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

SHIPPED = [facts.id for facts in list_models()]
MODELS = Path(__file__).parents[1] / "planner" / "models"


def published(id: str) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((MODELS / id / "config.json").read_text("utf-8"))
    return config


def build(config: dict[str, Any]) -> Any:
    """The model as a trainer gets it: from config.json, without weights and without remote code."""
    named = transformers.AutoConfig.for_model(**config)
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(named, trust_remote_code=False)


def agree(shape: ModelShape, model: Any) -> None:
    """Every number of ``shape`` that the built model can be asked for."""
    assert type(model).__name__ == shape.architecture
    assert model.num_parameters() == shape.parameters  # a tied head is one parameter, counted once
    layers = model.model.layers
    assert len(layers) == shape.layers
    for layer in layers:
        found = {
            name.split(".")[-1]: (
                module.in_features,
                module.out_features,
                module.bias is not None,
                name.split(".")[0],
            )
            for name, module in layer.named_modules()
            if isinstance(module, torch.nn.Linear)
        }
        parts = {"attention": "self_attn", "mlp": "mlp"}
        expected = {each.name: (each.inputs, each.outputs, each.bias, parts[each.part]) for each in shape.linears}
        assert found == expected

    names = dict(model.named_parameters())
    matrices = [name for name, value in names.items() if value.dim() == 2]
    small = sum(value.numel() for value in names.values() if value.dim() == 1)
    assert small == shape.small_parameters
    assert sum(names[name].numel() for name in matrices if ".layers." in name) == (
        shape.layers * shape.linear_parameters_per_layer
    )
    norms = [module for name, module in layers[0].named_modules() if "norm" in name.split(".")[-1]]
    assert sum(value.numel() for norm in norms for value in norm.parameters()) == shape.norm_parameters_per_layer
    wide = [norm for norm in norms if norm.weight.numel() == shape.width and not shape.qk_norm]
    assert shape.qk_norm or len(wide) == shape.norms_per_layer

    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    assert (head.weight is embedding.weight) == shape.tied_head
    assert (head.bias is not None) == shape.head_bias
    assert embedding.weight.numel() == shape.embedding_parameters

    config = model.config
    assert config.max_position_embeddings == shape.native_context
    assert config.hidden_act == shape.activation
    assert config.attention_dropout == shape.attention_dropout
    assert getattr(config, "resid_pdrop", 0.0) == shape.residual_dropout
    assert getattr(config, "embd_pdrop", 0.0) == shape.embedding_dropout
    assert 2 * model.model.rotary_emb.inv_freq.numel() == shape.rotary_width
    assert config.rope_parameters["rope_type"] == shape.rope_type
    assert config.rope_parameters["rope_theta"] == shape.rope_theta


@pytest.mark.parametrize("id", SHIPPED)
def test_shipped_models(id: str) -> None:
    agree(load_model(id), build(published(id)))


@pytest.mark.parametrize("id", SHIPPED)
@pytest.mark.parametrize("rank", [1, 2, 16])
def test_adapters(id: str, rank: int) -> None:
    # Two layers are enough: the count per layer is what could be wrong, and PEFT needs seconds for eighty.
    config = published(id) | {"num_hidden_layers": 2}
    shape = read_shape(config, "config.json", id)
    assert trainable(config, rank, [linear.name for linear in shape.linears]) == shape.adapter_parameters(rank)
    some = [shape.linears[0].name, shape.linears[-1].name]
    assert trainable(config, rank, some) == shape.adapter_parameters(rank, some)


def test_adapters_of_the_whole_phi_2() -> None:
    names = [linear.name for linear in load_model("phi-2").linears]
    assert trainable(published("phi-2"), 16, names) == load_model("phi-2").adapter_parameters(16) == 23_592_960


def trainable(config: dict[str, Any], rank: int, targets: list[str]) -> int:
    lora = peft.LoraConfig(r=rank, target_modules=targets, task_type="CAUSAL_LM")
    with torch.device("meta"):
        adapted = peft.get_peft_model(build(config), lora)
    return int(adapted.get_nb_trainable_parameters()[0])


@st.composite
def configs(draw: st.DrawFn) -> dict[str, Any]:
    """Small configs of every known family, with switches thrown and fields left out at random."""
    family = draw(st.sampled_from(sorted(FAMILIES)))
    kv_heads, group = draw(st.sampled_from([1, 2, 3])), draw(st.sampled_from([1, 2, 4]))
    heads = kv_heads * group
    config: dict[str, Any] = {
        "model_type": family,
        "hidden_size": heads * draw(st.sampled_from([4, 8, 20])),
        "intermediate_size": draw(st.integers(1, 40)),
        "num_hidden_layers": draw(st.integers(1, 3)),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": draw(st.integers(3, 50)),
    }
    optional: dict[str, st.SearchStrategy[Any]] = {
        "head_dim": st.sampled_from([4, 8, 12]),
        "max_position_embeddings": st.sampled_from([64, 8192]),
        "tie_word_embeddings": st.booleans(),
        "attention_bias": st.booleans(),
        "mlp_bias": st.booleans(),
        "hidden_act": st.sampled_from(["silu", "gelu_new", "relu2"]),
        "attention_dropout": st.sampled_from([0, 0.25]),
        "rope_theta": st.sampled_from([100, 5e5]),
        "torch_dtype": st.sampled_from(["float16", "bfloat16", None]),
        "dtype": st.sampled_from(["float32", None]),
    }
    if family == "phi":
        # Phi norms queries over width / heads, which runs only where that is the size of a head.
        del optional["head_dim"]
        optional |= {"qk_layernorm": st.booleans(), "partial_rotary_factor": st.sampled_from([0.5, 1.0])}
        optional |= {"resid_pdrop": st.sampled_from([0.0, 0.1]), "embd_pdrop": st.sampled_from([0.0, 0.1])}
    for name, values in optional.items():
        if draw(st.booleans()):
            config[name] = draw(values)
    if family == "llama" and draw(st.booleans()):
        del config["num_key_value_heads"]
    if draw(st.booleans()):
        scaling = {"rope_type": "linear", "factor": 2.0, "rope_theta": 300.0}
        config[draw(st.sampled_from(["rope_scaling", "rope_parameters"]))] = scaling
    return config


@given(config=configs())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_random_small_models(config: dict[str, Any]) -> None:
    agree(read_shape(config, "config.json", "tiny"), build(dict(config)))


@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3"])
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
    ],
)
def test_windows(family: str, change: dict[str, Any]) -> None:
    config = {
        "model_type": family, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 3,
        "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 10,
    } | change  # fmt: skip
    shape, model = read_shape(config, "config.json", "tiny"), build(dict(config))
    if family == "mistral":
        windows = [model.config.sliding_window] * model.config.num_hidden_layers
    else:
        windows = [layer.self_attn.sliding_window for layer in model.model.layers]
    sliding = [window for window in windows if window is not None]
    assert shape.sliding_layers == len(sliding)
    assert shape.sliding_window == (sliding[0] if sliding else None)


def test_names_that_transformers_knows() -> None:
    from transformers.activations import ACT2FN
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    assert set(ACT2FN) >= ACTIVATIONS
    assert set(ROPE_INIT_FUNCTIONS) >= set(ROPE_NEEDS) - {"default"}
    for model_type, family in FAMILIES.items():
        defaults = transformers.AutoConfig.for_model(model_type)
        assert defaults.max_position_embeddings == family.absent_context
        assert defaults.hidden_act == family.absent_activation
        assert defaults.tie_word_embeddings is False
