"""Scale adapters by alpha over the square root of the rank, not over the rank (rsLoRA).

Divided by the rank, a fixed alpha makes the adapters' part smaller as the rank grows, until high ranks learn no more
than low ones; an alpha of twice the rank, as ``lora.alpha`` is here unless it is set, makes it too large instead.
Divided by the root of the rank it stays as it is. With this, ``lora.alpha`` is 6 unless it is set: at rank 8 that
scales by 2.1, about as without it; at rank 2 by 4.2 and at rank 64 by 0.75, where without it both are scaled by 2. It
takes nothing.
"""

from __future__ import annotations

from planner.optimizations.base import Evidence, Needs, Optimization
from planner.optimizations.item import Claimed
from planner.session import Session


class RsLora(Optimization):
    """Adapters scaled by alpha over the square root of their rank."""

    id = "rslora"
    title = "adapters scaled by the root of their rank (rsLoRA)"
    claimed = (
        Claimed(
            8,
            "optimal convergence",
            "not shown",
            "The paper that is named is about training from nothing. With alpha over the root of the rank, higher "
            "ranks learn as fast as lower ones. At a rate that was the best without it, what is learnt is "
            "worse with each of three seeds, in the trainings of reports/optimizations.md.",
        ),
    )
    asked = True
    requires = (Needs("adapters/weights", "it is they that are scaled"),)
    evidence = (
        Evidence("the scale at which ranks learn alike", "Kalajdzievski 2023, arXiv 2312.03732"),
        Evidence("PEFT's LoraConfig(use_rslora=True)", "trainer/loading.py"),
        Evidence("the scale, the saved adapter and the merged model", "tests/test_trainer_rates.py"),
    )
    exact = False
    effect = "adapters are scaled by alpha over the root of their rank"

    def apply(self, session: Session) -> None:
        """Scale by the root."""
        session.use_rslora()
