"""Text that is written on a card: every case is planned, frozen, and of a size that its card has."""

from __future__ import annotations

import json

import pytest

from planner.calibration import calibration
from planner.generating import KEEPINGS
from reports.render.generated import records
from reports.validation import generated
from reports.validation.generated import CASES, PLANNED, Case


def test_every_case_is_frozen() -> None:
    frozen = json.loads(PLANNED.read_text(encoding="utf-8"))
    assert [*frozen] == [case.name for case in CASES]
    for case in CASES:
        row = frozen[case.name]
        assert (row["card"], row["model"], row["prompt"], row["keeping"]) == (
            case.card,
            case.model,
            case.prompt,
            case.keeping,
        )
        assert 0 < row["expected_bytes"] < row["high_bytes"] and bool(row["host_bytes"]) is (case.keeping == "host")


def test_every_way_is_tried_and_fits() -> None:
    assert {case.keeping for case in CASES} == {*KEEPINGS}
    for case in CASES[::3]:
        plan = case.plan()
        assert plan.verdict == "fits" and case.planned(plan).fits, case.name


def test_pinned_memory_is_taken_as_fast_as_is_said() -> None:
    """By the first chunk of prompts with a cache in host memory, less that of one whose cache lies on the card."""
    found = {record["case"]["name"]: record for record in records("by-4096")}
    alone = found["llama-3.2-1b-65536-card"]["chunks_launched"][0]
    for name in ("llama-3.2-1b-65536-host", "qwen3-4b-32768-host", "phi-2-32768-host"):
        size = found[name]["planned"]["host_bytes"]
        rate = size / (found[name]["chunks_launched"][0] - alone)
        assert rate == pytest.approx(calibration().pinning_rate(), rel=0.1), name


def test_a_case_nobody_knows_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        generated.main(["run", "nowhere", "no-such-case"])
    assert "no case is called no-such-case" in capsys.readouterr().err
    assert Case("one", "h200-8gib", "llama-3.2-1b", 64, "card").plan().verdict == "fits"
