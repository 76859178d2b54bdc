"""Which number types and which attention kernels there are for a card and a model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from transformers.models.phi.modeling_phi import eager_attention_forward

from planner.branches import branches
from planner.compose import Configuration, compose, problems
from planner.hardware import load_profile
from planner.machine import cpu_profile
from planner.model import load_model
from planner.optimizations import all_optimizations, by_id
from planner.optimizations.base import Situation
from planner.sets import PinnedKnobs, valid_sets
from planner.space import Space


def configurations(ids: Sequence[str], knobs: PinnedKnobs, situation: Situation) -> Iterator[Configuration]:
    """These optimisations and no others, with every value of their knobs that is not pinned."""
    others = [name for name in all_optimizations() if name not in ids]
    return Space(branches(situation, ids, others, knobs), situation, knobs).configurations()


# Phi-2 in float16


def test_scores_that_are_scaled_after_the_product_overflow_float16() -> None:
    """transformers' own attention of Phi multiplies first and scales then; scores of 8,050 become infinite."""
    model = load_model("phi-2")
    module = torch.nn.Module().eval()
    module.num_key_value_groups = 1
    query = torch.full((1, 1, 2, model.head_size), 30.0)  # 30 · 30 · 80 = 72,000 before scaling, above 65,504
    outcome = {}
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        q = query.to(dtype)
        output, _ = eager_attention_forward(module, q, q, q, None, scaling=model.head_size**-0.5)
        outcome[dtype] = bool(output.isfinite().all())
    assert outcome == {torch.float16: False, torch.bfloat16: True, torch.float32: True}
    q = query.half()
    exact = torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True)
    assert exact.isfinite().all(), "a kernel that never writes the scores keeps them in float32"


def test_phi_2_in_float16_with_stored_scores_is_refused() -> None:
    phi, llama = load_model("phi-2"), load_model("llama-3.2-1b")
    turing = Situation(load_profile("rtx2060s"), phi, 2**35)
    (reason,) = problems(["lora", "mixed_precision"], turing)["mixed_precision"]
    assert "phi-2" in reason and "float16" in reason and "exact_attention" in reason and turing.gpu.name in reason
    assert not problems(["lora", "mixed_precision", "exact_attention"], turing)
    assert compose(["lora", "mixed_precision", "exact_attention"], {}, turing).settings["dtype"] == "fp16"
    # Both compute attention by kernels that never write the scores.
    sets = list(valid_sets(turing, ["mixed_precision"], []))
    assert all({"exact_attention", "streamed"} & {*ids} for ids in sets)
    assert {name for ids in sets for name in ids} >= {"exact_attention", "streamed"}
    # The scores of the other families have not been seen to overflow.
    assert not problems(["lora", "mixed_precision"], replace(turing, model=llama))


def test_phi_2_with_stored_scores_takes_bfloat16_where_there_is_any() -> None:
    ada = Situation(load_profile("rtx4090"), load_model("phi-2"), 2**35)
    ids = ("lora", "mixed_precision")
    assert not problems(ids, ada)
    (only,) = {found.settings["dtype"] for found in configurations(ids, {}, ada)}
    assert only == "bf16"
    pinned = {"mixed_precision": {"dtype": "float16"}}
    assert list(configurations(ids, pinned, ada)) == []
    with_kernel = list(configurations(("exact_attention", *ids), pinned, ada))
    assert with_kernel and {found.settings["dtype"] for found in with_kernel} == {"fp16"}


def test_gemma_3_is_never_computed_in_float16() -> None:
    """Its activations pass the largest float16; a card without bfloat16 computes it in float32."""
    model = load_model("gemma-3-1b")
    turing = Situation(load_profile("rtx2060s"), model, 2**35)
    assert any("overflow float16" in reason for reason in by_id("mixed_precision").reasons(turing))
    ada = Situation(load_profile("rtx4090"), model, 2**35)
    (dtype,) = by_id("mixed_precision").knobs
    assert dtype.choices(ada) == ("bfloat16",)


# Kernels and windows


