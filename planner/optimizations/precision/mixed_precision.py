"""Hold frozen weights and activations in 16 bits; adapters, their gradients and states stay in float32.

bfloat16 where the card computes in it, float16 with a loss scaler elsewhere (Turing has no bfloat16 units). The
small adapter matrices are cast to 16 bits at each use, and those casts are saved for the backward pass.
"""

from __future__ import annotations

from planner.baseline import SAVED
from planner.ledger import Ledger, Term
from planner.optimizations.base import Capability, Evidence, Knob, Knobs, Needs, Optimization, Situation
from planner.optimizations.item import Claimed
from planner.session import Session
from planner.symbols import Letters, Number


def casts(x: Letters) -> Number:
    """16-bit copies of the adapters of every layer whose saved tensors live."""
    return x.A * x.R * x.U


def sixteen(x: Letters) -> Number:
    """Bits of a 16-bit element."""
    return 16


# Queries and keys of these families are large; transformers' own attention multiplies them in 16 bits before it
# scales them, which passes 65,504. Kernels that never write the scores keep them in float32.
SCORES_OVERFLOW = frozenset({"phi"})
# Activations of these pass it wherever they are.
ACTIVATIONS_OVERFLOW = frozenset({"gemma3_text"})


def _dtypes(situation: Situation) -> tuple[str, ...]:
    half = () if _overflowing(situation) else ("float16",)
    return ("bfloat16", *half) if situation.gpu.supports_bf16 else half


def _overflowing(situation: Situation) -> str:
    """What overflows float16 in the set that is looked at; empty where nothing does."""
    family = situation.model.model_type
    if family in ACTIVATIONS_OVERFLOW:
        return f"activations of {situation.model.id} overflow float16"
    unstored = ("exact_attention", "streamed")
    stored = bool(situation.chosen) and not any(name in situation.chosen for name in unstored)
    if stored and family in SCORES_OVERFLOW:
        return f"the scores of {situation.model.id} overflow float16 without exact_attention"
    return ""


class _HasDtype:
    """Needs a 16-bit number type that the model can be computed in."""

    text = (
        f"bfloat16, or float16 without overflow, which {' and '.join(sorted(ACTIVATIONS_OVERFLOW))} always has, and "
        f"{' and '.join(sorted(SCORES_OVERFLOW))} with stored scores"
    )

    def reasons(self, situation: Situation) -> tuple[str, ...]:
        """Names what overflows."""
        if _dtypes(situation):
            return ()
        return (f"{_overflowing(situation)}, and {situation.gpu.name} has no bfloat16",)


class MixedPrecision(Optimization):
    """16-bit frozen weights and activations under float32 adapters."""

    id = "mixed_precision"
    title = "16-bit compute, float32 adapters"
    claimed = (
        Claimed(
            5,
            "2x faster compute",
            "in part",
            "Of the rate of 32 bits, 16 bits reach at most 4.0 times on RTX 2060 SUPER, which has no BF16, and "
            "2.0 times on RTX 3090 and RTX 4090.",
        ),
    )
    claims = frozenset({"letter a", "letter w", "letter h", "setting dtype"})
    makes = frozenset({"adapters/casts"})
    requires = (
        Capability((7, 0), "16-bit matrix units begin with Volta"),
        Needs("adapters/weights", "the float32 adapters are what keeps small updates from being lost"),
        _HasDtype(),
    )
    knobs = (Knob("dtype", "bfloat16, or float16 with a loss scaler", _dtypes, names=("bfloat16", "float16")),)
    evidence = (
        Evidence("float16 with loss scaling", "Micikevicius et al. 2017, arXiv 1710.03740"),
        Evidence("Phi-2's attention overflows in float16", "https://huggingface.co/microsoft/phi-2, known issues"),
        Evidence("Gemma 3 overflows in float16", "https://github.com/huggingface/transformers/issues/36822"),
        Evidence("Turing has no bfloat16 units", "NVIDIA Turing whitepaper; hwprofiles/rtx2060s.yaml"),
    )
    exact = False
    effect = "frozen weights and activations are rounded to 16 bits (and scores, where they are stored, kept twice)"

    def letters(self, situation: Situation, knobs: Knobs) -> dict[str, int]:
        """Sixteen bits for activations and for weights that are not quantised."""
        return {"a": 16, "w": 16, "h": int(knobs["dtype"] == "float16")}

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
