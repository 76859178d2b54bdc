"""A last resort is looked at where sets without it lack no more than it can save, and is taken where it helps."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner import streamed_blocks, streamed_memory
from planner.baseline import baseline
from planner.optimizations import all_optimizations
from planner.optimizations.base import Needs
from planner.planning import Request, make_plan, solved_for
from planner.solver import Search
from planner.symbols import Letters
from planner.units import GIB

RESORTS = [name for name, each in all_optimizations().items() if each.last_resort]
ROOMY: dict[str, Any] = {"host_bytes": 600 * GIB, "max_step_seconds": 1e9, "objective": "context"}
CASES = {
    "a-card-of-8-gib": Request(gpu="rtx2060s", total_tokens=3_000_000, **ROOMY),
    "wide-heads": Request(gpu="rtx3060", model="gemma-3-1b", total_tokens=2_000_000, **ROOMY),
}


def test_there_is_one_and_it_stands_on_another_optimisation() -> None:
    assert RESORTS == ["sequence_blocks"]
    assert all(all_optimizations()[name].last_resort in all_optimizations() for name in RESORTS)


def test_it_saves_bytes_and_no_work() -> None:
    """`Search.may_help` takes the terms that it claims for nothing, and everything else for what it is without it."""
    works = set(baseline().work).union(*(each.adds for each in all_optimizations().values()))
    for name in RESORTS:
        assert not {claim.rpartition(".")[0] for claim in all_optimizations()[name].claims} & works
        assert not all_optimizations()[name].makes & _needed(name)


def _needed(name: str) -> set[str]:
    """What others than an optimisation need by name."""
    others = (each for other, each in all_optimizations().items() if other != name)
    return {need.term for each in others for need in each.requires if isinstance(need, Needs)}


def asked(seed: int) -> Request:
    """By chance: a card, a model, memory of the host, patience, and tiers or a length."""
    chance = random.Random(seed)
    return Request(
        gpu=chance.choice(("rtx2060s", "rtx3060-12gb", "rtx4060ti-16gb", "rtx4090", "gtx1080ti")),
        model=chance.choice(("phi-2", "llama-3.2-1b", "llama-3.1-8b", "gemma-3-1b", "smollm2-135m", "mistral-7b-v0.1")),
        host_bytes=chance.choice((16, 32, 64, 256, 1024)) * GIB,
        max_step_seconds=chance.choice((600.0, 86_400.0, 1e7)),
        total_tokens=chance.choice((None, None, 65_536, 524_288, 3_000_000)),
    )


@pytest.mark.parametrize("seed", range(12))
def test_what_is_not_looked_at_would_have_changed_nothing(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = make_plan(asked(seed))
    monkeypatch.setattr(Search, "may_help", lambda *_: True)
    always = make_plan(asked(seed))
    assert (plan.verdict, plan.longest, plan.memory) == (always.verdict, always.longest, always.memory)
    assert [(each.id, each.knobs) for each in plan.choices] == [(each.id, each.knobs) for each in always.choices]


@pytest.mark.parametrize("request_", CASES.values(), ids=CASES)
def test_it_is_taken_where_the_card_alone_is_too_small(request_: Request) -> None:
    plan = make_plan(request_)
    blocks = next(choice for choice in plan.choices if choice.id == "sequence_blocks")
    assert plan.verdict == "fits" and "without it the card would lack" in blocks.reason
    without = make_plan(replace(request_, excluded=("sequence_blocks",)))
    assert without.verdict == "does-not-fit"
    assert (without.longest.all_trained or 0) < request_.total_tokens <= (plan.longest.all_trained or 0)
    forced = make_plan(replace(request_, required=("sequence_blocks",)))
    assert [choice.id for choice in forced.choices] == [choice.id for choice in plan.choices]
    assert forced.memory == plan.memory and forced.time == plan.time and forced.longest == plan.longest


@pytest.mark.parametrize("changed", [{"host_bytes": 32 * GIB}, {"max_step_seconds": 60.0}], ids=["host", "time"])
def test_it_is_not_looked_at_where_something_else_is_lacking(changed: dict[str, Any]) -> None:
    plan = make_plan(replace(CASES["a-card-of-8-gib"], **changed))
    rejected = next(each for each in plan.rejected if each.id == "sequence_blocks")
    assert plan.verdict == "does-not-fit" and "last resort" in rejected.reasons[0]


def test_the_longest_that_a_plan_names_counts_it_in() -> None:
    """A short sequence needs no blocks; the longest that the card can train does, and that is what the plan says."""
    short = replace(CASES["a-card-of-8-gib"], total_tokens=32_768)
    plan, without = make_plan(short), make_plan(replace(short, excluded=("sequence_blocks",)))
    assert "sequence_blocks" not in {choice.id for choice in plan.choices}
    assert (plan.longest.all_trained or 0) > (without.longest.all_trained or 0)
    exactly = replace(short, total_tokens=plan.longest.all_trained)
    assert make_plan(exactly).verdict == "fits"


def test_a_set_of_tiers_takes_the_longest_that_fits_with_it() -> None:
    from planner.planning import read_gpu, read_model

    roomy = Request(gpu="rtx2060s", **ROOMY)
    gpu, model = read_gpu(roomy.gpu), read_model(roomy.model)
    found, without = (
        solved_for(each, gpu, model).found for each in (roomy, replace(roomy, excluded=("sequence_blocks",)))
    )
    assert found.index > without.index and found.first is not None and found.first.index == without.index


@given(
    heads=st.integers(1, 8),
    key_heads=st.integers(1, 4),
    size=st.sampled_from([64, 80, 128]),
    group=st.sampled_from([1, 2, 4, 8]),
    block=st.integers(1, 64),
    count=st.integers(8, 40),
    half=st.booleans(),
)
def test_attention_of_many_blocks_takes_less_of_the_card_than_of_the_row(
    heads: int, key_heads: int, size: int, group: int, block: int, count: int, half: bool
) -> None:
    """From eight blocks on, where what lies between the passes is in host memory; and then it does not grow."""
    block *= 128
    x = Letters(
        B=1, S=block * count, S_b=block, H=heads * key_heads, K=key_heads, E=size, H_g=group, j_h=1, d_r=1,
        L=4, l=0, s=1, k_a=0, a=16 if half else 32,
    )  # fmt: skip
    whole = streamed_memory.group_backward(x) + streamed_memory.shared_key_heads(x)
    assert streamed_blocks.group_backward(x) <= whole
    assert streamed_blocks.group_forward(x) <= streamed_memory.group_forward(x)
    longer = Letters(**{**vars(x), "S": 2 * x.S})
    for formula in (streamed_blocks.group_forward, streamed_blocks.group_backward):
        assert formula(longer) == formula(x)
    assert streamed_memory.group_backward(longer) == 2 * streamed_memory.group_backward(x)
