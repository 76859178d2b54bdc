"""Let the second matrix of each adapter learn faster than the first (LoRA+).

The first matrix begins at random and the second at zero, and in wide models the second has to move further for both to
learn the same amount. ``train.lr`` is the rate of the first one, and the second learns ``ratio`` times as fast. The
paper finds up to twice the speed of convergence, which depends on the task; here it has not been measured. It takes no
memory: moments are as many, in two groups.
"""

from __future__ import annotations

from planner.optimizations.base import Evidence, Knob, Needs, Optimization
from planner.optimizations.item import Claimed
from planner.session import Session


class LoraPlus(Optimization):
    """A higher learning rate for the matrices that begin at zero."""

    id = "lora_plus"
    title = "a higher rate for the second matrix of each adapter (LoRA+)"
    claimed = (
        Claimed(
            13,
            "2x faster convergence",
            "not shown",
            "The paper that is named has up to twice. At a rate that was the best without it, what is learnt is worse "
            "with each of three seeds, in the trainings of reports/optimizations.md. Beside the same it is better with "
            "two of three seeds at a quarter of that rate, and at a tenth worse again, both by little.",
        ),
    )
    asked = True
    requires = (Needs("adapters/weights", "it is their rate that differs"),)
    knobs = (
        Knob(
            "ratio",
            "how many times as fast as the first matrix the second learns",
            lambda _: (16.0,),
            low=1.0,
            high=1024.0,
            whole=False,
        ),
    )
    evidence = (
        Evidence("rates that differ by the width let both matrices learn", "Hayou et al. 2024, arXiv 2402.12354"),
        Evidence("groups of parameters by peft.optimizers.create_loraplus_optimizer", "trainer/optimizers.py"),
        Evidence("three steps are those of AdamW with two rates", "tests/test_trainer_rates.py"),
    )
    exact = False
    effect = "the second matrix of each adapter learns faster"

    def apply(self, session: Session) -> None:
        """Set the ratio."""
        session.use_loraplus(ratio=float(session.knob("ratio")))
