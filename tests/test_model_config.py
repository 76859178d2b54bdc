"""config.json to a shape: the defaults of each family, every mistake in a file, and what is refused as unknown."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.errors import PlanError, PlanErrors
from planner.families import FAMILIES
from planner.model import ModelShape, load_model
from planner.model_config import read_shape

WORDS = st.sampled_from(
    ["", "llama", "silu", "default", "linear", "rope_type", "factor", "rope_theta", "full_attention"]
)
LLAMA = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
    "max_position_embeddings": 512,
}

EXPERTS = {"num_local_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 24}


def shape_of(config: dict[str, Any]) -> ModelShape:
    return read_shape(config, "config.json", "tiny")


def folder_with(folder: Path, config: dict[str, Any] | str) -> Path:
    text = config if isinstance(config, str) else json.dumps(config)
    (folder / "config.json").write_text(text, encoding="utf-8")
    return folder


def refusal(config: dict[str, Any]) -> str:
    with pytest.raises(PlanError) as caught:
        shape_of(config)
    return str(caught.value)


class TestJson:
    def test_line_and_column(self, tmp_path: Path) -> None:
        folder_with(tmp_path, '{\n  "model_type": "llama",\n  "hidden_size" 64\n}')
        with pytest.raises(PlanError, match="line 3, column 17"):
            load_model(tmp_path)

    @pytest.mark.parametrize(
        ("text", "told"),
        [
            ("", "line 1, column 1"),
            ("[]", "holds a list"),
            ("null", "holds null"),
            ("[" * 100_000, r"not a config\.json: it is nested too deeply"),
            ('{"vocab_size": ' + "9" * 5000 + "}", r"not a config\.json: it holds a number of too many digits"),
            ('{"a": "' + "x" * (5 * 2**20) + '"}', "larger than any"),
        ],
    )
    def test_other_than_an_object(self, tmp_path: Path, text: str, told: str) -> None:
        with pytest.raises(PlanError, match=told):
            load_model(folder_with(tmp_path, text))

    def test_not_text(self, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_bytes(b"{\xff")
        with pytest.raises(PlanError, match=r"not UTF-8 text \(byte 1\)"):
            load_model(tmp_path)

    def test_a_byte_order_mark_is_no_mistake(self, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(LLAMA).encode())
        assert load_model(tmp_path).layers == 3


class TestFields:
    def test_all_mistakes_at_once_with_file_and_field(self, tmp_path: Path) -> None:
        bad = LLAMA | {"hidden_size": "64", "num_hidden_layers": True, "vocab_size": -5, "rope_theta": None}
        del bad["intermediate_size"]
        with pytest.raises(PlanErrors) as caught:
            load_model(folder_with(tmp_path, bad))
        lines = str(caught.value).splitlines()
        assert len(lines) == len(caught.value.errors) == 5
        for line, field in zip(
            sorted(lines),
            ["hidden_size", "intermediate_size", "num_hidden_layers", "rope_theta", "vocab_size"],
            strict=True,
        ):
            assert line.startswith(f"{tmp_path / 'config.json'}: {field}: ")

    @pytest.mark.parametrize(
        ("change", "told"),
        [
            ({"hidden_size": 64.0}, "64.0, not a whole number"),
            ({"hidden_size": 0}, "is 0, outside 1"),
            ({"vocab_size": 2**40}, "outside 1 to 2147483648"),
            ({"num_hidden_layers": 1001}, "outside 1 to 1000"),
            ({"num_attention_heads": 5}, "64 is not a multiple of the 5"),
            ({"num_attention_heads": 5, "head_dim": 8}, "64 is not a multiple of the 5"),
            ({"num_key_value_heads": 3}, "3 does not divide the 4"),
            ({"head_dim": 7}, "even number"),
            ({"tie_word_embeddings": 1}, "neither true nor false"),
            ({"attention_bias": "false"}, "neither true nor false"),
            ({"attention_dropout": 1}, "not a rate"),
            ({"attention_dropout": None}, "null, not a rate"),
            ({"hidden_act": "sillu"}, "Did you mean silu"),
            ({"hidden_act": ""}, "not a name"),
            ({"partial_rotary_factor": 0.5}, "llama always turns whole heads"),
            ({"rope_scaling": {"type": "su", "factor": 2}}, 'unknown rope_type "su"'),
            ({"rope_scaling": {"rope_type": "linear"}}, "lacks factor"),
            ({"rope_scaling": [2]}, "not an object"),
            ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "kind of layer"),
            ({"rope_theta": float("nan")}, "not a positive number"),
            ({"layer_types": ["full_attention"]}, "names 1 layers"),
            ({"layer_types": ["sliding_attention"] * 3}, "which llama does not have"),
            ({"layer_types": ["chunked_attention"] * 3}, "nothing else"),
            ({"torch_dtype": "torch.bfloat16"}, "Known: bfloat16"),
            ({"architectures": ["LlamaForSequenceClassification"]}, "trained as LlamaForCausalLM"),
            ({"architectures": "LlamaForCausalLM"}, "not a list"),
            ({"quantization_config": {}}, "quant_method"),
            ({"attention_dropuot": 0.1}, "attention_dropuot: is not a known field. Did you mean attention_dropout?"),
        ],
    )
    def test_refuses(self, change: dict[str, Any], told: str) -> None:
        assert told in refusal(LLAMA | change)

    @pytest.mark.parametrize(
        ("family", "change", "told"),
        [
            ("mixtral", {"num_local_experts": None}, "num_local_experts: is null"),
            ("mixtral", {"num_experts_per_tok": 9}, "is 9, and there are 8 experts"),
            ("mixtral", {"num_local_experts": "8GB"}, 'num_local_experts: is "8GB", not a whole number'),
            ("qwen3_moe", {"moe_intermediate_size": 0}, "moe_intermediate_size: is 0, outside"),
            ("qwen3_moe", {"decoder_sparse_step": 2}, "some layers plain"),
            ("qwen3_moe", {"mlp_only_layers": [1]}, "some layers plain"),
            ("qwen3_moe", {"mlp_only_layers": [3]}, "layers from 0 to 2, nothing else"),
            ("gemma2", {"attn_logit_softcapping": 0}, "attn_logit_softcapping: is 0, not a positive number"),
            ("gemma2", {"final_logit_softcapping": "30"}, "not a positive number"),
            ("gemma2", {"query_pre_attn_scalar": -1}, "query_pre_attn_scalar: is -1"),
            ("gemma2", {"hidden_activation": "gelu_tanh"}, "hidden_activation: unknown activation"),
            ("gemma2", {"sliding_window": None}, "is null, but 2 layers are of the kind sliding_attention"),
            ("gemma2", {"use_bidirectional_attention": True}, "no decoder of one kind"),
            ("gemma3_text", {"sliding_window_pattern": 0}, "sliding_window_pattern: is 0, outside"),
            ("gemma3_text", {"rope_local_base_freq": "1e4"}, "rope_local_base_freq: is"),
            ("gemma3_text", {"rope_parameters": {"rope_theta": 1e4}}, "an object for full_attention and one for"),
            ("gemma3_text", {"rope_parameters": {"full_attention": 3}}, "an object for full_attention and one for"),
            ("gemma3_text", {"rope_scaling": [8]}, "rope_scaling: is [8], not an object"),
            ("granite", {"residual_multiplier": None}, "residual_multiplier: is null, not a positive number"),
            ("granite", {"attention_multiplier": 0.0}, "attention_multiplier: is 0.0"),
            ("smollm3", {"no_rope_layers": [1, 0]}, "names 2 layers, num_hidden_layers 3"),
            ("smollm3", {"no_rope_layers": [1, 0, 2]}, "may hold 0 (no rotary embedding) and 1"),
            ("smollm3", {"no_rope_layer_interval": 0}, "no_rope_layer_interval: is 0, outside"),
            ("phi3", {"rope_scaling": {"type": "linear", "factor": 2}}, "Known: default, longrope"),
            (
                "phi3",
                {"rope_scaling": {"type": "longrope", "short_factor": [1] * 8, "long_factor": [1] * 7}},
                "has 7 numbers in long_factor, where 8 are turned",
            ),
            ("phi3", {"rope_scaling": {"type": "su", "short_factor": [1] * 8, "long_factor": 1}}, "no list of numbers"),
            ("gpt_neox", {"rotary_pct": 2}, "rotary_pct: is 2"),
            ("gpt_neox", {"rotary_emb_base": 0}, "rotary_emb_base: is 0"),
            ("gpt_neox", {"head_dim": 8}, "always has width / heads, 16"),
            ("gpt_neox", {"use_parallel_residual": "yes"}, "neither true nor false"),
            ("starcoder2", {"use_bias": 1}, "use_bias: is 1"),
            ("gpt2", {"add_cross_attention": True}, "no decoder of one kind"),
            ("gpt2", {"n_inner": "4x"}, 'n_inner: is "4x"'),
        ],
    )
    def test_refuses_in_other_families(self, family: str, change: dict[str, Any], told: str) -> None:
        assert told in refusal(LLAMA | EXPERTS | {"model_type": family, "rotary_pct": 0.5} | change)

    def test_all_mistakes_at_once_in_the_words_of_the_family(self) -> None:
        bad = {"model_type": "gpt2", "n_embd": "8GB", "n_layer": 0, "n_positions": 1.5, "attn_pdrop": 7}
        lines = refusal(bad).splitlines()
        told = ["attn_pdrop", "n_embd", "n_head", "n_layer", "n_positions", "vocab_size"]
        assert [line.split(": ")[1] for line in sorted(lines)] == told
        moe = {"model_type": "qwen3_moe", "hidden_size": 64, "num_experts": -1}
        assert {line.split(": ")[1] for line in refusal(moe).splitlines()} == {
            "num_attention_heads", "vocab_size", "num_hidden_layers", "moe_intermediate_size", "num_experts",
            "num_experts_per_tok",
        }  # fmt: skip

    @given(
        base=st.sampled_from(sorted(FAMILIES)),
        changes=st.dictionaries(
            st.sampled_from(
                [
                    *LLAMA, "head_dim", "rope_scaling", "rope_parameters", "rope_theta", "partial_rotary_factor",
                    "sliding_window", "use_sliding_window", "max_window_layers", "layer_types", "architectures",
                    "attention_bias", "mlp_bias", "tie_word_embeddings", "hidden_act", "attention_dropout",
                    "resid_pdrop", "embd_pdrop", "qk_layernorm", "dtype", "torch_dtype", "quantization_config",
                    "auto_map", "text_config", "num_local_experts", "num_experts", "num_experts_per_tok",
                    "moe_intermediate_size", "decoder_sparse_step", "mlp_only_layers", "no_rope_layers",
                    "no_rope_layer_interval", "sliding_window_pattern", "rope_local_base_freq", "hidden_activation",
                    "attn_logit_softcapping", "final_logit_softcapping", "query_pre_attn_scalar", "n_embd", "n_inner",
                    "n_positions", "embedding_multiplier", "residual_multiplier", "rotary_pct", "rotary_emb_base",
                    "use_parallel_residual", "use_bias", "hidden_dropout", "add_cross_attention",
                ]
            ),
            st.recursive(
                st.none() | st.booleans() | st.integers() | st.floats() | WORDS,
                lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=3),
                max_leaves=5,
            ),
            max_size=4,
        ),
    )  # fmt: skip
    @settings(max_examples=500)
    def test_whatever_is_in_the_file_the_answer_is_a_shape_or_a_reason(
        self, base: str, changes: dict[str, Any]
    ) -> None:
        try:
            shape = shape_of(LLAMA | EXPERTS | {"model_type": base} | changes)
        except PlanError as error:
            assert str(error).startswith("config.json")
        else:
            assert shape.parameters >= shape.active_parameters > 0 and shape.heads % shape.kv_heads == 0
            assert shape.sliding_layers <= shape.layers and shape.rope_free_layers <= shape.layers

    def test_key_value_heads_unsaid(self) -> None:
        silent = {name: value for name, value in LLAMA.items() if name != "num_key_value_heads"}
        assert shape_of(silent).kv_heads == 4
        assert shape_of(LLAMA | {"num_key_value_heads": None}).kv_heads == 4
        # The class of Mistral has 8 and that of Qwen2 has 32, whatever the query heads are.
        many = silent | {"num_attention_heads": 32, "model_type": "mistral"}
        assert shape_of(many).kv_heads == 8
        assert "8 does not divide the 4" in refusal(silent | {"model_type": "mistral"})
        assert "32 does not divide the 4" in refusal(silent | {"model_type": "qwen2"})
        assert "null, not a whole number" in refusal(many | {"num_key_value_heads": None})

    def test_head_size_unsaid(self) -> None:
        assert shape_of(LLAMA).head_size == 16
        assert shape_of(LLAMA | {"model_type": "qwen3"}).head_size == 128
        assert shape_of(LLAMA | {"head_dim": 10}).query_width == 40

    def test_biases(self) -> None:
        biased = shape_of(LLAMA | {"attention_bias": True, "mlp_bias": True})
        assert all(linear.bias for linear in biased.linears) and not biased.head_bias
        assert biased.bias_parameters_per_layer == 64 + 32 + 32 + 64 + 96 + 96 + 64
        # Qwen2 and Mistral do not look at the switch.
        assert shape_of(LLAMA | {"model_type": "mistral", "attention_bias": True}).bias_parameters_per_layer == 0
        assert shape_of(LLAMA | {"model_type": "qwen2", "attention_bias": True}).bias_parameters_per_layer == 128

    def test_rotary(self) -> None:
        phi = LLAMA | {"model_type": "phi"}
        assert shape_of(phi).rotary_width == 8
        assert shape_of(phi | {"partial_rotary_factor": 0.25}).rotary_width == 4
        new_style = {"rope_type": "default", "rope_theta": 5e5, "partial_rotary_factor": 0.75}
        shape = shape_of(phi | {"rope_parameters": new_style, "partial_rotary_factor": 0.25})
        assert (shape.rotary_width, shape.rope_theta) == (12, 5e5)
        old_style = shape_of(LLAMA | {"rope_theta": 7e4, "rope_scaling": {"type": "linear", "factor": 2.0}})
        assert (old_style.rope_type, old_style.rope_theta, old_style.rotary_width) == ("linear", 7e4, 16)

    def test_windows(self) -> None:
        mistral = LLAMA | {"model_type": "mistral", "max_position_embeddings": 8192}
        for change, expected in (
            ({}, (4096, 3)),
            ({"sliding_window": None}, (None, 0)),
            ({"sliding_window": 8192}, (None, 0)),
            ({"sliding_window": 1024}, (1024, 3)),
        ):
            shape = shape_of(mistral | change)
            assert (shape.sliding_window, shape.sliding_layers) == expected
        qwen = LLAMA | {"model_type": "qwen2", "sliding_window": 64, "max_window_layers": 1}
        for change, expected in (
            ({}, (None, 0)),
            ({"use_sliding_window": True}, (64, 2)),
            ({"use_sliding_window": True, "max_window_layers": 0}, (64, 3)),
            ({"use_sliding_window": True, "max_window_layers": 9}, (None, 0)),
            ({"use_sliding_window": True, "sliding_window": None}, (None, 0)),
            (
                {"use_sliding_window": True, "layer_types": ["sliding_attention", *["full_attention"] * 2]},
                (64, 1),
            ),
        ):
            shape = shape_of(qwen | change)
            assert (shape.sliding_window, shape.sliding_layers) == expected
        assert shape_of(LLAMA | {"sliding_window": 64}).sliding_window is None

    def test_quantised_checkpoint_and_dtype(self) -> None:
        config = LLAMA | {"quantization_config": {"quant_method": "gptq"}, "torch_dtype": "float16"}
        assert (shape_of(config).quantized, shape_of(config).config_dtype) == ("gptq", "float16")
        assert shape_of(config | {"dtype": "bfloat16"}).config_dtype == "bfloat16"


class TestUnknown:
    def test_remote_code_is_refused(self) -> None:
        text = refusal(LLAMA | {"model_type": "phi-msft", "auto_map": {"AutoModelForCausalLM": "modeling_phi.Phi"}})
        assert "'phi-msft'" in text and "remote code" in text and "refused" in text

    def test_a_known_family_ignores_the_code_that_comes_along(self) -> None:
        code = {"auto_map": {"AutoModelForCausalLM": "modeling_phi.PhiForCausalLM"}}
        phi = LLAMA | {"model_type": "phi", "architectures": ["PhiForCausalLM"]}
        assert shape_of(phi | code) == shape_of(phi)
        assert "which is refused" in refusal(phi | code | {"architectures": ["OtherForCausalLM"]})

    def test_names_what_is_missing_and_what_is_known(self) -> None:
        text = refusal({"model_type": "bloom", "n_embed": 768, "vocab_size": 50257})
        assert "unknown architecture 'bloom'" in text and "hidden_size, intermediate_size" in text
        assert "llama, mistral, mixtral, phi, phi3, qwen2, qwen3" in text
        assert "which linears have biases" in refusal(LLAMA | {"model_type": "olmo2"})
        assert "model_type is missing" in refusal({"hidden_size": 1})
        assert "text_config" in refusal({"model_type": "llava", "text_config": dict(LLAMA)})
