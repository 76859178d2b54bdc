"""Hold the weights of the layers' linears in four bits (NF4) with doubly quantised constants.

A block of 64 weights shares one scale; the scales themselves are held in eight bits, 256 of them sharing one
float32. Each use dequantises one matrix into a passing buffer, in 16 bits or, where a card or a model has no 16-bit
compute, in 32. Experts are no linears and stay as they are. Costs: the weights are rounded once, and every pass reads
four bits and writes sixteen or more.

What is learnt is less with it (reports/optimizations.md). So a plan for the longest context has it where a longer tier
fits by it, or where a step takes more than 1.25 times as long without; one for speed or for memory as it finds it.
"""

from __future__ import annotations

from planner import merging
from planner.baseline_formulas import eager_backward_bytes, mlp_gradient_tensors
from planner.launches import FOUR_BIT, chunks, linears_between
from planner.ledger import ALWAYS, Basis, Ledger, Phase, Resource, Term, Work
from planner.optimizations.base import Capability, Evidence, Knobs, Needs, Optimization, Situation
from planner.optimizations.item import Claimed
from planner.session import Session
from planner.streamed_memory import projected_width
from planner.symbols import Letters, Number, ceil_div, greatest, least

BLOCK, NESTED_BLOCK = 64, 256
TABLE_BYTES = 16 * 4 + 256 * 4 + 4  # NF4 code, code of the nested scales, offset: kept by every linear


def four_bits(x: Letters) -> Number:
    """Bits of one weight."""
    return 4


def constants(x: Letters) -> Number:
    """Scales of 64 weights in a byte, scales of 256 scales in float32, and the tables of every linear."""
    scales = ceil_div(x.L * x.P, BLOCK)
    return scales + 4 * ceil_div(scales, NESTED_BLOCK) + x.L * x.J * TABLE_BYTES


