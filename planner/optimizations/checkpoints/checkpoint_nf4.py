"""Hold the kept layer inputs in four bits (NF4), 64 elements sharing a float32 scale: two bytes become 0.56.

The forward pass goes on with the input as it is; the backward pass computes the layer again from the rounded one. So
loss and outputs are exact and gradients are not: they are those of a layer at a point nearby. On real weights that is a
third off, so it is on only where it is asked for; eight bits with spacing take little more host memory.
"""

from __future__ import annotations

from planner.ledger import Ledger
from planner.optimizations.base import Evidence, Knobs, Needs, Optimization, Situation
from planner.optimizations.checkpoints.coding import WholeBlocks
from planner.optimizations.item import Claimed
from planner.session import Session


class CheckpointNf4(Optimization):
    """Four bits for each element of the kept layer inputs."""

    id = "checkpoint_nf4"
    title = "kept layer inputs in four bits (NF4)"
    claimed = (
        Claimed(
            38,
            "1.44 GB less by activations in 4 bits",
            "does not hold",
            "Nothing of the card: what is kept of the layers lies in host memory, where 42.9 GB become 12.1 GB, "
            "and gradients are other ones.",
        ),
    )
    claims = frozenset({"letter b_c"})
    requires = (
        Needs("buffers/staging", "only streamed layers write their inputs down in another form"),
        WholeBlocks(),
    )
    evidence = (
        Evidence("compressed activations and gradients nearby", "Liu et al. 2022, GACT, arXiv 2206.11357"),
        Evidence("error of hidden states and gradients, on real weights", "tests/streamed/test_coding.py"),
    )
    exact = False
    harm = 2  # eight bits changed nothing in trainings, and these a little (reports/optimizations.md)
    asked = True
    effect = (
        "every layer input is rounded to four bits before its layer is computed again; "
        "gradients of SmolLM2-135M are 35 % off"
    )

    def letters(self, situation: Situation, knobs: Knobs) -> dict[str, int]:
        """Bits of 64 elements and their scale."""
        return {"b_c": 64 * 4 + 32}

    def rewrite(self, ledger: Ledger, knobs: Knobs, situation: Situation) -> Ledger:
        """All follows from the letter b_c."""
        return ledger

    def apply(self, session: Session) -> None:
        """Write layer inputs down in this form."""
        session.code_checkpoints("nf4")
