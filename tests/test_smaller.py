"""The next smaller plan: less memory, and the same training."""

from __future__ import annotations

import pytest

from planner.optimizations import all_optimizations
from planner.plan import Plan
from planner.planning import Request, make_plan
from planner.smaller import same_training, smaller_plan
from planner.units import MIB

HUNDRED = 100 * MIB
ASKED = {"gpu": "rtx2060s", "model": "llama-3.2-1b", "total_tokens": 8192, "knobs": {"lora": {"rank": 8}}}


def _inexact(plan: Plan) -> dict[str, object]:
    known = all_optimizations()
    return {choice.id: choice.knobs for choice in plan.choices if not known[choice.id].exact or known[choice.id].asked}


@pytest.mark.parametrize(
    "asked",
    [
        ASKED,
        ASKED | {"required": ("adamw_8bit", "weight_averaging", "checkpoint_int8", "streamed")},
        ASKED | {"excluded": ("nf4_weights",), "gpu": "rtx4090"},
        ASKED | {"train": {"batch": 2, "accumulation": 4, "target": 1024}},
        {"gpu": "rtx3060-12gb", "tier": 3, "model": "qwen3-1.7b"},
    ],
)
def test_it_is_the_same_training_within_the_limit(asked: dict[str, object]) -> None:
    plan = make_plan(Request(**asked))  # type: ignore[arg-type]
    assert plan.verdict == "fits"
    limit, steps = plan.memory.gpu.peak_bytes.high - HUNDRED, 0
    while (made := smaller_plan(plan, limit)) is not None:
        assert made.verdict == "fits" and made.memory.gpu.peak_bytes.high <= limit
        assert _inexact(made) == _inexact(plan)
        for same in ("total_tokens", "target", "tier", "lora_rank", "train"):
            assert getattr(made, same) == getattr(plan, same), same
        assert (made.rope.scaling, made.rope.parameters) == (plan.rope.scaling, plan.rope.parameters)
        limit, steps = made.memory.gpu.peak_bytes.high - HUNDRED, steps + 1
    assert steps > 0 and limit < plan.memory.gpu.peak_bytes.high / 2


def test_what_the_user_named_stays() -> None:
    command = (
        "plan --gpu rtx2060s --with=chunked_loss --without streamed --set chunked_loss.rows=512 --set train.steps=3"
    )
    plan = make_plan(
        Request(
            **ASKED | {"knobs": {"lora": {"rank": 8}, "chunked_loss": {"rows": 512}}},  # type: ignore[arg-type]
            required=("chunked_loss",),
            excluded=("streamed",),
            command=command,
        )
    )
    request = same_training(plan)
    assert "chunked_loss" in request.required and "streamed" in request.excluded
    assert request.knobs["chunked_loss"] == {"rows": 512} and request.knobs["lora"]["rank"] == 8
    assert "exact_attention" not in {*request.required, *request.excluded, *request.knobs}
    made = smaller_plan(plan, plan.memory.gpu.peak_bytes.high - 1)
    assert made is None or made.executor == "resident"


def test_a_shorter_sequence_is_the_longest_that_fits_and_only_where_it_may_be_shorter() -> None:
    plan = make_plan(
        Request(**ASKED | {"excluded": ("streamed", "checkpoint_offload")}, command="plan --without streamed")
    )  # type: ignore[arg-type]
    limit = plan.memory.gpu.peak_bytes.high * 3 // 4
    assert smaller_plan(plan, limit) is None
    made = smaller_plan(plan, limit, shorter=True)
    assert made is not None and made.total_tokens < plan.total_tokens and made.executor == "resident"
    assert made.memory.gpu.peak_bytes.high <= limit
    assert made.memory.gpu.peak_bytes.high > 0.97 * limit
    assert made.memory.gpu.budget_bytes == plan.memory.gpu.budget_bytes, "the card is what it was"


def test_nothing_fits_in_nothing() -> None:
    assert smaller_plan(make_plan(Request(**ASKED)), 64 * MIB, shorter=True) is None  # type: ignore[arg-type]
