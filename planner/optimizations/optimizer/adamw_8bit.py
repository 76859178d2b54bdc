"""Hold the two moments of AdamW in eight bits, 256 elements sharing one scale.

The library keeps the moments of a matrix with fewer than 4,096 elements in float32, as a small matrix gains nothing and
suffers most. It counts steps in Python, where AdamW of torch has a counter on the card for every matrix.
"""

from __future__ import annotations

from planner.ledger import ALWAYS, Basis, Ledger, Phase, Term
from planner.optimizations.base import Capability, Evidence, Knobs, Optimization, Situation
from planner.optimizations.item import Claimed
from planner.session import Session
from planner.symbols import Letters, Number, least

TABLES = 2 * 256  # numbers that stand for the 256 codes of each moment, once for all matrices


def moments(x: Letters) -> Number:
    """Bytes of two moments: one for each element, or four in a small matrix."""
    return x.L * (2 * (x.R * x.U - x.M_s) + 8 * x.M_s)


def eight(x: Letters) -> Number:
    """Bits of a byte."""
    return 8


def scales(x: Letters) -> Number:
    """A scale for each block of each moment, and the tables, where any matrix is large enough."""
    return 2 * x.L * x.M_b + TABLES * least(x.M_b, 1)


def float32(x: Letters) -> Number:
    """Bits of a float32 element."""
    return 32


def nothing(x: Letters) -> Number:
    """No element: steps are counted in Python."""
    return 0


class AdamW8bit(Optimization):
    """AdamW with eight-bit moments: about two bytes a trained parameter instead of eight."""

    id = "adamw_8bit"
    title = "8-bit AdamW moments"
    claimed = (
        Claimed(
            2,
            "75 % of the optimiser states",
            "holds",
            "74.6 % in a pair of recorded runs, 0.19 GB to 0.048 GB: the states are those of the adapters alone.",
        ),
    )
    claims = frozenset({"optimizer/state.count", "optimizer/state.bits", "optimizer/counters.count"})
    makes = frozenset({"optimizer/scales"})
    requires = (Capability((6, 0), "bitsandbytes builds its optimiser kernels for it"),)
    evidence = (
        Evidence("block-wise eight-bit states", "Dettmers et al. 2021, arXiv 2110.02861"),
        Evidence("every byte of the state counted on real tensors", "tests/test_static_bytes.py"),
    )
    exact = False
    effect = "moments are rounded to eight bits"

    def rewrite(self, ledger: Ledger, knobs: Knobs, situation: Situation) -> Ledger:
        """Two bytes a parameter but in small matrices, plus scales."""
        return (
            ledger.claimed("optimizer/state", count=moments, bits=eight)
            .claimed("optimizer/counters", count=nothing)
            .with_terms(
                Term(
                    "optimizer/scales",
                    scales,
                    float32,
                    ALWAYS - {Phase.LOAD},
                    "scales of the eight-bit moments, and the tables of their codes",
                    "bitsandbytes 0.50, optim.optimizer.Optimizer2State.init_state",
                    basis=Basis.EXACT,
                )
            )
        )

    def apply(self, session: Session) -> None:
        """Update the adapters with the eight-bit optimiser."""
        session.optimize_with("adamw_8bit")
