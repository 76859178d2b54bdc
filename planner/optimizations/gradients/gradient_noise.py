"""Add noise to the gradients, less with every step.

Its variance is ``variance`` over (1 + steps done) to the power ``decay``: by itself a share of each matrix's own mean
square gradient, with ``kind=absolute`` the number itself, as its paper has it. Gradients of adapters are small, so the
paper's 0.01 drowns them: trainings that had it learnt less than a quarter as much (reports/optimizations.md).

It comes after the loss scale is taken off and before gradients are clipped. The noise of a step follows from the seed
and the step alone, so that a run which goes on has the same. Shown for very deep networks with SGD; Adam divides
gradients by their size, noise and all, and what it is worth for LoRA nobody has shown. It is made a mebibyte at a time,
which is left out of what a step takes.
"""

from __future__ import annotations

from planner.launches import gradient_noise, relative_noise
from planner.ledger import Ledger, Phase, Resource, Work
from planner.optimizations.base import Evidence, Knob, Knobs, Needs, Optimization, Situation
from planner.optimizations.item import Claimed
from planner.session import Session


class GradientNoise(Optimization):
    """Noise on the gradients that fades."""

    id = "gradient_noise"
    title = "noise on the gradients, less with every step"
    claimed = (
        Claimed(
            24,
            "an escape from sharp minima",
            "not shown",
            "With the noise of its paper what is learnt is worse with each of three seeds, in the trainings of "
            "reports/optimizations.md: it drowns the gradients. With a share of them, the default, it makes no "
            "difference to speak of.",
        ),
    )
    asked = True
    adds = frozenset({"gradients/noise"})
    requires = (Needs("gradients/adapters", "it is they that get the noise"),)
    knobs = (
        Knob("kind", "relative: variance is a share of a matrix's mean square gradient; absolute: a number of its own",
             lambda _: ("relative", "absolute"), before="absolute"),
        Knob("variance", "of the noise of the first step", lambda _: (0.01,), low=0.0, high=100.0, whole=False),
        Knob("decay", "power of the steps by which the variance falls", lambda _: (0.55,), low=0.0, high=10.0,
             whole=False),
    )  # fmt: skip
    evidence = (
        Evidence("noise that fades", "Neelakantan et al. 2015, arXiv 1511.06807"),
        Evidence("its variance is that of the definition", "tests/test_trainer_gradients.py"),
    )
    exact = False
    effect = "noise is added to the gradients"

    def rewrite(self, ledger: Ledger, knobs: Knobs, situation: Situation) -> Ledger:
        """What it does matrix by matrix, the host launches."""
        launches = relative_noise if knobs["kind"] == "relative" else gradient_noise
        return ledger.with_work(
            Work("gradients/noise", launches, Resource.LAUNCH, Phase.OPTIMIZER, "noise is made and added")
        )

    def apply(self, session: Session) -> None:
        """Add the noise."""
        session.add_gradient_noise(
            variance=float(session.knob("variance")),
            decay=float(session.knob("decay")),
            relative=session.knob("kind") == "relative",
        )
