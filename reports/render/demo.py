"""The end of `make demo`, told again from its committed record by the code that told it the first time."""

from __future__ import annotations

import json
from io import StringIO
from types import SimpleNamespace
from typing import Any

from planner.markdown import fenced
from planner.plan import Plan
from reports.render.records import DEMO

LEAST_FALL = 5.0  # percent of held-out perplexity
SAME_LOSS = 1e-4


def demo() -> str:
    """What the demo printed from its second table on; folders, which differ from run to run, are left out.

    Raises:
        ValueError: there is no record.
    """
    if not DEMO.is_file():
        raise ValueError(f"there is no {DEMO.name}; `python -m reports.demo --record` makes it")
    record: dict[str, Any] = json.loads(DEMO.read_text(encoding="utf-8"))
    lines = [*table_and_closing(record), "…", *promises(record)]
    return fenced("$ make demo\n…\n" + "\n".join(lines), "console no-run")


def table_and_closing(record: dict[str, Any]) -> list[str]:
    """The trainer's table of predicted and measured memory, and its closing sentences."""
    from rich.console import Console

    from trainer.report import closing_lines, memory_table

    phases = record["measured"]["phases"]

    def peak(what: str) -> int | None:
        return max((sizes[what] for sizes in phases.values() if what in sizes), default=None)

    recorder: Any = SimpleNamespace(phases=phases, peak=peak, pinned_bytes=record["measured"]["host"]["pinned_bytes"])
    printed = StringIO()
    console = Console(file=printed, width=80, color_system=None, highlight=False)
    console.print(
        memory_table(Plan.model_validate_json(json.dumps(record["plan"])), recorder, record["measured"]["terms"])
    )
    for line in closing_lines(record):
        console.print(line)
    return [line.rstrip() for line in printed.getvalue().splitlines()]


def promises(record: dict[str, Any]) -> list[str]:
    """What the demo holds itself to: perplexity falls, and stock PEFT gives the same loss."""
    before, after = (record["evaluation"][when]["perplexity"] for when in ("before", "after"))
    return [
        f"Held-out perplexity fell from {before:.3f} to {after:.3f}: {_fall(record):.1f} %.",
        f"Stock transformers and PEFT load the adapter and give loss {record['stock_peft_loss']:.6f}, "
        f"{_difference(record):.1e} away.",
    ]


def kept(record: dict[str, Any]) -> bool:
    """Whether the promises were kept."""
    return _fall(record) >= LEAST_FALL and _difference(record) <= SAME_LOSS


def _fall(record: dict[str, Any]) -> float:
    """Percent."""
    before, after = (record["evaluation"][when]["perplexity"] for when in ("before", "after"))
    return float(100 * (1 - after / before))


def _difference(record: dict[str, Any]) -> float:
    return abs(float(record["stock_peft_loss"]) - float(record["evaluation"]["after"]["loss"]))