def test_soft_capped_scores_go_by_blocks_and_no_others_do() -> None:
    ada = load_profile("rtx4090")
    capped, plain = Situation(ada, load_model("gemma-2-2b"), 2**35), Situation(ada, load_model("gemma-3-1b"), 2**35)
    assert not problems(["lora", "blockwise_attention"], capped) and not problems(["lora", "exact_attention"], plain)
    (reason,) = problems(["lora", "exact_attention"], capped)["exact_attention"]
    assert "soft-caps" in reason and "50" in reason and "blockwise_attention does" in reason
    (reason,) = problems(["lora", "blockwise_attention"], plain)["blockwise_attention"]
    assert "caps no scores" in reason and "exact_attention" in reason
    assert compose(["lora", "blockwise_attention"], {}, capped).settings["attention"] == "blocks"


def test_models_with_a_window_get_a_kernel_that_has_windows() -> None:
    hopper, turing = load_profile("h200-sxm"), load_profile("rtx2060s")
    windowed, plain = load_model("starcoder2-3b"), load_model("llama-3.2-1b")
    (kernel,) = by_id("exact_attention").knobs
    assert kernel.choices(Situation(hopper, plain, 2**35)) == ("cudnn", "flash", "efficient")
    assert kernel.choices(Situation(hopper, windowed, 2**35)) == ("flash", "efficient")
    assert kernel.choices(Situation(turing, windowed, 2**35)) == ("efficient",)
    assert kernel.choices(Situation(cpu_profile(), windowed, 2**35)) == ("cpu",)


# NF4 without 16-bit compute


def test_pascal_has_four_bit_weights_and_computes_in_float32() -> None:
    """Its 16-bit units are slow or none, but NF4 can be dequantised to any type."""
    pascal = Situation(load_profile("gtx1080ti"), load_model("phi-2"), 2**35)
    assert problems(["lora", "mixed_precision"], pascal) and not problems(["lora", "nf4_weights"], pascal)
    (made,) = configurations(("lora", "nf4_weights"), {}, pascal)
    letters = made.at(batch=1, total=64, target=64, workspace=0)
    letters.R = 8
    assert (letters.a, letters.w, made.settings["dtype"]) == (32, 32, "fp32")
    largest, width = pascal.model.largest_linear, pascal.model.mlp_width
    loading, buffer = (made.ledger.terms[f"buffers/{name}"] for name in ("loading", "dequantised"))
    scales = 4 * -(-largest // 64)
    assert loading.bytes(letters) == 4 * largest + scales - 8 * pascal.model.adapter_parameters(8)
    letters.e = 0
    assert buffer.bytes(letters) == 4 * (largest - 64 * width)
    weights = pascal.model.layers * pascal.model.linear_parameters_per_layer
    assert (
        made.ledger.work["dequantise/forward"].amount(letters) == weights * 68 // 8
    )  # 4 bits read, 32 written, 32 read


def test_gemma_3_on_turing_has_four_bit_weights_in_float32() -> None:
    turing = Situation(load_profile("rtx2060s"), load_model("gemma-3-1b"), 2**35)
    ids = ["lora", "nf4_weights", "exact_attention", "gradient_checkpointing"]
    assert not problems(ids, turing) and compose(ids, {}, turing).settings["dtype"] == "fp32"


# Experts


def test_experts_need_a_card_with_grouped_products() -> None:
    model = load_model("qwen3-30b-a3b")
    (reason,) = problems(["lora"], Situation(load_profile("rtx2060s"), model, 2**35))["lora"]
    assert "8.0" in reason and "7.5" in reason
    for card in (load_profile("rtx4090"), cpu_profile()):
        assert not problems(["lora"], Situation(card, model, 2**35))
    assert not problems(["lora"], Situation(load_profile("rtx2060s"), load_model("phi-2"), 2**35))


def test_sinks_go_by_kernels_whose_sum_is_known() -> None:
    (kernel,) = by_id("exact_attention").knobs
    sinks = replace(load_model("gpt-oss-20b"), sliding_window=None, sliding_layers=0)
    assert kernel.choices(Situation(load_profile("h200-sxm"), sinks, 2**35)) == ("flash", "efficient")
