"""Buffers of one size for a whole run, in segments that grow.

Gradients, staging and chunks of the streamed executor keep their buffers from the first step to the last, and torch's
allocator is told to let segments grow (``expandable_segments``). A pool taken beforehand would defeat the latter.
"""

from __future__ import annotations

from planner.optimizations.base import Evidence, Situation
from planner.optimizations.item import Claimed, Given, State


class FixedBuffers(Given):
    """Buffers that stay, and expandable segments."""

    id = "fixed_buffers"
    title = "buffers that stay, and segments that grow"
    claimed = (
        Claimed(
            31,
            "prevents fragmentation",
            "in part",
            "It keeps reserved memory near what is allocated, which the bound counts on; a pool taken beforehand "
            "would be in its way.",
        ),
    )
    evidence = (
        Evidence("expandable segments before torch is loaded", "docs/decisions.md"),
        Evidence("reserved against allocated in recorded runs", "docs/validation.md"),
    )

    def state(self, situation: Situation) -> tuple[State, str]:
        """Always on a card."""
        if situation.gpu.kind == "gpu":
            return "always", "the bound on what is reserved rests on it"
        return "never", "a matter of a card's allocator"
