"""A factor by which an estimate of attention's memory is multiplied.

Nothing is switched on by it: memory is counted by the formulas of the terms in `attention/` instead
(``plan explain attention/scores``).
"""

from __future__ import annotations

from planner.optimizations.base import Evidence, Situation
from planner.optimizations.item import Claimed, Given, State


class AttentionFactor(Given):
    """A constant of an estimate, in place of which stand formulas."""

    id = "attention_factor"
    title = "a factor for the memory of attention"
    claimed = (
        Claimed(
            10,
            "0.4 to 0.25, 10–15 % more context",
            "does not hold",
            "A smaller constant in an estimate frees nothing. 0.4 to 0.25 would be 37.5 % less, and item 1 is the "
            "same saving again.",
        ),
    )
    again = "exact_attention"
    evidence = (
        Evidence(
            "memory of attention follows from its shapes", "terms attention/scores, attention/lse and attention/qkv"
        ),
        Evidence("formulas against recorded runs", "docs/validation.md"),
    )

    def state(self, situation: Situation) -> tuple[State, str]:
        """Never: it is a figure, and no code."""
        return "never", "a figure of an estimate: the formulas of attention are in its place"
