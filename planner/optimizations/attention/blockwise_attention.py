"""Compute attention exactly for some queries at a time, in plain products: for models whose scores are soft-capped.

Gemma 2 bends its scores by tanh before the softmax, which no kernel of torch does. The scores of a block of queries are
written out, used and thrown away; the backward pass computes them again. Memory is linear in the sequence, as with a
kernel; time is that of stored scores, since every step between the products goes through memory.
"""

from __future__ import annotations

from planner.expert_formulas import height
from planner.launches import BLOCK, BLOCK_BACKWARD
from planner.ledger import Ledger, Phase, Resource, Term, Work
from planner.optimizations.attention.exact_attention import EAGER, float32, grouped_inputs, log_sum_exp, nothing
from planner.optimizations.base import Evidence, Knobs, Optimization, Situation
from planner.optimizations.item import Claimed
from planner.session import Session
from planner.symbols import Letters, Number, ceil_div, greatest, least

SCORES = 2**24  # scores alive at once, of all heads; a row of each head at least


def block(x: Letters) -> Number:
    """Scores of one block of queries."""
    return least(x.B * x.H * x.S**2, greatest(SCORES, x.B * x.H * x.S))


def blocks(x: Letters) -> Number:
    """Blocks of queries in a layer."""
    height = greatest(least(x.S, SCORES // (x.B * x.H * x.S)), 1)
    return ceil_div(x.S, height)


def launches_forward(x: Letters) -> Number:
    """Kernels of the blocks of all layers."""
    return x.L * blocks(x) * BLOCK


def launches_backward(x: Letters) -> Number:
    """Kernels of their gradients, with the forward pass where that is repeated."""
    return x.L * blocks(x) * (BLOCK_BACKWARD + x.p * BLOCK)


def forward_bytes(x: Letters) -> Number:
    """Bytes of a block while attention runs without autograd, as far as they stand above the height of the MLP.

    Scores in float32, and first their product, then the weights, in the compute dtype. Query, key and value are there
    as well, twice while they are turned.
    """
    return greatest(block(x) * (64 - x.a) // 8 - _mlp(x), 0)


def _mlp(x: Letters) -> Number:
    return x.B * x.S * (height(x) - (x.H + 2 * x.K) * x.E) * x.a // 8


def backward_bytes(x: Letters) -> Number:
    """The same in the backward pass: the bent scores, the weights and their gradient, of which one in both types.

    The MLP's saved tensors and gradients are gone by then.
    """
    return greatest(block(x) * (128 - x.a) // 8 - x.B * x.S * (x.f + 2) * x.F * x.a // 8, 0)


def one_byte(x: Letters) -> Number:
    """Bits of a byte."""
    return 8


class _Capped:
    """Needs scores that no kernel computes."""

    text = "a model whose attention scores are soft-capped; for all others exact_attention has kernels"

    def reasons(self, situation: Situation) -> tuple[str, ...]:
        """Names the optimisation that has kernels for the model."""
        if situation.model.attention_softcap is None:
            return (f"{situation.model.id} caps no scores; exact_attention has kernels for it",)
        return ()


class BlockwiseAttention(Optimization):
    """Exact attention by blocks of queries, for soft-capped scores: memory linear in the sequence."""

    id = "blockwise_attention"
    title = "exact attention by blocks of queries, for soft-capped scores"
    claimed = (
        Claimed(
            1,
            "80 % of the memory of activations",
            "in part",
            "Where scores are capped no kernel can do it; blocks of queries keep what is live at a time small, "
            "and the rest is as with exact_attention.",
        ),
    )
    claims = frozenset(
        {"attention/scores.count", "attention/scores.bits", "attention/qkv.count"}
        | {f"{name}.count" for name in EAGER}
        | {"letter e", "setting attention"}
    )
    adds = frozenset({"blocks/launches_forward", "blocks/launches_backward"})
    makes = frozenset({"attention/block_forward", "attention/block_backward"})
    requires = (_Capped(),)
    evidence = (
        Evidence("exact attention in linear memory", "Rabe and Staats 2021, arXiv 2112.05682"),
        Evidence("equal to scores written out, in float64, with its gradients", "tests/test_block_attention.py"),
        Evidence("soft-capped scores", "Gemma Team 2024, arXiv 2408.00118"),
    )

    def letters(self, situation: Situation, knobs: Knobs) -> dict[str, int]:
        """No scores are stored."""
        return {"e": 0}

    def settings(self, situation: Situation, knobs: Knobs) -> dict[str, str]:
        """What attention rates are looked up by."""
        return {"attention": "blocks"}

    def rewrite(self, ledger: Ledger, knobs: Knobs, situation: Situation) -> Ledger:
        """No scores but those of a block; log-sum-exp instead; key and value are not repeated."""
        ledger = ledger.claimed("attention/scores", count=log_sum_exp, bits=float32)
        for name in EAGER:
            ledger = ledger.claimed(name, count=nothing)
        ledger = ledger.with_work(
            Work("blocks/launches_forward", launches_forward, Resource.LAUNCH, Phase.FORWARD, "kernels of the blocks"),
            Work(
                "blocks/launches_backward", launches_backward, Resource.LAUNCH, Phase.BACKWARD, "kernels of the blocks"
            ),
        )
        source = "trainer/block_attention.py"
        return ledger.claimed("attention/qkv", count=grouped_inputs).with_terms(
            Term(
                "attention/block_forward",
                forward_bytes,
                one_byte,
                frozenset({Phase.FORWARD, Phase.EVALUATE}),
                "scores of a block of queries",
                source,
            ),
            Term(
                "attention/block_backward",
                backward_bytes,
                one_byte,
                frozenset({Phase.BACKWARD}),
                "scores of a block of queries and their gradients",
                source,
            ),
        )

    def apply(self, session: Session) -> None:
        """Compute attention by blocks."""
        session.attend_with("blocks")
