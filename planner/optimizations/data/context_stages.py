"""Training that begins with short sequences and goes on to long ones, with a plan for each stage.

The peak would be that of the longest stage, so it would save time and no memory. Until it is there, a run of short
sequences and one of long ones can be planned and made one after the other, each by its own plan.
"""

from __future__ import annotations

from planner.optimizations.base import Evidence
from planner.optimizations.item import Claimed, NotYet


class ContextStages(NotYet):
    """Sequences that grow from stage to stage."""

    id = "context_stages"
    title = "sequences that grow from stage to stage"
    claimed = (
        Claimed(
            18,
            "5–10 % faster convergence",
            "not shown",
            "No trainings in both orders are recorded.",
        ),
        Claimed(
            44,
            "40 % faster",
            "not shown",
            "As many tokens in each stage are estimated to take 59 % less time than all at the longest; whether "
            "as much is learned is not shown.",
        ),
    )
    evidence = (Evidence("short sequences first, in pre-training", "Li et al. 2021, arXiv 2108.06084"),)
    missing = "a run has sequences of one length"
