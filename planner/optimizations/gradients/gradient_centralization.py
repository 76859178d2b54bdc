"""Take the mean of each row off the gradients of the first matrix of each adapter.

What that takes of independent entries is one part in the length of a row. Rows of the second matrix are as short as the
rank, so that it would lose all of its gradient at rank 1 and half at rank 2: that one is left as it is. Shown for
convolutional networks; what it is worth for LoRA is not measured.
"""

from __future__ import annotations

from planner.launches import centralization
from planner.ledger import Ledger, Phase, Resource, Work
from planner.optimizations.base import Evidence, Knobs, Needs, Optimization, Situation
from planner.optimizations.item import Claimed
from planner.session import Session


class GradientCentralization(Optimization):
    """Gradients of first matrices without the mean of their rows."""

    id = "gradient_centralization"
    title = "first matrices' gradients without the mean of their rows"
    claimed = (
        Claimed(
            25,
            "faster convergence",
            "does not hold",
            "Of LoRA's second matrix it would take away much, so it is done to the first alone. In the trainings of "
            "reports/optimizations.md there is no difference beyond chance.",
        ),
    )
    asked = True
    adds = frozenset({"gradients/means"})
    requires = (Needs("gradients/adapters", "it is they that are centralised"),)
    evidence = (
        Evidence("gradients without their mean", "Yong et al. 2020, arXiv 2004.01461"),
        Evidence("rows of first matrices sum to zero, second ones stay", "tests/test_trainer_gradients.py"),
    )
    exact = False
    effect = "the mean of each row is taken off gradients of first matrices"

    def rewrite(self, ledger: Ledger, knobs: Knobs, situation: Situation) -> Ledger:
        """What it does matrix by matrix, the host launches."""
        return ledger.with_work(
            Work("gradients/means", centralization, Resource.LAUNCH, Phase.OPTIMIZER, "means of rows are taken off")
        )

    def apply(self, session: Session) -> None:
        """Take the means off."""
        session.centralize_gradients()
