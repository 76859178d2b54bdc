"""Why each optimisation is on or off: one reason for each, and true where planning again can tell."""

from __future__ import annotations

import shlex
from itertools import pairwise

import pytest
from cli_fixture import planned

from planner.hardware import load_profile
from planner.model import load_model
from planner.optimizations import all_optimizations
from planner.optimizations.base import Situation
from planner.units import GIB


@pytest.mark.parametrize(
    "words",
    [
        "--gpu rtx2060s --tier 11",
        "--gpu rtx2060s --context 4K --with adamw_8bit --without checkpoint_offload",
        "--gpu h200-sxm --model llama-3.1-8b --tier 5 --without fused_activation --with nf4_weights",
        "--gpu cpu --model smollm2-135m --context 1K --without chunked_loss",
    ],
)
def test_every_optimisation_is_on_or_off_once_and_for_a_reason(words: str) -> None:
    plan, asked = planned(words), shlex.split(words)
    on, off = [choice.id for choice in plan.choices], [rejection.id for rejection in plan.rejected]
    assert sorted([*on, *off]) == sorted(all_optimizations())
    assert all(choice.reason.strip() for choice in plan.choices)
    assert all(reason.strip() for rejection in plan.rejected for reason in rejection.reasons)
    for option, name in pairwise(asked):
        assert option != "--with" or name in on
        assert option != "--without" or name in off


@pytest.mark.parametrize("words", ["--gpu rtx2060s", "--gpu rtx3060-12gb --context 20K"])
def test_a_reason_is_true_where_planning_again_can_tell(words: str) -> None:
    plan = planned(words)
    assert plan.verdict == "fits" and plan.time.step_seconds.estimate
    here = f"{words} --tier {plan.tier}" if plan.tier else words
    free = [name for name, each in all_optimizations().items() if each.free]
    for choice in plan.choices:
        if choice.id in ("lora", *free):
            continue
        without = planned(f"{here} --without {choice.id}")
        assert (without.verdict == "does-not-fit") is choice.reason.startswith("without it"), choice
        if choice.reason.startswith("fastest"):
            assert (without.time.step_seconds.estimate or 0) > plan.time.step_seconds.estimate
        if " saves " in choice.reason:
            assert without.memory.gpu.peak_bytes.high > plan.memory.gpu.peak_bytes.high
    for rejection in plan.rejected:
        if not all_optimizations()[rejection.id].reasons(
            Situation(load_profile(plan.gpu.id), load_model("phi-2"), 32 * GIB)
        ):
            with_it = planned(f"{here} --with {rejection.id}")
            assert (with_it.verdict == "does-not-fit") is (rejection.reasons == ["does not fit with it"]), rejection


def test_four_bits_are_on_for_time_only_where_they_save_a_fifth_of_it() -> None:
    worth = all_optimizations()["nf4_weights"].worth
    words = "--gpu rtx3090 --model llama-3.1-8b --tier 7"
    gentle, quick = planned(words), planned(f"{words} --objective speed")
    (told,) = (each.reasons[0] for each in gentle.rejected if each.id == "nf4_weights")
    assert "which is too little for what it does to the result" in told
    assert "nf4_weights" in {choice.id for choice in quick.choices}
    times = [plan.time.step_seconds.estimate or 0.0 for plan in (gentle, quick)]
    assert times[1] < times[0] <= worth * times[1] * 1.01
    words = "--gpu rtx3060 --model phi-2 --context 4K"
    on, off = planned(words), planned(f"{words} --without nf4_weights")
    assert "nf4_weights" in {choice.id for choice in on.choices}
    assert (off.time.step_seconds.estimate or 0.0) > worth * (on.time.step_seconds.estimate or 0.0)
    asked = planned("--gpu rtx3090 --model llama-3.1-8b --tier 7 --with nf4_weights")
    assert {"nf4_weights"} <= {choice.id for choice in asked.choices}
