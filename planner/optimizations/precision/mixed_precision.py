"""Hold frozen weights and activations in 16 bits; adapters, their gradients and states stay in float32.

bfloat16 where the card computes in it, float16 with a loss scaler elsewhere (Turing has no bfloat16 units). The
small adapter matrices are cast to 16 bits at each use, and those casts are saved for the backward pass.
"""

from __future__ import annotations

from planner.baseline import SAVED
from planner.ledger import Ledger, Term
from planner.optimizations.base import Capability, Evidence, Knob, Knobs, Needs, Optimization, Situation
from planner.session import Session
from planner.symbols import Letters, Number


def casts(x: Letters) -> Number:
    """16-bit copies of the adapters of every layer whose saved tensors live."""
    return x.A * x.R * x.U


def sixteen(x: Letters) -> Number:
    """Bits of a 16-bit element."""
    return 16


def _dtypes(situation: Situation) -> tuple[str, ...]:
    return ("bfloat16", "float16") if situation.gpu.supports_bf16 else ("float16",)


class MixedPrecision(Optimization):
    """16-bit frozen weights and activations under float32 adapters."""

    id = "mixed_precision"
    title = "16-bit compute, float32 adapters"
    numbers = (5,)
    claims = frozenset({"letter a", "letter w", "setting dtype"})
    makes = frozenset({"adapters/casts"})
    requires = (
        Capability((7, 0), "16-bit matrix units begin with Volta"),
        Needs("adapters/weights", "the float32 adapters are what keeps small updates from being lost"),
    )
    knobs = (Knob("dtype", "bfloat16, or float16 with a loss scaler", _dtypes),)
    evidence = (
        Evidence("float16 with loss scaling", "Micikevicius et al. 2017, arXiv 1710.03740"),
        Evidence("Turing has no bfloat16 units", "NVIDIA Turing whitepaper; hwprofiles/rtx2060s.yaml"),
    )
    exact = False
    effect = "frozen weights and activations are rounded to 16 bits"

    def letters(self, situation: Situation, knobs: Knobs) -> dict[str, int]:
        """Sixteen bits for activations and for weights that are not quantised."""
        return {"a": 16, "w": 16}

    def settings(self, situation: Situation, knobs: Knobs) -> dict[str, str]:
        """The dtype that matrix rates are looked up by."""
        return {"dtype": {"bfloat16": "bf16", "float16": "fp16"}[str(knobs["dtype"])]}

    def rewrite(self, ledger: Ledger, knobs: Knobs, situation: Situation) -> Ledger:
        """Adds the adapters' casts; all else follows from the letters a and w."""
        return ledger.with_terms(
            Term(
                "adapters/casts",
                casts,
                sixteen,
                SAVED,
                "16-bit copies of adapters saved for the backward pass",
                "trainer/adapters.py, adapted_forward",
            )
        )

    def apply(self, session: Session) -> None:
        """Compute in 16 bits; float16 needs its loss scaled."""
        dtype = str(session.knob("dtype"))
        assert dtype in ("bfloat16", "float16")
        session.compute_in("float16" if dtype == "float16" else "bfloat16", scale_loss=dtype == "float16")
