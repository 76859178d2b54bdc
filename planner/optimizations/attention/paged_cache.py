"""A cache of keys and values in pages, as a server has it.

Training keeps no cache: keys and values of one layer at a time are live. In evaluation neither. `plan generate` writes
one text at a time, whose cache has its exact size from the start (`planner.generating`): pages share memory out among
texts of which nobody knows how long they become.
"""

from __future__ import annotations

from planner.optimizations.base import Evidence, Situation
from planner.optimizations.item import Claimed, Given, State


class PagedCache(Given):
    """Pages of a cache that training does not have."""

    id = "paged_cache"
    title = "a paged cache of keys and values"
    claimed = (
        Claimed(
            40,
            "0.12 GB, 50 % less fragmentation",
            "does not hold",
            "0 GB: training keeps no cache, and neither does evaluation. `plan generate` takes the exact size of its "
            "cache at once, so that nothing is left for pages to save.",
        ),
    )
    evidence = (
        Evidence("pages make a server's cache dense", "Kwon et al. 2023, arXiv 2309.06180"),
        Evidence("no cache is made in training or evaluation", "tests/test_trainer_loading.py"),
        Evidence("a cache takes what is planned, counted on the CPU", "tests/test_generating.py"),
    )

    def state(self, situation: Situation) -> tuple[State, str]:
        """Never: there is no cache."""
        return "never", "training and evaluation keep no cache"
