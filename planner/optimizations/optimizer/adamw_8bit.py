"""Hold the two moments of AdamW in eight bits, 256 elements sharing one scale.

Approximate: adapter matrices below 4,096 elements stay in float32 in the library; they are counted as eight-bit
here, which is short by less than 32 KiB for each such matrix.
"""

from __future__ import annotations

from planner.ledger import ALWAYS, Basis, Ledger, Phase, Term
from planner.optimizations.base import Capability, Evidence, Knobs, Optimization, Situation
from planner.session import Session
from planner.symbols import Letters, Number, ceil_div

BLOCK = 256


def two_bytes(x: Letters) -> Number:
    """Bits of two eight-bit moments."""
    return 16


def scales(x: Letters) -> Number:
    """One float32 for 256 elements of each moment, and the two code tables each matrix refers to."""
    return 2 * ceil_div(x.L * x.R * x.U, BLOCK)


def float32(x: Letters) -> Number:
    """Bits of a float32 element."""
    return 32


class AdamW8bit(Optimization):
    """AdamW with eight-bit moments: about two bytes a trained parameter instead of eight."""

    id = "adamw_8bit"
    title = "8-bit AdamW moments"
    numbers = (2,)
    claims = frozenset({"optimizer/state.bits"})
    makes = frozenset({"optimizer/scales"})
    requires = (Capability((6, 0), "bitsandbytes builds its optimiser kernels for it"),)
    evidence = (
        Evidence("block-wise eight-bit states", "Dettmers et al. 2021, arXiv 2110.02861"),
        Evidence("2.13 bytes a parameter counted on real tensors", "tests/test_static_bytes.py"),
    )
    exact = False
    effect = "moments are rounded to eight bits"

    def rewrite(self, ledger: Ledger, knobs: Knobs, situation: Situation) -> Ledger:
        """Two bytes a parameter, plus scales."""
        return ledger.claimed("optimizer/state", bits=two_bytes).with_terms(
            Term(
                "optimizer/scales",
                scales,
                float32,
                ALWAYS - {Phase.LOAD},
                "scales of the eight-bit moments",
                "bitsandbytes 0.50, optim.AdamW8bit",
                basis=Basis.DERIVED,
            )
        )

    def apply(self, session: Session) -> None:
        """Update the adapters with the eight-bit optimiser."""
        session.optimize_with("adamw_8bit")
