"""What of a layer's adapters depends on each matrix by itself, not on their sum: how eight-bit optimisers hold them."""

from __future__ import annotations

from collections import Counter

from planner.model_shape import ModelShape
from planner.symbols import Number

LEAST_EIGHT_BIT = 4096
"""Elements of a matrix from which on bitsandbytes holds its moments in eight bits (``min_8bit_size``)."""
BLOCK = 256
"""Elements of a moment that share one scale."""


def adapter_letters(model: ModelShape, rank: Number) -> dict[str, Number]:
    """The letters that follow from the rank: R, M_b and M_s. A whole number, or an array of them, as the rank is.

    Every adapted linear has a matrix of R × inputs and one of outputs × R.
    """
    widths = Counter(width for linear in model.linears for width in (linear.inputs, linear.outputs))
    small: Number = 0
    blocks: Number = 0
    for width, count in widths.items():
        elements = rank * width
        small = small + count * elements * (elements < LEAST_EIGHT_BIT)
        blocks = blocks + count * -(-elements // BLOCK) * (elements >= LEAST_EIGHT_BIT)
    return {"R": rank, "M_s": small, "M_b": blocks}
