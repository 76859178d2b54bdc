"""What cards can do by their profiles and the time model: memory, rates, batches, and steps with fewer operations."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from planner.compose import compose
from planner.evaluate import Candidates, Evaluator
from planner.hardware import load_profile
from planner.lengths import NO_TIER_RANK
from planner.solver import ENDLESS_LIMITS
from planner.units import GIB, format_bytes, format_seconds
from planner.weighing import SECONDS
from reports.render.claims_data import Document, Found, scientific
from reports.render.claims_plans import NAMES, budget, composed, fastest, planned, situation
from reports.render.figures import CARD

RESIDENT = ("chunked_loss", "exact_attention", "gradient_checkpointing", "lora", "mixed_precision", "nf4_weights")


def card_memory(document: Document, card: str) -> Found:
    """As sold, as CUDA shows it, and what a plan may use; the value is GiB as sold."""
    profile = load_profile(card)
    sold, visible = int(profile.memory_bytes.value or 0), int(profile.visible_bytes.value or 0)
    text = (
        f"{sold / GIB:g} GiB as sold; CUDA shows {format_bytes(visible)}, and {format_bytes(budget(card))} are for use"
    )
    return Found(text, sold / GIB)


def half_rate(document: Document, cards: list[str]) -> Found:
    """Peak rate in 16 bits over that in float32."""
    told, ratios = [], []
    for card in cards:
        profile = load_profile(card)
        half, single = (profile.rates[name].value for name in ("fp16", "fp32"))
        ratios.append(float(half or 0) / float(single or 1))
        told.append(f"{ratios[-1]:.1f} on {NAMES[card]}{'' if profile.supports_bf16 else ' (which has no BF16)'}")
    held = {abs(ratio / 2 - 1) <= 0.05 for ratio in ratios}
    return Found(
        f"peak FP16 rate over FP32: {', '.join(told)}",
        holds="in part" if len(held) > 1 else "yes" if True in held else "no",
    )


def curriculum(document: Document, card: str, stages: list[int]) -> Found:
    """Estimated time of as many tokens in each stage, against all of them at the longest."""
    each = [float(fastest(card, length, length, NO_TIER_RANK).time.estimate[0]) / length for length in stages]
    saved = 1 - sum(each) / len(each) / each[-1]
    text = (
        f"as many tokens in each stage, {stages[0]:,} to {stages[-1]:,} long, are estimated to take "
        f"{100 * saved:.0f} % "
        "less time than all at the longest; whether as much is learned is not shown"
    )
    return Found(text, 100 * saved, holds="in part")


def batches(document: Document, card: str, lengths: list[int], sizes: list[int]) -> Found:
    """Estimated time of a sequence alone over that in the best batch that fits; it decides nothing.

    Approximate: the rates of the time model are those of large matrices at any length.
    """
    found, ratios = planned(card), {}
    for tokens in lengths:
        each = []
        for batch in sizes:
            run = Candidates(np.array([tokens]), np.array([tokens]), np.array([NO_TIER_RANK]), batch)
            best = found.on_card.at(run, 0).having(None).cheapest(found.limits, (SECONDS,))
            each.append(float("inf") if best is None else float(best.weights.seconds) / batch)
        ratios[tokens] = each[0] / min(each)
    told = ", ".join(f"{ratio:.2f} at {tokens:,}" for tokens, ratio in ratios.items())
    text = (
        f"estimated gain of the best batch of up to {sizes[-1]} over one sequence at a time on {NAMES[card]}: {told} "
        "tokens, by rates that do not depend on the batch; recorded runs of several batches would decide it"
    )
    return Found(text)


def fused_speed(document: Document, cards: list[str], tokens: int) -> Found:
    """Estimated time of a step without the activation function in one operation over that with it; in percent."""
    run = Candidates(np.array([tokens]), np.array([tokens]), np.array([NO_TIER_RANK]))
    faster = []
    for card in cards:
        evaluate = Evaluator(run, situation(card), planned(CARD).constants, ENDLESS_LIMITS)
        without, fused = (
            float(evaluate(compose(ids, {}, situation(card))).time.estimate[0])
            for ids in (RESIDENT, (*RESIDENT, "fused_activation"))
        )
        faster.append(100 * (without / fused - 1))
    told = ", ".join(f"{gain:.0f} % on {NAMES[card]}" for card, gain in zip(cards, faster, strict=True))
    text = (
        "no such kernel exists here. With the activation function as one operation a step is estimated to be faster by "
        f"{told}, at {tokens:,} tokens"
    )
    return Found(text, faster[0])


def attention_flops(document: Document, card: str, tokens: int, keys: int) -> Found:
    """FLOPs of attention in one forward pass, which do not change with the place of the blocks, and their time."""
    flops = composed(("exact_attention", "lora", "mixed_precision"), tokens).work("attention/forward")
    rate = float(load_profile(card).rates["fp16"].value or 0)
    text = (
        f"{scientific(tokens * keys)} pairs of {tokens:,} and {keys:,} tokens, but blocks change no work: a forward "
        f"pass of attention has {scientific(flops)} FLOP, whole or in blocks, {format_seconds(flops / rate)} of "
        f"{NAMES[card]} at its peak rate, and exact attention stores no such matrix"
    )
    return Found(text, holds="in part")


COMPUTATIONS: Mapping[str, Callable[..., Any]] = {
    each.__name__: each for each in (card_memory, half_rate, curriculum, batches, fused_speed, attention_flops)
}
