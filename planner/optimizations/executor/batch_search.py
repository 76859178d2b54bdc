"""A search for the largest micro-batch by bisection, on the card, from the plan's own estimate.

The length of a sequence needs none: it is solved for by formula (``plan --gpu ID``), and a step of the largest batch is
run before training. ``train.batch`` is set by hand, and the plan says what it takes.
"""

from __future__ import annotations

from planner.optimizations.base import Evidence
from planner.optimizations.item import Claimed, NotYet


class BatchSearch(NotYet):
    """The largest micro-batch, searched for on the card."""

    id = "batch_search"
    title = "a search for the largest micro-batch"
    claimed = (
        Claimed(
            7,
            "4–8x potential speedup",
            "not shown",
            "The longest sequence is found exactly by formula. For rows in a batch the estimated gain is 1.00 to "
            "1.04 on RTX 2060 SUPER, by rates that do not depend on the batch.",
        ),
    )
    evidence = (
        Evidence(
            "halving a range is exact in few tries, shrinking by a tenth is not",
            "accelerate 1.15, utils/memory.py, find_executable_batch_size",
        ),
    )
    missing = "train.batch is set by hand, and the plan bounds what it takes"
