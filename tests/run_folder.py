"""What a run has left in its folder, for tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def lines(out: Path) -> list[dict[str, Any]]:
    """What was logged, line by line."""
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def record(out: Path) -> dict[str, Any]:
    """The run's own record."""
    found: dict[str, Any] = json.loads((out / "measurement.json").read_text(encoding="utf-8"))
    return found
