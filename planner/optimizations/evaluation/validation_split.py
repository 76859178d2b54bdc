"""A share of the documents that is never trained on, taken out before they are cut or packed into rows.

``train.validation`` is the share. The held-out rows are evaluated before and after training, and every
``train.evaluate_every`` steps; what that takes of the card is in the plan.
"""

from __future__ import annotations

from planner.optimizations.base import Evidence, Situation
from planner.optimizations.item import Claimed, Given, State


class ValidationSplit(Given):
    """Held-out documents, and the memory of evaluating them."""

    id = "validation_split"
    title = "held-out documents, split off before rows are made"
    claimed = (
        Claimed(
            14,
            "10 %, unbiased evaluation",
            "holds",
            "10 % of the documents is the default, split off before rows are made; evaluating takes 1.67 GB of "
            "the card, training 5.02 GB.",
        ),
    )
    evidence = (
        Evidence("no document is on both sides", "tests/test_trainer_data.py"),
        Evidence("evaluation has phases of its own", "term activations/evaluation"),
    )

    def state(self, situation: Situation) -> tuple[State, str]:
        """Always."""
        return "always", "train.validation is the share of documents, 0 for none"
