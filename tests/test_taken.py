"""Runs that memory was taken from on a card: what their records show, and how they are watched."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from trainer_tiny import save_model

from planner.plan import Plan
from planner.plan_file import load_plan
from planner.planning import Request, make_plan
from reports.render import taken as page
from reports.validation import taken
from reports.validation.taken import AT, CASES, FOLDER, STEPS, Taken, Taker, disturbed, undisturbed

FOUND = page.found()
SAME = page.between_equal_runs()
"""Of a loss: what two runs by the same plan differ by on that card, where sums are made in another order."""


def test_every_case_has_a_plan_and_a_record() -> None:
    assert {*FOUND} == {case.name for case in CASES} == {path.stem for path in (FOLDER / "plans").glob("*.yaml")}
    assert {case.when for case in CASES} == {"step", "probe", "evaluation"}
    assert {case.by for case in CASES} == {"process", "limit"} and not [*FOLDER.glob("*.failed.txt")]
    plans = [load_plan(FOLDER / "plans" / f"{case.name}.yaml") for case in CASES]
    assert {plan.executor for plan in plans} == {"resident", "streamed"}
    for name in ("nf4_weights", "adamw_8bit", "weight_averaging"):
        assert any(name in {choice.id for choice in plan.choices} for plan in plans), name
    assert any(plan.knobs("mixed_precision").get("dtype") == "float16" for plan in plans), "with a loss scale"


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_a_run_that_memory_was_taken_from_ends_as_one_that_had_it(case: Taken) -> None:
    record, plan = FOUND[case.name], load_plan(FOLDER / "plans" / f"{case.name}.yaml")
    one, other = record["undisturbed"], record["taken"]
    assert one["high_bytes"] == plan.memory.gpu.peak_bytes.high and len(one["losses"]) == STEPS
    assert record["kept_bytes"] < one["allocated_bytes"] <= one["high_bytes"], "it would have needed what was taken"
    assert len(other["losses"]) == STEPS and other["allocated_bytes"] <= other["high_bytes"]
    assert other["reserved_bytes"] <= other["high_bytes"] and record["left_on_card_bytes"] < 2**20
    if page.as_long(record):
        assert page.apart(record) <= SAME
    else:
        assert case.when == "probe", "a run that has begun is never made shorter"
    if case.lifted:
        assert "--execute --resume" in record["stopped"] and other["resumed"][0]["steps"] == AT - 1
        return
    assert record["stopped"] is None and other["high_bytes"] < one["high_bytes"]
    if case.by == "process":
        assert other["high_bytes"] <= record["kept_bytes"]
    if case.when == "step":
        (noted,) = other["replanned"]
        assert noted["steps"] == AT - 1 and "ran out of memory" in noted["why"]
        assert other["losses"][: AT - 1] == pytest.approx(one["losses"][: AT - 1], rel=1e-6)


def test_the_page_tells_of_each() -> None:
    section = page.section()
    for name in FOUND:
        assert f"| {name} | " in section
    most = max(page.apart(record) for record in FOUND.values() if page.as_long(record))
    assert f"no loss was off by more than {100 * most:.3f} %" in section and most < SAME < 2e-4
    assert f"Of {len(CASES)} runs {page.sentence()}" in section
    told = "9 went on by a smaller plan at full length, 3 of these once the limit had been lifted, 1 with a shorter"
    assert page.sentence().startswith(told)


def test_losses_that_differ_are_told_apart() -> None:
    record = FOUND["qwen2.5-0.5b-4096-bf16"]
    run = record["taken"]
    for changed in (
        run | {"losses": [*run["losses"][:-1], 1.01 * run["losses"][-1]]},
        run | {"evaluation": {"after": {"loss": 1.01 * run["evaluation"]["after"]["loss"]}}},
    ):
        assert page.apart(record | {"taken": changed}) > 50 * SAME


@pytest.mark.parametrize("when", ["step", "probe", "evaluation"])
def test_the_moment_comes_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: Any) -> None:
    """On the CPU, with memory that is said to have run out."""
    save_model("llama", tmp_path / "model")
    train = {"data": "given later", "steps": STEPS, "validation": 0.5, "evaluation_rows": 1}
    plan: Plan = make_plan(
        Request(
            gpu="cpu",
            model=str(tmp_path / "model"),
            total_tokens=96,
            excluded=("mixed_precision",),
            knobs={"lora": {"rank": 4}},
            train=train,
        )
    )

    def take(self: Taker) -> None:
        if not self.done:
            self.done = True
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 256.00 KiB. GPU 0 has 8.00 GiB.")

    monkeypatch.setattr(taken.Taker, "take", take)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 0)
    one = undisturbed(plan, tmp_path / "one")
    other = disturbed(Taken("any", "", 0.7, when=when), plan, tmp_path / "other")
    assert other["stopped"] is None and other["left_on_card_bytes"] == 0
    assert other["taken"]["losses"] == pytest.approx(one["undisturbed"]["losses"], rel=1e-5)
    assert len(other["taken"]["replanned"]) == (when == "step")
    assert other["taken"]["high_bytes"] < one["undisturbed"]["high_bytes"]
    json.dumps(other)
