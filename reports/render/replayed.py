"""For reports/validation.md: what some runs would have the allocator reserve, by their requests, without a card."""

from __future__ import annotations

import json

from planner.markdown import gib, table
from planner.units import MIB
from reports.render.records import FOLDER

FOUND = FOLDER / "others" / "replay.json"


def section() -> str:
    """A table of the runs that were replayed, beside what was measured."""
    runs = json.loads(FOUND.read_text(encoding="utf-8"))["runs"]
    rows = []
    for name, run in runs.items():
        measured = run.get("measured")
        rows.append(
            (
                name,
                gib(measured["allocated"]) if measured else "failed",
                gib(run["allocated"]),
                gib(measured["reserved"]) if measured else "failed",
                gib(run["reserved"]),
                f"{(run['high'] - run['smallest_limit']) / MIB:+,.0f}".replace("-", "−"),
            )
        )
    short = sum(not run["fits"] for run in runs.values())
    told = (
        "All runs that failed, and those that came closest to their bound, with the trainer of today: their requests "
        "to the allocator, made on tensors that hold no data, and replayed by the allocator's own rules "
        "(`python -m reports.validation.replay`). Reserved is without a limit. What is to spare is the bound less the "
        "smallest limit under which the run ends; placement is chaotic, and some 50 MiB are within what it does not "
        f"tell. Of these {len(runs)} runs {short or 'none'} would go over. Since the runs above, weights in four bits "
        "lie in one storage, and a product's output is made before the wide matrix. None of that has run on a card yet."
    )
    heads = (
        "run",
        "allocated, measured>",
        "replayed>",
        "reserved, measured>",
        "replayed, no limit>",
        "to spare, MiB>",
    )
    return f"## Replayed without a card\n\n{told}\n\n{table(heads, rows)}"
