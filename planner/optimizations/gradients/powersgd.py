"""Gradients sent between cards as products of two thin matrices (PowerSGD).

It makes what is sent smaller, not what is held: what a product leaves out is kept for the next step, as large as the
gradients. One card sends nothing, and LoRA's matrices are as thin as the products would be.
"""

from __future__ import annotations

from planner.optimizations.base import Evidence, Situation
from planner.optimizations.item import Claimed, Given, State


class PowerSgd(Given):
    """Compressed communication of gradients, of which one card has none."""

    id = "powersgd"
    title = "compressed gradients between cards (PowerSGD)"
    claimed = (
        Claimed(
            39,
            "0.79 GB, 320x",
            "does not hold",
            "It takes memory instead of saving any. All gradients together are 0.024 GB at rank 4, 0.047 GB at "
            "rank 8, and one card sends none.",
        ),
    )
    evidence = (
        Evidence("low-rank compression of what is sent, with error feedback", "Vogels et al. 2019, arXiv 1905.13727"),
        Evidence("what it holds on two ranks, and that adapters are not compressed", "tests/test_powersgd.py"),
    )

    def state(self, situation: Situation) -> tuple[State, str]:
        """Never: a plan is for one card."""
        return "never", "one card sends no gradients, and adapters are thinner than what would be sent"
