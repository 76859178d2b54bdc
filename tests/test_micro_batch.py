"""Rows of a step are split into the micro-batches that take the least time and fit, at the length of one row."""

from __future__ import annotations

from typing import Any

import pytest
from cli_fixture import Capture, answered, mistakes

from planner.errors import PlanError
from planner.matrix import check
from planner.micro_batch import divisors
from planner.pareto import pareto
from planner.plan import Plan
from planner.planning import Request, make_plan
from planner.tier_table import tier_table

ASKED: list[dict[str, Any]] = [
    {"gpu": "rtx4090", "model": "qwen2.5-0.5b", "total_tokens": 1024, "rows": 24},
    {"gpu": "rtx2060s", "model": "phi-2", "tier": 1, "rows": 6},
    {"gpu": "h200-sxm", "model": "smollm2-135m", "total_tokens": 512, "rows": 16},
    {"gpu": "rtx3060-12gb", "model": "llama-3.2-1b", "total_tokens": 3000, "target": 500, "rows": 9},
    {"gpu": "rtx3090", "model": "phi-2", "total_tokens": 4096, "rows": 7, "excluded": ("streamed",)},
    # One row at a time takes too long, and more do not.
    {"gpu": "rtx4090", "model": "qwen2.5-0.5b", "total_tokens": 1024, "rows": 24, "max_step_seconds": 2.5},
    {"gpu": "rtx4090", "model": "qwen2.5-0.5b", "total_tokens": 1024, "rows": 24, "objective": "memory"},
]


def _ranked(plan: Plan) -> tuple[float, float]:
    assert plan.time.step_seconds.estimate is not None
    seconds, memory = float(f"{plan.time.step_seconds.estimate:.3g}"), float(plan.memory.gpu.peak_bytes.high)
    return (memory, seconds) if plan.objective == "memory" else (seconds, memory)


@pytest.mark.parametrize("asked", ASKED, ids=lambda asked: "-".join(map(str, asked.values())))
def test_no_other_split_is_faster_and_fits(asked: dict[str, Any]) -> None:
    rows = asked["rows"]
    found = make_plan(Request(**asked))
    given = {name: value for name, value in asked.items() if name != "rows"}
    splits = [make_plan(Request(**given, train={"batch": b, "accumulation": rows // b})) for b in divisors(rows)]
    fitting = [plan for plan in splits if plan.verdict == "fits"]
    assert fitting and found.verdict == "fits"
    if "max_step_seconds" in asked:
        assert splits[0].verdict == "does-not-fit", "by time, which ends no search"
    else:
        assert splits[: len(fitting)] == fitting, "more rows at a time take more memory"
    assert found.train.batch * found.train.accumulation == rows
    best = min(fitting, key=_ranked)
    assert found == best.model_copy(update={"provenance": found.provenance})


def test_rows_that_never_fit_are_told_of_with_one_at_a_time() -> None:
    plan = make_plan(Request(gpu="rtx2060s", total_tokens=2_000_000, rows=8))
    assert plan.verdict == "does-not-fit" and (plan.train.batch, plan.train.accumulation) == (1, 8)


def test_the_longest_is_that_of_one_row_at_a_time_and_its_tier_stays() -> None:
    one, split = make_plan(Request(train={"accumulation": 4})), make_plan(Request(rows=4))
    assert (split.tier, split.total_tokens, split.lora_rank) == (one.tier, one.total_tokens, one.lora_rank)
    assert split.train.batch * split.train.accumulation == 4


def test_divisors() -> None:
    assert divisors(1) == [1] and divisors(12) == [1, 2, 3, 4, 6, 12] and divisors(7) == [1, 7]


def test_on_the_command_line(capsys: Capture) -> None:
    words = ("--gpu", "rtx4090", "--model", "qwen2.5-0.5b", "--context", "1K", "--set", "train.rows=24")
    train = answered(capsys, *words, "--json")["train"]
    assert train["batch"] * train["accumulation"] == 24 and train["batch"] > 1
    assert mistakes(capsys, *words, "--set", "train.batch=2")[0].startswith(
        "error: --set train.rows=24 --set train.batch=2: rows of a step are micro-batch times accumulation"
    )
    assert "must be from 1 to 65,536" in mistakes(capsys, *words[:-1], "train.rows=0")[0]


def test_where_many_lengths_are_looked_at_it_is_refused() -> None:
    for many in (pareto, tier_table, lambda request: check(("rtx2060s",), ("phi-2",), request)):
        with pytest.raises(PlanError, match="is split at one length"):
            many(Request(rows=4))
