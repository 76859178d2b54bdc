"""What switching an optimisation on does, against two plans that were made each for itself."""

from __future__ import annotations

from typing import Any

import pytest
from cli_fixture import Capture, answered

from planner.cli import main
from planner.effects import Effect, effects
from planner.optimizations import all_optimizations
from planner.plan import Plan
from planner.planning import Request, make_plan

CARD = "rtx3090"


def _without(name: str, plan: Plan) -> Plan:
    """A plan with exactly the others on, and with the same values of their knobs."""
    kept = {choice.id: choice.knobs for choice in plan.choices if choice.id != name}
    others = tuple(sorted(set(all_optimizations()) - set(kept)))
    knobs: dict[str, dict[str, Any]] = {each: dict(values) for each, values in kept.items() if each != "lora"}
    return make_plan(Request(gpu=CARD, tier=3, required=tuple(kept), excluded=others, knobs=knobs))


def _terms(plan: Plan) -> dict[str, int]:
    """Bytes of each term, on whatever device."""
    found: dict[str, int] = {}
    for terms in (*plan.memory.gpu.phases.values(), plan.memory.host.terms, plan.memory.disk.terms):
        for name, size in terms.items():
            found[name] = max(size, found.get(name, 0))
    return found


@pytest.mark.parametrize("name", ["adamw_8bit", "lookahead", "spike_rewind", "kept_checkpoints", "fused_activation"])
def test_an_effect_is_the_difference_of_two_plans(name: str) -> None:
    on = make_plan(Request(gpu=CARD, tier=3, required=(name,)))
    off = _without(name, on)
    found = effects(on)[name]
    before, after = _terms(off), _terms(on)
    changed = {term: after.get(term, 0) - before.get(term, 0) for term in before | after}
    assert found.terms == {term: size for term, size in changed.items() if size} != {}
    assert found.peak_bytes == on.memory.gpu.peak_bytes.expected - off.memory.gpu.peak_bytes.expected
    assert on.time.step_seconds.estimate is not None and off.time.step_seconds.estimate is not None
    ratio = on.time.step_seconds.estimate / off.time.step_seconds.estimate
    assert found.step == pytest.approx(ratio, rel=1e-5) and not found.beside
    assert effects(off)[name] == found, "in the plan without it the same is told of switching it on"


def test_what_moves_to_the_host_is_told() -> None:
    found = effects(make_plan(Request()))["streamed_weights"]
    assert found.moved["weights/linear"] == "pinned" and found.peak_bytes < -4 * 2**30


def test_what_hangs_on_another_is_compared_with_what_would_stand_in_its_place() -> None:
    """Without streaming layers are recomputed, with their inputs in the host: they are not held whole."""
    found = effects(make_plan(Request()))["streamed"]
    assert {"gradient_checkpointing", "checkpoint_offload", "exact_attention"} <= {*found.beside}
    assert -64 * 2**30 < found.peak_bytes < -16 * 2**30 and found.step is not None and 1 < found.step < 1.5


def test_what_is_off_is_put_in_and_drives_off_what_it_cannot_stand_beside() -> None:
    found = effects(make_plan(Request()))["gradient_checkpointing"]
    assert "checkpoint_offload" in found.beside and found.peak_bytes < 0


def test_there_is_one_for_each_that_can_be_used_and_none_for_others() -> None:
    found = effects(make_plan(Request()))
    assert "lora" not in found, "nothing would be trained without it"
    assert "blockwise_attention" not in found, "phi-2 caps no scores"
    assert {"chunked_loss", "nf4_weights", "mapped_tokens", "rate_range_test"} <= {*found}


def test_it_is_told_on_the_command_line(capsys: Capture) -> None:
    rows = {row["id"]: row for row in answered(capsys, "optimizations", "--gpu", CARD, "--tier", "3", "--json")}
    for name, effect in effects(make_plan(Request(gpu=CARD, tier=3))).items():
        told = rows[name]["effect"]
        beside = tuple(told["beside"])
        assert Effect(told["terms"], told["moved"], told["peak_bytes"], told["step_ratio"], beside) == effect
    assert "effect" not in rows["zero2"] and rows["lora"]["effect"] is None
    assert main(["optimizations", "--gpu", CARD, "--tier", "3"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "averages/adapters +135.00 MiB" in out and "no memory and no time that is modelled" in out
