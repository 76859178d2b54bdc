"""Clip the gradient of each row of a matrix by the size of the row itself (AGC), in place of the norm of all.

A row's gradient may have ``ratio`` times the norm of the row, and no row counts as smaller than ``floor``: the second
matrices begin at zero and would never move without it. ``train.max_grad_norm`` has no part in it then. Shown for
networks without norms, trained with SGD.
"""

from __future__ import annotations

from planner.launches import row_clipping
from planner.ledger import Ledger, Phase, Resource, Work
from planner.optimizations.base import Evidence, Knob, Knobs, Needs, Optimization, Situation
from planner.optimizations.item import Claimed
from planner.session import Session


class AdaptiveClipping(Optimization):
    """Gradients clipped row by row, by the size of what they change."""

    id = "adaptive_clipping"
    title = "gradients clipped row by row (AGC)"
    claimed = (
        Claimed(
            34,
            "better stability",
            "not shown",
            "The first step of LoRA's second matrix would be clipped to nothing without a floor. In the trainings of "
            "reports/optimizations.md, none of which diverges without it, what is learnt is better with two of three "
            "seeds, by little.",
        ),
    )
    asked = True
    adds = frozenset({"gradients/clipped_rows"})
    claims = frozenset({"setting clipping"})
    requires = (Needs("gradients/adapters", "it is they that are clipped"),)
    knobs = (
        Knob("ratio", "norm of a row's gradient over that of the row, at most", lambda _: (0.01,), low=1e-6,
             high=100.0, whole=False),
        Knob("floor", "norm that no row counts as smaller than", lambda _: (1e-3,), low=1e-9, high=100.0, whole=False),
    )  # fmt: skip
    evidence = (
        Evidence("adaptive gradient clipping", "Brock et al. 2021, arXiv 2102.06171"),
        Evidence("each row is clipped by its definition", "tests/test_trainer_gradients.py"),
    )
    exact = False
    effect = "gradients are clipped row by row"

    def settings(self, situation: Situation, knobs: Knobs) -> dict[str, str]:
        """It is the clipping."""
        return {"clipping": self.id}

    def rewrite(self, ledger: Ledger, knobs: Knobs, situation: Situation) -> Ledger:
        """What it does matrix by matrix, the host launches."""
        return ledger.with_work(
            Work(
                "gradients/clipped_rows",
                row_clipping,
                Resource.LAUNCH,
                Phase.OPTIMIZER,
                "rows of gradients are clipped",
            )
        )

    def apply(self, session: Session) -> None:
        """Clip so."""
        session.clip_by_rows(ratio=float(session.knob("ratio")), floor=float(session.knob("floor")))
