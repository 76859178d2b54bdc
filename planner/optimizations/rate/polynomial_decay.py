"""Let the learning rate fall to its end by a power of the steps that are left.

After ``train.warmup`` it is ``end`` of ``train.lr`` and the rest times the share of the steps that are left, to the
``power``: 1 is a straight line, 2 falls fast at first.
"""

from __future__ import annotations

from planner.optimizations.base import Evidence, Knob, Knobs, Needs, Optimization, Situation
from planner.optimizations.item import Claimed
from planner.session import Session


class PolynomialDecay(Optimization):
    """A learning rate that falls by a power of what is left."""

    id = "polynomial_decay"
    title = "polynomial decay of the learning rate"
    claimed = (
        Claimed(
            29,
            "another schedule",
            "holds",
            "It is one, beside cosine, linear, constant, one cycle and warm-up, stable, decay. In the trainings of "
            "reports/optimizations.md what is learnt is worse with each of three seeds; a linear schedule is the best.",
        ),
    )
    asked = True
    claims = frozenset({"setting schedule"})
    requires = (Needs("adapters/weights", "it is their rate"),)
    knobs = (
        Knob("power", "of the share of the steps that is left", lambda _: (2.0,), low=0.1, high=20.0, whole=False),
        Knob("end", "share of train.lr that is left at the end", lambda _: (0.0,), low=0.0, high=1.0, whole=False),
    )
    evidence = (Evidence("the trace is that of transformers' polynomial schedule", "tests/test_trainer_rates.py"),)
    exact = False
    effect = "the learning rate falls by a power of the steps that are left"

    def settings(self, situation: Situation, knobs: Knobs) -> dict[str, str]:
        """It is the schedule."""
        return {"schedule": self.id}

    def apply(self, session: Session) -> None:
        """Be the schedule."""
        session.schedule_rate("polynomial_decay", {name: float(session.knob(name)) for name in ("power", "end")})
