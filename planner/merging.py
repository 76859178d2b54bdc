"""The terms of merging the adapters into the weights: a whole 16-bit model, written matrix by matrix.

What a run holds stays where it is. Beside it there are some rows of a matrix in float32 on the card, and in the host
the file that is being written. Without ``train.merge`` every term is 0.
"""

from __future__ import annotations

from planner.baseline_formulas import embedding, head, linear_weights, norms_and_biases, one_byte
from planner.ledger import Basis, Device, Phase, Term
from planner.symbols import Letters, Number, greatest, least
from planner.units import GIB

BLOCK = 2**22
"""Elements that are merged at a time, in whole rows of a matrix."""
FILE = GIB
"""Bytes of one file of weights; a tensor that is larger has a file of its own."""
WHILE_MERGING = frozenset({Phase.MERGE})


def sixteen(x: Letters) -> Number:
    """Bits of a merged weight."""
    return 16


def merged_weights(x: Letters) -> Number:
    """Every weight of the model, its norms and biases too; a tied head is written once."""
    return x.X * (linear_weights(x) + embedding(x) + head(x) + norms_and_biases(x))


def merged_rows(x: Letters) -> Number:
    """Bytes of some rows: in float32, with the adapters' product added in place, and rounded to 16 bits."""
    return x.X * 6 * least(x.M, BLOCK)


def merged_file(x: Letters) -> Number:
    """Elements of the file that is being written: the model, if it is less; a tensor, if it is more."""
    largest = greatest(x.V * x.D, x.M)
    return least(merged_weights(x), x.X * greatest(FILE // 2, largest))


def dequantised_to_merge(x: Letters) -> Number:
    """Bytes of the largest matrix, dequantised to 16 bits as in training."""
    return x.X * 2 * x.M


TERMS: tuple[Term, ...] = (
    Term(
        "buffers/merging",
        merged_rows,
        one_byte,
        WHILE_MERGING,
        "rows of a matrix while the adapters' product is added",
        "trainer/merging.py",
    ),
    Term(
        "buffers/merged_file",
        merged_file,
        sixteen,
        WHILE_MERGING,
        "the file of merged weights that is being written",
        "trainer/merging.py; safetensors from 0.8 on writes tensors from where they lie",
        device=Device.HOST,
    ),
    Term(
        "weights/merged",
        merged_weights,
        sixteen,
        WHILE_MERGING,
        "the model with merged adapters",
        "shapes of the modules in transformers",
        device=Device.DISK,
        basis=Basis.EXACT,
    ),
)

DEQUANTISED = Term(
    "buffers/merging_dequantised",
    dequantised_to_merge,
    one_byte,
    WHILE_MERGING,
    "a matrix in 16 bits, dequantised to be merged",
    "trainer/merging.py",
)
