"""Let the learning rate follow the rows of a step: by their square root, the rule for Adam.

``train.lr`` is then the rate for ``rows`` rows in a step, and a step of batch times accumulation rows gets it times the
root of how many times as many those are. Adam divides gradients by their own size, so that what a larger batch takes
off their noise counts by its root; the linear rule is that of SGD, which nothing here trains with.
"""

from __future__ import annotations

from planner.optimizations.base import Evidence, Knob, Knobs, Needs, Optimization, Situation
from planner.optimizations.item import Claimed
from planner.session import Session


class BatchRate(Optimization):
    """The learning rate times the square root of the rows of a step."""

    id = "batch_rate"
    title = "learning rate by the square root of the rows of a step"
    claimed = (
        Claimed(
            8,
            "optimal convergence",
            "not shown",
            "The paper that is named is about training from nothing. With Adam a rate goes by the square root of "
            "the batch, as a rule of thumb: at a rate that was the best without it, what is learnt is worse with each "
            "of three seeds, in the trainings of reports/optimizations.md.",
        ),
    )
    asked = True
    claims = frozenset({"setting rate"})
    requires = (Needs("adapters/weights", "it is their rate"),)
    knobs = (Knob("rows", "rows of a step for which train.lr was chosen", lambda _: (1,), low=1, high=65_536),)
    evidence = (
        Evidence("the root for adaptive optimisers", "Malladi et al. 2022, arXiv 2205.10287"),
        Evidence("four times the rows, twice the rate", "tests/test_trainer_rates.py"),
    )
    exact = False
    effect = "the learning rate grows with the rows of a step"

    def settings(self, situation: Situation, knobs: Knobs) -> dict[str, str]:
        """It has the highest rate."""
        return {"rate": self.id}

    def apply(self, session: Session) -> None:
        """Set the rows that the rate is for."""
        session.rate_for_rows(rows=int(session.knob("rows")))
