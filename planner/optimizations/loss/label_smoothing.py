"""Train towards targets of which a small share is spread over the whole vocabulary (label smoothing).

The loss that is differentiated is (1 - share) of the cross-entropy and share times the mean over all tokens of the
vocabulary of what predicting each would cost. It is computed where a slice of the logits is there anyway, so that it
takes no memory: libraries that smooth a loss keep all logits for it. What is logged of training is the smoothed loss;
held-out rows are judged by the plain one. By that it is worse in every training here.
"""

from __future__ import annotations

from planner.elementwise import WIDE
from planner.ledger import Ledger, Phase, Resource, Work
from planner.optimizations.base import Evidence, Knob, Knobs, Needs, Optimization, Situation
from planner.optimizations.item import Claimed
from planner.session import Session
from planner.symbols import Letters, Number


def smoothed_bytes(x: Letters) -> Number:
    """Bytes of two more passes over the logits of trained tokens: read for their mean, and lowered by a share each."""
    return 3 * WIDE * x.B * x.T * x.V


class LabelSmoothing(Optimization):
    """Targets of which a share is spread over the vocabulary."""

    id = "label_smoothing"
    title = "targets spread over the vocabulary by a share"
    claimed = (
        Claimed(
            26,
            "less overconfidence",
            "not shown",
            "It is computed inside the slices of the loss, so it takes no logits. How sure a model is was not "
            "measured; by the plain loss of held-out rows it is worse with each of three seeds, in the trainings of "
            "reports/optimizations.md.",
        ),
    )
    asked = True
    adds = frozenset({"smoothing/both"})
    requires = (Needs("loss/gradient", "the loss is smoothed slice by slice, while its logits are there"),)
    knobs = (Knob("share", "of each target that is spread", lambda _: (0.1,), low=0.0, high=0.9, whole=False),)
    evidence = (
        Evidence("label smoothing", "Szegedy et al. 2015, arXiv 1512.00567"),
        Evidence("loss and gradients are those of torch's cross_entropy", "tests/test_trainer_loss.py"),
    )
    exact = False
    effect = "it is trained towards smoothed targets"

    def rewrite(self, ledger: Ledger, knobs: Knobs, situation: Situation) -> Ledger:
        """Two more passes over the slices of logits."""
        return ledger.with_work(
            Work(
                "smoothing/both",
                smoothed_bytes,
                Resource.MEMORY,
                Phase.LOSS,
                "mean of the logits, and their share of the gradient",
            )
        )

    def apply(self, session: Session) -> None:
        """Smooth the loss."""
        session.smooth_loss(share=float(session.knob("share")))
