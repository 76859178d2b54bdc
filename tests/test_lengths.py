"""Models with a learned row for each position: nothing longer is planned, and who asks for it is told why."""

from __future__ import annotations

from dataclasses import replace

import pytest

from planner.errors import PlanError
from planner.matrix import matrix
from planner.model import load_model
from planner.pareto import pareto
from planner.planning import Request, make_plan
from planner.tier_table import tier_table
from planner.tiers import TIERS

GPT2 = Request(gpu="rtx4090", model="gpt2")


def test_where_no_tier_is_within_the_positions_all_of_them_are_planned() -> None:
    plan = make_plan(GPT2)
    assert (plan.verdict, plan.tier, plan.total_tokens, plan.target) == ("fits", None, 1024, 1024)
    assert (plan.longest.with_target, plan.longest.all_trained) == (1024, 1024)
    assert not any("positions beyond" in warning for warning in plan.warnings)


def test_a_card_with_room_for_fewer_gets_fewer() -> None:
    asked = Request(gpu="rtx2060s", model="gpt2", train={"batch": 256}, max_step_seconds=10**6)
    assert make_plan(asked).total_tokens == 1024, "layers run in passes"
    plan = make_plan(replace(asked, excluded=("streamed",)))
    assert plan.verdict == "fits" and 64 <= plan.total_tokens < 1024


@pytest.mark.parametrize(
    ("asked", "named"), [({"total_tokens": 1025}, "--context 1,025"), ({"tier": 1}, f"--tier 1: is {TIERS[0].total:,}")]
)
def test_longer_ones_are_refused_with_the_reason(asked: dict[str, int], named: str) -> None:
    with pytest.raises(PlanError, match="a learned row for each of 1,024 positions") as error:
        make_plan(Request(gpu="rtx4090", model="gpt2", **asked))
    assert named in str(error.value) and "--context 1024 is the longest" in str(error.value)


def test_a_target_beyond_the_positions_is_cut_to_them() -> None:
    assert make_plan(Request(gpu="rtx4090", model="gpt2", target=4000)).target == 1024


def test_tables_say_so_too() -> None:
    with pytest.raises(PlanError, match=r"tier 1: is 4,608 tokens: gpt2 has a learned row"):
        tier_table(GPT2)
    (row,) = matrix(["rtx4090"], ["gpt2"], GPT2)
    assert (row.fits, row.tier, row.total_tokens, row.longest_all_trained) == (True, None, 1024, 1024)
    assert max(point.total_tokens for point in pareto(GPT2).points) == 1024


def test_other_models_have_no_end() -> None:
    assert load_model("phi-2").most_tokens is None and load_model("gpt2").most_tokens == 1024
