"""Keep an average of the adapters beside them, and evaluate and save that instead of the last step's.

``ema`` is the exponential moving average: after each step it moves towards the adapters by 1 - decay, and faster in the
first steps, so that a short run's average is not its beginning. ``swa`` is the plain mean over the last quarter of the
steps. It takes four bytes for each trained weight, on the card or in the host, and brings no length and no speed, so it
is on only where it is asked for. Averages of four-bit weights would be none: only adapters are averaged.

Approximate: with the averages in the host, the copy of the adapters after each step is left out of its time; and while
rows are judged between steps, a copy of the adapters in host memory is not counted.
"""

from __future__ import annotations

from planner.ledger import ALWAYS, Basis, Device, Ledger, Term
from planner.optimizations.adapters.lora import adapter_parameters, float32
from planner.optimizations.base import Evidence, Knob, Knobs, Needs, Optimization, Scalar, Situation
from planner.optimizations.item import Claimed
from planner.session import Session


def places(situation: Situation) -> tuple[Scalar, ...]:
    """Where a copy of the adapters may lie."""
    return ("gpu", "host") if situation.gpu.kind == "gpu" else ("gpu",)


def copy_of_adapters(knobs: Knobs, what: str, source: str) -> Term:
    """The term of a second set of adapters, which there is one of at most."""
    return Term(
        "averages/adapters",
        adapter_parameters,
        float32,
        ALWAYS,
        what,
        source,
        device=Device.HOST if knobs["place"] == "host" else Device.GPU,
        basis=Basis.EXACT,
    )


class WeightAveraging(Optimization):
    """An average of the adapters over the steps, which is what is evaluated and saved."""

    id = "weight_averaging"
    title = "average of the adapters over the steps"
    claimed = (
        Claimed(
            15,
            "1–2 % better model",
            "in part",
            "At a rate that stays constant what is learnt is better with each of three seeds, by a little more than a "
            "cosine gives; beside a cosine it is no better (trainings in reports/optimizations.md).",
        ),
        Claimed(
            22,
            "2–5 % better generalisation",
            "in part",
            "At a rate that stays constant what is learnt is better with each of three seeds, by a little more than a "
            "cosine gives; beside a cosine it is no better (trainings in reports/optimizations.md).",
        ),
    )
    asked = True
    makes = frozenset({"averages/adapters"})
    requires = (Needs("adapters/weights", "it is the adapters that are averaged"),)
    knobs = (
        Knob("kind", "ema, a moving average, or swa, the mean of the last quarter", lambda _: ("ema", "swa")),
        Knob(
            "decay",
            "share of the moving average that a step keeps",
            lambda _: (0.999,),
            low=0.5,
            high=0.999999,
            whole=False,
        ),
        Knob("place", "where the averages lie: gpu or host", places),
    )
    evidence = (
        Evidence("averages of the iterates", "Polyak and Juditsky 1992; Izmailov et al. 2018, arXiv 1803.05407"),
        Evidence("the average is that of its definition", "tests/test_trainer_averaging.py"),
    )
    exact = False
    effect = "an average of the adapters is saved instead of the last step's"

    def rewrite(self, ledger: Ledger, knobs: Knobs, situation: Situation) -> Ledger:
        """A copy of the adapters."""
        return ledger.with_terms(copy_of_adapters(knobs, "the averaged adapters", "trainer/averaging.py"))

    def apply(self, session: Session) -> None:
        """Keep the averages."""
        kind, place = str(session.knob("kind")), str(session.knob("place"))
        assert kind in ("ema", "swa") and place in ("gpu", "host")
        session.average_weights(
            kind="ema" if kind == "ema" else "swa",
            decay=float(session.knob("decay")),
            place="gpu" if place == "gpu" else "host",
        )
