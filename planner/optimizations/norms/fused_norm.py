"""Compute RMSNorm in one operation instead of eight.

transformers writes RMSNorm out: a cast to float32, a square, a mean, a root, products, a cast back. Its backward pass
is fourteen kernels (``planner.launches``), and the float32 copy of the norm's input is saved for it.
``torch.nn.functional.rms_norm`` is one kernel each way on a card. It saves its input as it is, which is the layer's own
input or a sum that is there anyway, and one float32 number for each token. It rounds once, after the weight, where
Llama's norm rounds before it as well.
"""

from __future__ import annotations

from planner.ledger import Ledger
from planner.optimizations.base import Evidence, Knobs, OnCard, Optimization, Situation
from planner.optimizations.item import Claimed
from planner.session import Session


class _HasWrittenOutNorm:
    """Needs a model whose norms are RMSNorm with a plain weight."""

    text = "a model whose norms are RMSNorm and multiply by their weight"

    def reasons(self, situation: Situation) -> tuple[str, ...]:
        """Names what the model has instead."""
        model = situation.model
        if model.norm != "rmsnorm":
            return (f"{model.id} has LayerNorm, which is one operation already",)
        if model.norm_one_plus:
            return (f"{model.id} multiplies by one plus the weight in float32, for which there is no one operation",)
        return ()


class FusedNorm(Optimization):
    """The same norm in one operation, which saves no float32 copy."""

    id = "fused_norm"
    title = "RMSNorm in one operation"
    claimed = (
        Claimed(
            41,
            "0.50 GB by one kernel for norm, attention and MLP",
            "does not hold",
            "No such kernel exists. Phi-2, of which it is claimed, has LayerNorm, which is one operation already; "
            "where a model has RMSNorm, that is one operation, too.",
        ),
    )
    free = True
    claims = frozenset({"letter Q"})
    requires = (
        OnCard("on the CPU torch computes it in as many operations as transformers does"),
        _HasWrittenOutNorm(),
    )
    evidence = (
        Evidence(
            "one kernel each way on CUDA, with its input and one number for each row saved", "torch 2.11, rms_norm"
        ),
        Evidence("the same function and gradient, to 1e-10 in float64", "tests/test_fused_norm.py"),
        Evidence("bytes of every phase, against the trainer's own step", "tests/test_memory_on_fake_tensors.py"),
        Evidence("bytes and seconds of a step on an H200, with it and without", "reports/optimizations.md"),
    )

    def letters(self, situation: Situation, knobs: Knobs) -> dict[str, int]:
        """No norm is written out."""
        return {"Q": 0}

    def rewrite(self, ledger: Ledger, knobs: Knobs, situation: Situation) -> Ledger:
        """All follows from the letter Q."""
        return ledger

    def apply(self, session: Session) -> None:
        """Give the model's norms the one operation."""
        session.fuse_norms()
