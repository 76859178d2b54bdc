"""What a run has left in its folder, and a run that is stopped on the way, for tests."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from planner.plan import Plan
from trainer import running
from trainer.run import execute


def lines(out: Path) -> list[dict[str, Any]]:
    """What was logged, line by line."""
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def record(out: Path) -> dict[str, Any]:
    """The run's own record."""
    found: dict[str, Any] = json.loads((out / "measurement.json").read_text(encoding="utf-8"))
    return found


def stopped_and_resumed(plan: Plan, monkeypatch: pytest.MonkeyPatch, *, after: int) -> None:
    """Run a plan that stores itself, interrupt it after a step, and go on with it to its end."""
    steps = running.train_steps

    def interrupted(*given: Any) -> Iterator[dict[str, Any]]:
        for step in steps(*given):
            yield step
            if step["step"] == after:
                raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(running, "train_steps", interrupted)
        assert execute(plan) == 130
    assert execute(plan, resume=True) == 0
