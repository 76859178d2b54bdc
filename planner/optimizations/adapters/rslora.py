"""Scale adapters by alpha over the square root of the rank, not over the rank (rsLoRA).

Divided by the rank, the adapters' part shrinks as the rank grows, and so do its gradients: high ranks learn no more
than low ones. Divided by its root they stay as large. Where ``lora.alpha`` is left open it is 6, so that at rank 8 both
ways scale by about 2. A rule of the rate for ranks, not for batches; it takes nothing.
"""

from __future__ import annotations

from planner.ledger import Ledger
from planner.optimizations.base import Evidence, Knobs, Needs, Optimization, Situation
from planner.session import Session


class RsLora(Optimization):
    """Adapters scaled by alpha over the square root of their rank."""

    id = "rslora"
    title = "adapters scaled by the root of their rank (rsLoRA)"
    numbers = (8,)
    asked = True
    requires = (Needs("adapters/weights", "it is they that are scaled"),)
    evidence = (
        Evidence("the scale at which ranks learn alike", "Kalajdzievski 2023, arXiv 2312.03732"),
        Evidence("PEFT's LoraConfig(use_rslora=True)", "trainer/loading.py"),
        Evidence("the scale, the saved adapter and the merged model", "tests/test_trainer_rates.py"),
    )
    exact = False
    effect = "adapters are scaled by alpha over the root of their rank"

    def rewrite(self, ledger: Ledger, knobs: Knobs, situation: Situation) -> Ledger:
        """Nothing changes: one number for another."""
        return ledger

    def apply(self, session: Session) -> None:
        """Scale by the root."""
        session.scale_by_root_of_rank()
