"""The size of 4-bit weights, computed.

That is no saving of its own: what is held in 4 bits and what is not follows from the model's shapes, and
`nf4_weights` holds it so.
"""

from __future__ import annotations

from planner.optimizations.base import Evidence, Situation
from planner.optimizations.item import Claimed, Given, State


class FourBitSize(Given):
    """The bytes of 4-bit weights by formula, which `nf4_weights` saves."""

    id = "four_bit_size"
    title = "the size of 4-bit weights, computed"
    claimed = (
        Claimed(
            11,
            "1.26 GB unlocked",
            "does not hold",
            "0 GB: it is item 6 counted again. Scales, embeddings, head, norms and biases are counted beside the "
            "4 bits.",
        ),
    )
    again = "nf4_weights"
    evidence = (
        Evidence(
            "bytes of weights follow from their shapes",
            "terms weights/linear, weights/constants, weights/embedding and weights/head",
        ),
    )

    def state(self, situation: Situation) -> tuple[State, str]:
        """Never: it is a figure, and no code."""
        return "never", "a figure: weights/linear and weights/constants are its formulas, and nf4_weights is what saves"
