"""Optimiser states and gradients shared out over several cards (ZeRO-2), or moved to the host.

On one card there is nothing to share out. Moving states to the host would move those of the adapters, which are some
megabytes, and DeepSpeed's buckets take a gigabyte by default.
"""

from __future__ import annotations

from planner.optimizations.base import Evidence, Situation
from planner.optimizations.item import Claimed, Given, State


class Zero2(Given):
    """States shared out over cards, of which there is one."""

    id = "zero2"
    title = "states and gradients shared out over cards (ZeRO-2)"
    claimed = (
        Claimed(
            3,
            "optimiser and gradients in host memory",
            "does not hold",
            "One card has nothing to share out; what could be moved are the adapters' states and gradients, and "
            "DeepSpeed's buckets would take more than that.",
        ),
    )
    evidence = (
        Evidence("states and gradients over data-parallel ranks", "Rajbhandari et al. 2019, arXiv 1910.02054"),
        Evidence("reduce_bucket_size is 5e8 elements", "deepspeed 0.19.8, runtime/zero/config.py"),
    )

    def state(self, situation: Situation) -> tuple[State, str]:
        """Never: a plan is for one card."""
        return "never", "a plan is for one card, and one card has nothing to share out"
