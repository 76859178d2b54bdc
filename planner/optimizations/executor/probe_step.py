"""One step at the longest row before training, on real weights, which is undone.

It loads kernels and libraries, so the first step does not, and its peak is held against the plan's bound before hours
are spent.
"""

from __future__ import annotations

from planner.optimizations.base import Evidence, Situation
from planner.optimizations.item import Claimed, Given, State


class ProbeStep(Given):
    """The first step is taken before training, as a measurement."""

    id = "probe_step"
    title = "a probe step before training, which warms up"
    claimed = (
        Claimed(
            30,
            "500 ms off the first step",
            "in part",
            "In 23 resident runs the first step took 310 to 3,013 ms longer than the median; the probe pays that "
            "earlier, and saves none of it.",
        ),
    )
    evidence = (
        Evidence("the probe leaves adapters, optimiser and random numbers as they were", "tests/test_trainer_run.py"),
        Evidence("its peak is held against the bound", "trainer/probing.py"),
    )

    def state(self, situation: Situation) -> tuple[State, str]:
        """Always."""
        return "always", "it measures the peak before anything is trained"
