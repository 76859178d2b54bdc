"""Shapes against the models that transformers builds from the same config.json, and adapters against PEFT's.

Everything is built on torch's meta device: no weights, no download, so the whole depth of an 8B model is cheap.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from planner.families import FAMILIES
from planner.model import ModelShape, list_models, load_model
from planner.model_config import read_shape

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from transformers.pytorch_utils import Conv1D  # noqa: E402

ATTENTION = ("self_attn", "attention", "attn")  # what families call the attention of a layer
CONV1D_IS_NO_NEWS = pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False")
SHIPPED = [facts.id for facts in list_models()]
MODELS = Path(__file__).parents[1] / "planner" / "models"


def published(id: str) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((MODELS / id / "config.json").read_text("utf-8"))
    return config


def build(config: dict[str, Any]) -> Any:
    """The model as a trainer gets it: from config.json, without weights and without remote code."""
    named = transformers.AutoConfig.for_model(
        **{"pad_token_id": 0} | config
    )  # the usual one may be past a small vocabulary
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(named, trust_remote_code=False)


def layers_of(model: Any) -> list[Any]:
    decoder = model.get_decoder()
    return list(decoder.h if hasattr(decoder, "h") else decoder.layers)


def attention_of(layer: Any) -> Any:
    return next(getattr(layer, name) for name in ATTENTION if hasattr(layer, name))


def agree(shape: ModelShape, model: Any) -> None:
    """Every number of ``shape`` that the built model can be asked for."""
    assert type(model).__name__ == shape.architecture
    assert model.num_parameters() == shape.parameters  # a tied head is one parameter, counted once
    assert len(layers_of(model)) == shape.layers
    agree_on_linears(shape, model)
    agree_on_the_rest(shape, model)
    agree_on_norms(shape, model)
    agree_on_positions(shape, model)
    agree_on_steps(shape, model)


def agree_on_linears(shape: ModelShape, model: Any) -> None:
    expected = sorted((each.name, each.inputs, each.outputs, each.bias, each.part) for each in shape.linears)
    # The trainer adapts what is an nn.Linear; PEFT takes a Conv1D too if it is named.
    kind = Conv1D if shape.conv1d else torch.nn.Linear
    for layer in layers_of(model):
        found = []
        for path, module in layer.named_modules():
            if isinstance(module, Conv1D | torch.nn.Linear):
                assert type(module) is kind
                inputs, outputs = module.weight.shape if shape.conv1d else module.weight.shape[::-1]
                part = "attention" if path.split(".")[0] in ATTENTION else path.split(".")[0]
                found.append((path.split(".")[-1], inputs, outputs, module.bias is not None, part))
        assert sorted(found) == expected
    names = {each.name for each in shape.linears}
    assert shape.fused_qkv == bool(names & {"qkv_proj", "query_key_value", "c_attn"})
    assert shape.fused_gate_up == ("gate_up_proj" in names)
    assert shape.gated_mlp == bool(names & {"gate_proj", "gate_up_proj"} or shape.experts)


def agree_on_the_rest(shape: ModelShape, model: Any) -> None:
    """What is no linear: experts and router, everything with one dimension, embeddings and head."""
    names = dict(model.named_parameters())
    inside = {name: value for name, value in names.items() if ".layers." in name or ".h." in name}
    experts = {name: value for name, value in inside.items() if ".experts." in name}
    routers = {name: value for name, value in inside.items() if name.endswith((".gate.weight", ".router.weight"))}
    others = [value for name, value in inside.items() if name not in experts | routers and value.dim() > 1]
    assert total(experts.values()) == shape.layers * shape.expert_parameters_per_layer
    assert total(routers.values()) == shape.layers * shape.router_parameters_per_layer
    assert total(others) == shape.layers * shape.linear_parameters_per_layer
    small = [value for name, value in names.items() if value.dim() == 1]
    assert total(small) == shape.small_parameters

    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    assert (head.weight is embedding.weight) == shape.tied_head
    assert (head.bias is not None) == shape.head_bias
    assert embedding.weight.numel() == shape.embedding_parameters
    rows = getattr(model.get_decoder(), "wpe", None)
    assert (rows is not None) == shape.learned_positions
    assert shape.position_embedding_parameters == (rows.weight.numel() if rows is not None else 0)

    config, mlp = model.config, layers_of(model)[0].mlp
    assert hasattr(mlp, "experts") == (shape.experts > 0)
    if shape.experts:
        assert mlp.experts.gate_up_proj.shape[0] == shape.experts
        assert config.num_experts_per_tok == shape.experts_per_token
        assert hasattr(mlp.experts, "down_proj_bias") == shape.expert_biases
        idle = shape.experts - shape.experts_per_token
        expert = shape.expert_parameters_per_layer // shape.experts
        assert shape.active_parameters == shape.parameters - shape.layers * idle * expert
    else:
        assert shape.active_parameters == shape.parameters


def total(tensors: Iterable[Any]) -> int:
    return sum(tensor.numel() for tensor in tensors)


def agree_on_norms(shape: ModelShape, model: Any) -> None:
    layer = layers_of(model)[0]
    norms = {path.split(".")[-1]: each for path, each in layer.named_modules() if "Norm" in type(each).__name__}
    assert sum(total(norm.parameters()) for norm in norms.values()) == shape.norm_parameters_per_layer
    of_heads = {name for name in norms if name.startswith(("q_", "k_"))}
    assert bool(of_heads) == shape.qk_norm
    assert len(norms) - len(of_heads) == shape.norms_per_layer
    # With post_feedforward_layernorm a layer also norms what attention gives; without it, post_attention_layernorm
    # is the norm before the MLP.
    assert shape.output_norms_per_layer == (2 if "post_feedforward_layernorm" in norms else 0)
    kinds = {type(norm).__name__ for norm in norms.values()}
    assert (kinds == {"LayerNorm"}) == (shape.norm == "layernorm")
    assert all(name.startswith("Gemma") for name in kinds) == shape.norm_one_plus


def agree_on_positions(shape: ModelShape, model: Any) -> None:
    config, layers = model.config, layers_of(model)
    assert config.max_position_embeddings == shape.native_context
    windows = [getattr(attention_of(layer), "sliding_window", None) for layer in layers]
    if shape.model_type in ("mistral", "mixtral", "phi3", "starcoder2"):  # attention asks the config
        windows = [config.sliding_window] * shape.layers
    shorter = [window for window in windows if window is not None and window < shape.native_context]
    assert (shape.sliding_layers, shape.sliding_window) == (len(shorter), shorter[0] if shorter else None)

    rotary = getattr(model.get_decoder(), "rotary_emb", None)
    turns = [rotary is not None and bool(getattr(attention_of(layer), "use_rope", True)) for layer in layers]
    assert shape.rope_free_layers == turns.count(False)
    if rotary is None:
        assert (shape.rotary_tables, shape.rotary_width, shape.rope_type) == (0, 0, "none")
        return
    frequencies = {name: each for name, each in rotary.named_buffers() if name.endswith("inv_freq")}
    in_use = [each for name, each in frequencies.items() if "original" not in name]
    assert len(in_use) == shape.rotary_tables and len(frequencies) == 2 * shape.rotary_tables
    assert {2 * each.numel() for each in in_use} == {shape.rotary_width}
    given = config.rope_parameters
    assert (shape.rope_local_theta is not None) == ("full_attention" in given)
    if shape.rope_local_theta is not None:
        assert given["sliding_attention"]["rope_theta"] == shape.rope_local_theta
        given = given["full_attention"]
    assert (given["rope_type"], given["rope_theta"]) == (shape.rope_type, shape.rope_theta)
    if shape.rope_type == "default":
        kind = [config.layer_types[0]] if shape.rope_local_theta is not None else []
        hidden, positions = torch.empty(1, 2, 4, device="meta"), torch.zeros(1, 2, dtype=torch.int64, device="meta")
        assert {each.shape[-1] for each in rotary(hidden, positions, *kind)} == {shape.rotary_table_width}


def agree_on_steps(shape: ModelShape, model: Any) -> None:
    """Activation, dropouts, caps and factors."""
    config, layer, decoder = model.config, layers_of(model)[0], model.get_decoder()
    family = FAMILIES[shape.model_type]
    assert getattr(config, family.names.get("hidden_act", ("hidden_act",))[0]) == shape.activation
    assert getattr(config, family.names.get("attention_dropout", ("attention_dropout",))[0]) == shape.attention_dropout
    for name, rate in (
        (family.residual_dropout, shape.residual_dropout),
        (family.embedding_dropout, shape.embedding_dropout),
    ):
        assert rate == (getattr(config, name) if name else 0.0)
    attention = attention_of(layer)
    cap = attention.attn_logit_softcapping if shape.model_type == "gemma2" else None
    assert shape.attention_softcap == cap
    assert shape.final_softcap == getattr(config, "final_logit_softcapping", None)
    assert shape.attention_sinks == hasattr(attention, "sinks")
    scale = getattr(model.get_input_embeddings(), "scalar_embed_scale", getattr(decoder, "embedding_multiplier", None))
    assert shape.embedding_scale == scale
    assert shape.residual_multiplier == getattr(layer, "residual_multiplier", None)
    assert shape.logits_divisor == getattr(config, "logits_scaling", None)
    assert shape.parallel_block == getattr(layer, "use_parallel_residual", shape.model_type == "phi")


@pytest.mark.parametrize("id", SHIPPED)
def test_shipped_models(id: str) -> None:
    agree(load_model(id), build(published(id)))


def two_layers(id: str) -> dict[str, Any]:
    """A shipped config cut down: the count per layer is what could be wrong, and PEFT needs seconds for eighty."""
    config = published(id)
    layers = "n_layer" if "n_layer" in config else "num_hidden_layers"
    return config | {layers: 2} | {name: config[name][:2] for name in ("layer_types",) if name in config}


@CONV1D_IS_NO_NEWS
@pytest.mark.parametrize("id", SHIPPED)
def test_adapters(id: str) -> None:
    config = two_layers(id)
    shape = read_shape(config, "config.json", id)
    names = sorted({linear.name for linear in shape.linears})
    assert trainable(config, 16, names) == shape.adapter_parameters(16)


@CONV1D_IS_NO_NEWS
@pytest.mark.parametrize("id", ["gpt2", "gpt-oss-20b", "phi-3.5-mini", "qwen2.5-0.5b"])
@pytest.mark.parametrize("rank", [1, 2])
def test_adapters_on_some_linears(id: str, rank: int) -> None:
    config = two_layers(id)
    shape = read_shape(config, "config.json", id)
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
