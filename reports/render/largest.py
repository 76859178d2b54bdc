"""For reports/optimizations.md: as many optimisations at once as can be, for four cards, run on one of them."""

from __future__ import annotations

import json
from functools import cache

from planner.markdown import gib, percent, table
from planner.measurements import Record
from planner.optimizations import all_optimizations
from reports.validation.largest import CARDS, LARGEST, MODEL, TOKENS
from reports.validation.measure import HERE

FOLDER = HERE / "largest"


@cache
def found() -> dict[str, Record]:
    """The records, by card."""
    places = {card: FOLDER / f"{case.name}.json" for card, case in zip(CARDS, LARGEST, strict=True)}
    return {
        card: Record(place.stem, json.loads(place.read_text(encoding="utf-8")))
        for card, place in places.items()
        if place.exists()
    }


def items_of(record: Record) -> int:
    """How many of the numbered items the optimisations of a run realise."""
    on = {choice["id"] for choice in record.content["plan"]["choices"]}
    return len({number for name, each in all_optimizations().items() if name in on for number in each.numbers})


def section() -> str:
    """What each took, beside its plan."""
    records = found()
    if not records:
        return ""
    on = {len(record.content["plan"]["choices"]) for record in records.values()}
    items = {items_of(record) for record in records.values()}
    within = sum(record.over <= 0 for record in records.values())
    told = (
        f"{_span(on)} optimisations, which realise {_span(items)} of the numbered items, were on at once in {MODEL} at "
        f"{TOKENS:,} tokens ([`largest.py`](validation/largest.py); "
        "`python -m reports.validation.several OUT --largest`; "
        "records in [`validation/largest`](validation/largest)): as many as can be, which "
        "[`planner/sets.py`](../planner/sets.py) finds. One H200 ran them, in place of other cards with their memory, "
        f"number format and kernel. {within} of {len(records)} stayed within the bound. Bytes are GiB."
    )
    rows = [
        (
            card,
            str(len(record.content["plan"]["choices"])),
            gib(record.expected),
            gib(record.allocated),
            percent(record.error),
            gib(record.predicted["high_bytes"]),
            gib(record.reserved),
            str(len(record.content["losses"])),
        )
        for card, record in records.items()
    ]
    heads = ("card", "on>", "expected>", "allocated>", "error>", "bound>", "reserved>", "steps>")
    return f"## All that can be on\n\n{told}\n\n{table(heads, rows)}"


def _span(counts: set[int]) -> str:
    least, most = min(counts), max(counts)
    return f"{least}" if least == most else f"{least} to {most}"
