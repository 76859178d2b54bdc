"""What a shape says of families that are built in other ways than Llama, and why some cannot be planned yet."""

from __future__ import annotations

import pytest
from test_model_config import EXPERTS, LLAMA, shape_of

from planner.errors import PlanError
from planner.families import FAMILIES, MEMORY_DERIVED

GPT2 = {"model_type": "gpt2", "n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 512, "vocab_size": 100}


class TestFamilies:
    def test_gpt2_has_names_of_its_own(self) -> None:
        shape = shape_of(GPT2)
        assert (shape.width, shape.mlp_width, shape.layers, shape.heads, shape.kv_heads) == (64, 256, 3, 4, 4)
        assert shape_of(GPT2 | {"n_inner": 96}).mlp_width == 96 and shape_of(GPT2 | {"n_inner": None}) == shape
        assert (shape.residual_dropout, shape.attention_dropout, shape.embedding_dropout) == (0.1, 0.1, 0.1)
        assert shape_of(GPT2 | {"attn_pdrop": 0.0}).attention_dropout == 0
        # The usual names count too, but not before its own.
        usual = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "max_position_embeddings": 512}
        assert shape_of({"model_type": "gpt2", "vocab_size": 100} | usual) == shape
        assert shape_of(GPT2 | {"hidden_size": 8}) == shape
        assert [linear.name for linear in shape.linears] == ["c_attn", "c_proj", "c_fc", "c_proj"]
        assert shape.adapted_width(["c_proj"]) == 64 + 64 + 256 + 64
        with pytest.raises(PlanError, match=r"tiny has c_attn, c_proj, c_fc\."):
            shape.adapter_parameters(8, [])

    def test_fused_linears(self) -> None:
        phi3 = shape_of(LLAMA | {"model_type": "phi3"})
        assert [(linear.name, linear.inputs, linear.outputs) for linear in phi3.linears] == [
            ("qkv_proj", 64, 64 + 32 + 32),
            ("o_proj", 64, 64),
            ("gate_up_proj", 64, 2 * 96),
            ("down_proj", 96, 64),
        ]
        assert phi3.linear_parameters_per_layer == shape_of(LLAMA).linear_parameters_per_layer
        assert phi3.largest_linear == 2 * 64 * 96 and phi3.gated_mlp

    def test_experts(self) -> None:
        mixtral = shape_of(LLAMA | EXPERTS | {"model_type": "mixtral"})
        assert {linear.part for linear in mixtral.linears} == {"attention"}
        assert mixtral.expert_parameters_per_layer == 8 * 3 * 64 * 96
        assert mixtral.router_parameters_per_layer == 8 * 64
        assert mixtral.parameters - mixtral.active_parameters == 3 * 6 * 3 * 64 * 96
        qwen = shape_of(LLAMA | EXPERTS | {"model_type": "qwen3_moe"})
        assert qwen.mlp_width == 24
        assert shape_of(LLAMA | EXPERTS | {"model_type": "qwen3_moe", "intermediate_size": None}) == qwen
        gpt_oss = shape_of(LLAMA | EXPERTS | {"model_type": "gpt_oss"})
        assert gpt_oss.expert_parameters_per_layer == 8 * (3 * 64 * 96 + 2 * 96 + 64)
        sinks, router_biases = 3 * 4, 3 * 8
        assert (
            gpt_oss.small_parameters == (3 * 2 + 1) * 64 + 3 * gpt_oss.bias_parameters_per_layer + sinks + router_biases
        )

    def test_a_window_that_is_not_shorter_than_the_context_is_none(self) -> None:
        phi3 = LLAMA | {"model_type": "phi3"}
        for window, expected in ((None, (None, 0)), (511, (511, 3)), (512, (None, 0)), (262144, (None, 0))):
            shape = shape_of(phi3 | {"sliding_window": window})
            assert (shape.sliding_window, shape.sliding_layers) == expected

    def test_two_rotary_embeddings(self) -> None:
        gemma = LLAMA | {"model_type": "gemma3_text", "sliding_window": 64, "num_hidden_layers": 7}
        shape = shape_of(gemma | {"rope_theta": 5e5, "rope_scaling": {"rope_type": "linear", "factor": 8.0}})
        assert (shape.rope_theta, shape.rope_local_theta, shape.rope_type) == (5e5, 1e4, "linear")
        assert (shape.sliding_layers, shape.rotary_tables) == (6, 2)
        assert shape_of(gemma | {"sliding_window_pattern": 1}).rotary_tables == 1
        # Layers named sliding keep their own embedding even where the window is longer than the context.
        wide = shape_of(gemma | {"sliding_window": 4096})
        assert (wide.sliding_layers, wide.rotary_tables) == (0, 2)

    def test_caps_and_factors(self) -> None:
        gemma2 = shape_of(LLAMA | {"model_type": "gemma2"})
        assert (gemma2.attention_softcap, gemma2.final_softcap, gemma2.embedding_scale) == (50.0, 30.0, 8.0)
        uncapped = {"attn_logit_softcapping": None, "final_logit_softcapping": None}
        assert shape_of(LLAMA | {"model_type": "gemma2"} | uncapped).attention_softcap is None
        # The class of Gemma 3 has the field and does not use it.
        assert shape_of(LLAMA | {"model_type": "gemma3_text", "attn_logit_softcapping": 50.0}).attention_softcap is None
        granite = shape_of(LLAMA | {"model_type": "granite", "residual_multiplier": 0.22})
        assert (granite.residual_multiplier, granite.embedding_scale, granite.logits_divisor) == (0.22, 1.0, 1.0)
        llama = shape_of(LLAMA | {"residual_multiplier": 0.22})
        assert (llama.residual_multiplier, llama.embedding_scale, llama.logits_divisor) == (None, None, None)


class TestNotPlanned:
    def test_plain_decoders_have_nothing_in_the_way(self) -> None:
        for family in MEMORY_DERIVED & {"llama", "mistral", "phi", "qwen2", "qwen3"}:
            heads = {"num_key_value_heads": 2}
            assert shape_of(LLAMA | heads | {"model_type": family}).not_planned == ()

    def test_every_family_without_formulas_says_so(self) -> None:
        assert set(FAMILIES) >= MEMORY_DERIVED
        for family in set(FAMILIES) - MEMORY_DERIVED:
            reasons = shape_of(LLAMA | EXPERTS | {"model_type": family, "rotary_pct": 0.5}).not_planned
            assert reasons[-1] == f"the memory of this family ({family}) is not derived yet"

    @pytest.mark.parametrize(
        ("family", "said"),
        [
            ("mixtral", "mixture of 8 experts"),
            ("qwen3_moe", "mixture of 8 experts"),
            ("gpt_oss", "learned sink in every head"),
        ],
    )
    def test_what_is_in_the_way(self, family: str, said: str) -> None:
        reasons = shape_of(LLAMA | EXPERTS | {"model_type": family}).not_planned
        assert any(said in reason for reason in reasons)
