"""Take the mean of each row off the gradients of the first matrix of each adapter.

Of the second matrix, whose rows are as short as the rank, it would take a large part: all of it at rank 1, half at rank
2. So that one is left as it is. Shown for convolutional networks; of a first matrix it takes less than a thousandth.
"""

from __future__ import annotations

from planner.ledger import Ledger
from planner.optimizations.base import Evidence, Knobs, Needs, Optimization, Situation
from planner.session import Session


class GradientCentralization(Optimization):
    """Gradients of first matrices without the mean of their rows."""

    id = "gradient_centralization"
    title = "first matrices' gradients without the mean of their rows"
    numbers = (25,)
    asked = True
    requires = (Needs("gradients/adapters", "it is they that are centralised"),)
    evidence = (
        Evidence("gradients without their mean", "Yong et al. 2020, arXiv 2004.01461"),
        Evidence("rows of first matrices sum to zero, second ones stay", "tests/test_trainer_gradients.py"),
    )
    exact = False
    effect = "the mean of each row is taken off gradients of first matrices"

    def rewrite(self, ledger: Ledger, knobs: Knobs, situation: Situation) -> Ledger:
        """Nothing changes: it happens in place."""
        return ledger

    def apply(self, session: Session) -> None:
        """Take the means off."""
        session.centralize_gradients()
