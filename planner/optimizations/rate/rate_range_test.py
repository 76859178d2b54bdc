"""Try learning rates from small to large before training, and train by half of the one that brought the loss lowest.

``steps`` steps are made on the run's first rows, the rate each time as many times the one before, from ``low`` to
``high``; it ends early where the loss diverges. Losses of two batches differ by more than a step can change them, so
each is set against that of the same batch before any step, which takes a forward pass more. Then adapters, optimiser
and loss scale are what they were: a copy of the adapters in host memory is all it takes. The rate found is the highest
of the run's schedule, ``train.lr`` stays where the loss never falls, and ``rate_search.svg`` in the run's folder shows
the curve. The result belongs to this model, these data, this batch and this optimiser.

Where the loss is lowest is nearly the same rate whichever rows come first; where it falls steepest, ``rule=steepest``,
is another with each, and several times too small for a whole run (reports/optimizations.md, with trainings by it).

Approximate: the time of the test is in no time of the plan, which warns of it. Nothing of it is stored before it ends.
"""

from __future__ import annotations

from planner.ledger import Basis, Device, Ledger, Phase, Term
from planner.optimizations.adapters.lora import adapter_parameters, float32
from planner.optimizations.base import Evidence, Knob, Knobs, Needs, Optimization, Situation
from planner.optimizations.item import Claimed
from planner.session import Session


class RateRangeTest(Optimization):
    """The learning rate by a range test."""

    id = "rate_range_test"
    title = "the learning rate by a range test"
    claimed = (
        Claimed(
            21,
            "finds the optimal learning rate",
            "not shown",
            "It finds a rate that lowers the loss in a few steps. Beside the best of six rates that were tried, what "
            "is learnt by it is worse with each of three seeds, in the trainings of reports/optimizations.md: by a "
            "little with half of the rate at which the loss is least, by more with the one where it falls steepest.",
        ),
    )
    asked = True
    claims = frozenset({"setting rate"})
    makes = frozenset({"adapters/before_search"})
    requires = (Needs("adapters/weights", "it is their rate"),)
    knobs = (
        Knob("rule", "half_least: half the rate at which the loss is least; steepest: where it falls most",
             lambda _: ("half_least", "steepest"), before="steepest"),
        Knob("steps", "steps of the test", lambda _: (100,), low=3, high=100_000),
        Knob("low", "the first rate", lambda _: (1e-6,), low=1e-12, high=1.0, whole=False),
        Knob("high", "the last rate", lambda _: (0.1,), low=1e-9, high=100.0, whole=False),
    )  # fmt: skip
    evidence = (
        Evidence("a range of rates in one run", "Smith 2015, arXiv 1506.01186"),
        Evidence(
            "it puts back what it changes, and finds the places of known curves", "tests/test_trainer_rate_search.py"
        ),
    )
    exact = False
    effect = "the learning rate is found by a test before training"

    def rewrite(self, ledger: Ledger, knobs: Knobs, situation: Situation) -> Ledger:
        """A copy of the adapters while it is tried."""
        return ledger.with_terms(
            Term(
                "adapters/before_search",
                adapter_parameters,
                float32,
                frozenset({Phase.FORWARD, Phase.LOSS, Phase.BACKWARD, Phase.OPTIMIZER}),
                "the adapters as they were before the range test",
                "trainer/rate_search.py",
                device=Device.HOST,
                basis=Basis.EXACT,
            )
        )

    def settings(self, situation: Situation, knobs: Knobs) -> dict[str, str]:
        """It has the highest rate."""
        return {"rate": self.id}

    def apply(self, session: Session) -> None:
        """Search before training."""
        session.search_rate(
            steps=int(session.knob("steps")),
            low=float(session.knob("low")),
            high=float(session.knob("high")),
            rule=str(session.knob("rule")),
        )
