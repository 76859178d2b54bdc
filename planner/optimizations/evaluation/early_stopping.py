"""End training once the held-out loss has stopped falling, and go back to the adapters that had the least.

The held-out rows are evaluated every ``train.evaluate_every`` steps, ten times in a run where that is 0. After
``patience`` evaluations in a row of which none was better by ``threshold`` of the loss, training ends. The adapters
with the least loss are on disk then, and are what is saved and evaluated in the end, however training ended.

With a schedule that falls to its end, a run that is stopped never gets there: a plan warns of it.
"""

from __future__ import annotations

from planner.ledger import Basis, Device, Ledger, Phase, Term
from planner.optimizations.adapters.lora import adapter_parameters, float32
from planner.optimizations.base import Evidence, Knob, Knobs, Needs, Optimization, Situation
from planner.optimizations.item import Claimed
from planner.session import Session
from planner.symbols import Letters, Number


def _best_and_next(x: Letters) -> Number:
    return 2 * adapter_parameters(x)


class EarlyStopping(Optimization):
    """Training ends with the held-out loss."""

    id = "early_stopping"
    title = "training ends once the held-out loss stops falling"
    claimed = (
        Claimed(
            20,
            "prevents overfitting",
            "not shown",
            "It ends a run whose held-out loss rises, and goes back to where that was least; what held-out documents "
            "do not show, it does not see.",
        ),
    )
    asked = True
    makes = frozenset({"adapters/best"})
    requires = (Needs("adapters/weights", "it is the adapters that are gone back to"),)
    knobs = (
        Knob("patience", "evaluations in a row that may be no better", lambda _: (3,), low=1, high=1000),
        Knob(
            "threshold",
            "share of the loss that is better",
            lambda _: (0.001,),
            low=0.0,
            high=0.5,
            whole=False,
        ),
    )
    evidence = (
        Evidence("when to stop", "Prechelt 1998, Early Stopping – But When?"),
        Evidence("it stops when it says and goes back to the best", "tests/test_trainer_judging.py"),
    )
    exact = False
    effect = "training may end before its last step, and the best adapters are saved"

    def rewrite(self, ledger: Ledger, knobs: Knobs, situation: Situation) -> Ledger:
        """The best adapters on disk, and for a moment the next ones."""
        return ledger.with_terms(
            Term(
                "adapters/best",
                _best_and_next,
                float32,
                frozenset({Phase.SAVE}),
                "the adapters with the least held-out loss, and those that take their place",
                "trainer/judging.py",
                device=Device.DISK,
                basis=Basis.EXACT,
            )
        )

    def apply(self, session: Session) -> None:
        """Go by the evaluations."""
        session.stop_early(patience=int(session.knob("patience")), threshold=float(session.knob("threshold")))
