"""For reports/validation.md: what runs of the first running would have the allocator reserve, by their requests."""

from __future__ import annotations

import json

from planner.markdown import gib, table
from planner.units import MIB
from reports.render.grid_records import NOT_RUN, RAN, came_of
from reports.render.records import FOLDER

FOUND = FOLDER / "others" / "replay.json"


def section() -> str:
    """A table of the runs that were replayed, beside what was measured."""
    runs = json.loads(FOUND.read_text(encoding="utf-8"))["runs"]
    rows = []
    for name, run in runs.items():
        measured = run.get("measured")
        before, today = run["before"], run["today"]
        spare = ((run["high"] - when["smallest_limit"]) / MIB for when in (before, today))
        rows.append(
            (
                name,
                gib(measured["allocated"]) if measured else "failed",
                gib(before["allocated"]),
                str(measured["retries"]) if measured else "failed",
                str(before["retries"]) if before["fits"] else "fails",
                *(f"{size:+,.0f}".replace("-", "−") for size in spare),
                came_of(name),
            )
        )
    failed = [run for run in runs.values() if "measured" not in run]
    ended = [run for run in runs.values() if "measured" in run]
    tried = [name for name in runs if came_of(name) != NOT_RUN]
    done = [name for name in tried if came_of(name) == RAN]
    told = (
        "All runs of the first running that failed, and some of those that came closest to their bound: their requests "
        "to the allocator, made on tensors that hold no data, and replayed by the allocator's own rules "
        "(`python -m reports.validation.replay`). With the trainer as it was, "
        f"{sum(not run['before']['fits'] for run in failed)} of the {len(failed)} that failed fail in replay, too, and "
        f"{sum(run['before']['fits'] for run in ended)} of the {len(ended)} that ended end. Since then weights in four "
        "bits lie in one storage, and a product's output is made before the wide matrix: so "
        f"{sum(run['today']['fits'] for run in runs.values())} of all {len(runs)} end in replay. {len(tried)} of them "
        f"have been run on a card since, and {len(done)} ended; of those that had failed "
        f"{sum('measured' not in runs[name] for name in tried)} were run, and "
        f"{sum('measured' not in runs[name] for name in done)} ended. To spare is the bound less the smallest limit "
        "under which a run ends, today less what the trainer takes off the limit; placement is chaotic, and some 50 "
        "MiB are within what a replay does not tell."
    )
    heads = (
        "run",
        "allocated, measured>",
        "replayed>",
        "retries, measured>",
        "replayed>",
        "to spare as it was, MiB>",
        "to spare today>",
        "on a card since",
    )
    return f"## Replayed without a card\n\n{told}\n\n{table(heads, rows)}"
