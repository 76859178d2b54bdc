"""For docs/validation.md: errors of streamed gradients in 16 bits, and what of a streamed step is attention alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from planner.markdown import seconds, table
from reports.render.records import FOLDER

FLOORS = (
    "model",
    "tokens>",
    "kernel",
    "heads>",
    "floor, s>",
    "step, s>",
    "step over floor>",
    "copies hidden>",
    "machine",
)
OTHERS = FOLDER / "others"
"""Records of `reports.validation.accuracy` and `reports.validation.floor`."""


def section(folder: Path = OTHERS) -> str:
    """Both tables."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]
    errors, floors = ([one for one in found if key in one] for key in ("ratio", "floor_seconds"))
    return f"""## Layers in passes: errors and time

Errors of all adapters' gradients in 16 bits, against the same step in float32: of plain transformers and PEFT under
autocast, and of the streamed executor; the median over seeds (`python -m reports.validation.accuracy`).

{table(("model", "tokens>", "dtype", "seeds>", "stock>", "streamed>", "ratio>", "machine"), map(_error, errors))}
The floor of a step is what its attention kernel takes alone, two passes forward and one backward for every layer. A
copy is hidden where a kernel runs at the same time, by a trace of some layers (`python -m reports.validation.floor`).

{table(FLOORS, map(_floor, floors))}"""


def _error(one: dict[str, Any]) -> tuple[str, ...]:
    median = one["median"]
    return (
        one["model"],
        f"{one['tokens']:,}",
        one["dtype"],
        str(len(one["each"])),
        f"{100 * median['stock']:.2f} %",
        f"{100 * median['streamed']:.2f} %",
        f"{one['ratio']:.3f}",
        _machine(one),
    )


def _floor(one: dict[str, Any]) -> tuple[str, ...]:
    knobs, over = one["streamed"], one["step_over_floor"]
    return (
        one["model"],
        f"{one['tokens']:,}",
        knobs["kernel"],
        str(knobs["heads"]),
        seconds(one["floor_seconds"]["step"]),
        seconds(one["step_seconds"]),
        "not measured" if over is None else f"{over:.2f}",
        f"{100 * one['copying_hidden_share']:.0f} % of {one['trace_seconds']['copying']:.2f} s",
        _machine(one),
    )


def _machine(one: dict[str, Any]) -> str:
    gpu = one["environment"]["gpu"]
    return gpu["name"] if gpu else "CPU"