def dequantised(x: Letters) -> Number:
    """Bytes of the largest matrix in the compute dtype, as far as it stands above what follows it.

    While it is alive there is a tensor of width F fewer than at the height of the forward pass; so for more than M/F
    tokens at once that height hides it.
    """
    return greatest(x.a // 8 * (x.M - least(x.B * x.S, x.S_c) * x.F), 0)


def dequantised_backward(x: Letters) -> Number:
    """The same in the backward pass, where it may stand beside as many tensors as there are at its height.

    Beside the last linear's matrix, of D x F elements, are the two gradients of its input, and its output's where that
    is scaled before it is added. That is a tensor fewer than at the height where that has two more than what is saved.
    Of what the MLP saves nothing is left when the largest
    matrix is read, which may be that of gate and up projection in one. Stored scores may hide either. Experts stay as
    they are.
    """
    chunk = least(x.B * x.S, x.S_c)
    width = chunk * x.F
    last = (1 - least(x.d, 1)) * (x.D * x.F + x.j_r * chunk * x.D - (mlp_gradient_tensors(x) - 1) * width)
    return greatest(x.a // 8 * greatest(last, x.M - x.f * width) - x.e * eager_backward_bytes(x), 0)


def loading(x: Letters) -> Number:
    """The matrix being quantised, in the compute dtype, and its scales; gone before adapters and gradients come."""
    return greatest(x.a // 8 * x.M + 4 * ceil_div(x.M, BLOCK) - 8 * x.L * x.R * x.U, 0)


def dequantised_once(x: Letters) -> Number:
    """Four bits read, an element of the compute dtype written and read by the product, and so for each chunk."""
    return _dequantised(x, x.P)


def _dequantised(x: Letters, weights: Number) -> Number:
    """The same of so many weights of a layer."""
    return ceil_div(x.B * x.S, least(x.B * x.S, x.S_c)) * x.L * weights * (4 + 2 * x.a) // 8


def dequantised_in_backward(x: Letters) -> Number:
    """Once for the gradients, once more where the layer is recomputed, and those before attention twice in passes."""
    return (1 + x.p) * dequantised_once(x) + x.l_r * _dequantised(x, x.D * projected_width(x))


def launched_once(x: Letters) -> Number:
    """Kernels that dequantise every linear of a layer, for each layer and chunk."""
    return chunks(x) * x.L * x.J * FOUR_BIT


def launched_in_backward(x: Letters) -> Number:
    """The same as often as they are dequantised then."""
    return chunks(x) * x.L * ((1 + x.p) * x.J + x.l_r * linears_between(x)) * FOUR_BIT


class Nf4Weights(Optimization):
    """NF4 weights with double quantisation (QLoRA): 0.516 bytes a weight instead of two."""

    id = "nf4_weights"
    title = "4-bit NF4 weights, double quantisation"
    claimed = (
        Claimed(
            6,
            "1.26 GB less than 8 bits",
            "holds",
            "1.22 GB with the scales counted: 2.52 GB less 1.30 GB.",
        ),
    )
    claims = frozenset({"weights/linear.bits"})
    makes = frozenset(
        {
            "weights/constants",
            "buffers/dequantised",
            "buffers/dequantised_backward",
            "buffers/loading",
            merging.DEQUANTISED.name,
        }
    )
    adds = frozenset(f"dequantise{what}/{way}" for what in ("", "_launches") for way in ("forward", "backward"))
    requires = (
        Capability((6, 0), "bitsandbytes builds its 4-bit kernels for it"),
        Needs("adapters/weights", "4-bit weights cannot be trained themselves"),
    )
    evidence = (
        Evidence("NF4 and double quantisation", "Dettmers et al. 2023, arXiv 2305.14314"),
        Evidence(
            "1,824,899,584 bytes for Phi-2, the rest in 16 bits",
            "reported by a GPU; tests/test_static_bytes.py",
        ),
    )
    exact = False
    effect = "weights are rounded to four bits"
    # Trainings of a small model lost a quarter of what they had gained (reports/optimizations.md): more than all else
    # that a plan may choose unasked takes of it.
    harm = 10
    worth = 1.25

    def rewrite(self, ledger: Ledger, knobs: Knobs, situation: Situation) -> Ledger:
        """Four bits a weight, plus constants and buffers."""
        source = "bitsandbytes 0.50, functional.quantize_4bit and autograd MatMul4Bit"
        return (
            ledger.claimed("weights/linear", bits=four_bits)
            .with_terms(
                merging.DEQUANTISED,
                Term(
                    "weights/constants",
                    constants,
                    eight,
                    ALWAYS,
                    "scales and tables of NF4",
                    source,
                    basis=Basis.EXACT,
                ),
                Term(
                    "buffers/dequantised",
                    dequantised,
                    eight,
                    frozenset({Phase.FORWARD, Phase.EVALUATE}),
                    "a matrix in the compute dtype, where nothing larger follows it",
                    source,
                ),
                Term(
                    "buffers/dequantised_backward",
                    dequantised_backward,
                    eight,
                    frozenset({Phase.BACKWARD}),
                    "the same beside the gradients of its linear's input",
                    source,
                ),
                Term(
                    "buffers/loading",
                    loading,
                    eight,
                    frozenset({Phase.LOAD}),
                    "a matrix while it is quantised",
                    source,
                ),
            )
            .with_work(
                Work(
                    "dequantise/forward",
                    dequantised_once,
                    Resource.MEMORY,
                    Phase.FORWARD,
                    "weights to the compute dtype",
                ),
                Work(
                    "dequantise/backward",
                    dequantised_in_backward,
                    Resource.MEMORY,
                    Phase.BACKWARD,
                    "weights to the compute dtype again",
                ),
                Work(
                    "dequantise_launches/forward",
                    launched_once,
                    Resource.LAUNCH,
                    Phase.FORWARD,
                    "kernels that do so",
                ),
                Work(
                    "dequantise_launches/backward",
                    launched_in_backward,
                    Resource.LAUNCH,
                    Phase.BACKWARD,
                    "kernels that do so",
                ),
            )
        )

    def apply(self, session: Session) -> None:
        """Load the linears of the layers as NF4."""
        session.store_weights("nf4", double_quantization=True)


def eight(x: Letters) -> Number:
    """Bits of a byte."""
    return 8
