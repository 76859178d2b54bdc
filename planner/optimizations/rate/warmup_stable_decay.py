"""Keep the learning rate as it is after warming up, and let it fall in the last part of the run alone (WSD).

Until the fall begins, nothing of a run depends on how long it is to be. It falls in a straight line to 0; where
warming up is not over when the fall begins, the lower of both rates is taken.
"""

from __future__ import annotations

from planner.optimizations.base import Evidence, Knob, Knobs, Needs, Optimization, Situation
from planner.optimizations.item import Claimed
from planner.session import Session


class WarmupStableDecay(Optimization):
    """A learning rate that stays, and falls at the end."""

    id = "warmup_stable_decay"
    title = "a learning rate that falls at the end alone (WSD)"
    claimed = (
        Claimed(
            29,
            "another schedule",
            "holds",
            "It is one, beside cosine, linear, constant, one cycle and polynomial decay. In the trainings of "
            "reports/optimizations.md what is learnt is worse with each of three seeds; a linear schedule is the best.",
        ),
    )
    asked = True
    claims = frozenset({"setting schedule"})
    requires = (Needs("adapters/weights", "it is their rate"),)
    knobs = (Knob("decay", "share of the steps in which it falls", lambda _: (0.2,), low=0.0, high=1.0, whole=False),)
    evidence = (
        Evidence("stable rates with a short decay", "Hu et al. 2024, arXiv 2404.06395"),
        Evidence("the trace is that of transformers' WSD schedule", "tests/test_trainer_rates.py"),
    )
    exact = False
    effect = "the learning rate stays until the last part of the run"

    def settings(self, situation: Situation, knobs: Knobs) -> dict[str, str]:
        """It is the schedule."""
        return {"schedule": self.id}

    def apply(self, session: Session) -> None:
        """Be the schedule."""
        session.schedule_rate("warmup_stable_decay", {"decay": float(session.knob("decay"))})
