"""Let slow adapters follow the fast ones every few steps, and begin again from the slow (Lookahead).

The optimiser goes ``every`` steps ahead; then the slow adapters move by ``share`` of the way to where it came, and it
goes on from there, with the moments that it has. The slow ones are what is evaluated and saved, with the steps since
the last time taken in at the end of the run. It takes four bytes for each trained weight, on the card or in the host.
Of weights in four bits there is no slow copy: the adapters alone are trained.

Approximate: the copy is counted as if it were read and written in every step, and with it in the host the copy of the
adapters is left out of the time; and while rows are judged between steps, a copy of the adapters in host memory is not
counted.
"""

from __future__ import annotations

from planner.ledger import Ledger
from planner.optimizations.averages.weight_averaging import copy_of_adapters, places
from planner.optimizations.base import Evidence, Knob, Knobs, Needs, Optimization, Situation
from planner.optimizations.item import Claimed
from planner.session import Session


class Lookahead(Optimization):
    """Slow adapters that follow the optimiser's, from which it begins again."""

    id = "lookahead"
    title = "slow adapters that follow every few steps (Lookahead)"
    claimed = (
        Claimed(
            23,
            "better convergence",
            "does not hold",
            "It takes one more copy of the adapters, and what is learnt is worse with each of three seeds, in the "
            "trainings of reports/optimizations.md.",
        ),
    )
    asked = True
    makes = frozenset({"averages/adapters"})
    requires = (Needs("adapters/weights", "it is the adapters that are followed"),)
    knobs = (
        Knob("every", "steps that the optimiser goes ahead", lambda _: (5,), low=1, high=10_000),
        Knob("share", "of the way that the slow adapters follow", lambda _: (0.5,), low=0.01, high=1.0, whole=False),
        Knob("place", "where the slow adapters lie: gpu or host", places),
    )
    evidence = (
        Evidence("k steps forward, one step back", "Zhang et al. 2019, arXiv 1907.08610"),
        Evidence("slow and fast adapters are those of the definition", "tests/test_trainer_lookahead.py"),
    )
    exact = False
    effect = "the optimiser begins again from slow adapters every few steps"

    def rewrite(self, ledger: Ledger, knobs: Knobs, situation: Situation) -> Ledger:
        """A copy of the adapters."""
        return ledger.with_terms(copy_of_adapters(knobs, "the slow adapters", "trainer/lookahead.py"))

    def apply(self, session: Session) -> None:
        """Keep the slow adapters."""
        place = str(session.knob("place"))
        assert place in ("gpu", "host")
        session.look_ahead(
            every=int(session.knob("every")),
            share=float(session.knob("share")),
            place="gpu" if place == "gpu" else "host",
        )
