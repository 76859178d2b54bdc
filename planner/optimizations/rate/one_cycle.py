"""Let the learning rate rise for a part of the run and fall far below its beginning after it (one cycle).

It begins at ``train.lr`` over ``rise``, reaches ``train.lr`` after ``share`` of the steps and ends at its beginning
over ``fall``, both ways along a cosine. ``train.warmup`` has no part in it. Fewer steps by large rates were shown for
convolutional networks with SGD; for LoRA nobody has shown it. Adam's momentum stays: cycling it as well is for SGD.
"""

from __future__ import annotations

from planner.optimizations.base import Evidence, Knob, Knobs, Needs, Optimization, Situation
from planner.optimizations.item import Claimed
from planner.session import Session


class OneCycle(Optimization):
    """One rise and one fall of the learning rate."""

    id = "one_cycle"
    title = "one cycle of the learning rate"
    claimed = (
        Claimed(
            12,
            "10–20 % faster than a cosine",
            "does not hold",
            "It was shown for convolutional networks. In the trainings of reports/optimizations.md what is learnt is "
            "worse with each of three seeds, by little.",
        ),
    )
    asked = True
    claims = frozenset({"setting schedule"})
    requires = (Needs("adapters/weights", "it is their rate"),)
    knobs = (
        Knob("share", "share of the steps in which it rises", lambda _: (0.3,), low=0.01, high=0.99, whole=False),
        Knob("rise", "how many times the rate of the first step the highest is", lambda _: (25.0,), low=1.0, high=1e6,
             whole=False),
        Knob("fall", "how many times the rate of the last step that of the first is", lambda _: (1e4,), low=1.0,
             high=1e9, whole=False),
    )  # fmt: skip
    evidence = (
        Evidence("one cycle with large rates", "Smith and Topin 2017, arXiv 1708.07120"),
        Evidence("the trace is that of torch's OneCycleLR", "tests/test_trainer_rates.py"),
    )
    exact = False
    effect = "the learning rate goes through one cycle"

    def settings(self, situation: Situation, knobs: Knobs) -> dict[str, str]:
        """It is the schedule."""
        return {"schedule": self.id}

    def apply(self, session: Session) -> None:
        """Be the schedule."""
        session.schedule_rate("one_cycle", {name: float(session.knob(name)) for name in ("share", "rise", "fall")})
