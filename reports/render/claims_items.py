"""The numbered items of the claims document beside what stands for each of them here."""

from __future__ import annotations

from planner.markdown import table
from planner.optimizations import all_items, all_optimizations
from planner.optimizations.item import NUMBERED, Item


def items() -> str:
    """A row for each item and each optimisation that realises it, from what its class says of itself."""
    rows = []
    for number in range(1, NUMBERED + 1):
        for each in all_items().values():
            rows += [
                (str(number), _named(each), one.words, one.true, f"**{one.verdict}**")
                for one in each.claimed
                if one.number == number
            ]
    return table(("item>", "here", "claimed", "true", "verdict"), rows)


def _named(each: Item) -> str:
    if each.id in all_optimizations():
        return f"[`{each.id}`](../docs/optimizations/{each.id}.md)"
    return f"`{each.id}` (no plan's choice)"
