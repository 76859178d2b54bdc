"""The work of a training step with nothing switched on: FLOPs of its products, bytes of everything between them."""

from __future__ import annotations

from planner.ledger import Phase, Resource, Work
from planner.symbols import Letters, Number, least


def tokens(x: Letters) -> Number:
    """Tokens in one micro-batch."""
    return x.B * x.S


def linear_forward_flops(x: Letters) -> Number:
    """Two FLOPs for each weight, adapters included, and each token."""
    return 2 * tokens(x) * x.L * (x.P + x.R * x.U)


def linear_backward_flops(x: Letters) -> Number:
    """Gradient of the inputs through base and adapters, and of the adapters themselves; the base is frozen.

    Approximate: counts the gradient of the first layer's input, which nobody needs and autograd leaves out.
    """
    return 2 * tokens(x) * x.L * (x.P + 2 * x.R * x.U)


def pairs_twice(x: Letters) -> Number:
    """Twice the pairs of a token with itself and those before it that it sees, each pair once, over all layers.

    S (S + 1) / 2 in a layer. Where a window is shorter than that, tokens beyond it see as many as it is long; stored
    scores are computed for all pairs whatever the window is.
    """
    banded, seen = x.l * (1 - x.e), least(x.s, x.S)
    return (x.L - banded) * x.S * (x.S + 1) + banded * seen * (2 * x.S + 1 - seen)


def attention_forward_flops(x: Letters) -> Number:
    """Two products over the pairs that are seen.

    Kernels compute whole tiles on the diagonal and eager attention every pair: their rates count these pairs alone.
    """
    return 2 * x.B * x.H * x.E * pairs_twice(x)


def attention_backward_flops(x: Letters) -> Number:
    """Five products over the same pairs, one of them the scores again."""
    return 5 * x.B * x.H * x.E * pairs_twice(x)


def elementwise_forward_bytes(x: Letters) -> Number:
    """Bytes that norms, rotary embedding, activation functions and sums move in one forward pass.

    Approximate: counted for a gated layer with F = 4 D, 55 bytes for each element of width F in 16 bits, and
    taken as proportional to F elsewhere; the share of the bandwidth in ``calibration.yaml`` is fitted on top.
    """
    return 55 * tokens(x) * x.L * x.F * x.a // 16


def elementwise_backward_bytes(x: Letters) -> Number:
    """The same in the backward pass, which moves twice as many."""
    return 2 * elementwise_forward_bytes(x)


def head_flops(x: Letters) -> Number:
    """Logits and the gradient of the hidden states, for every token."""
    return 4 * tokens(x) * x.V * x.D


WORK: tuple[Work, ...] = (
    Work("linear/forward", linear_forward_flops, Resource.LINEAR, Phase.FORWARD, "linears of the layers"),
    Work("linear/backward", linear_backward_flops, Resource.LINEAR, Phase.BACKWARD, "gradients of the linears"),
    Work("attention/forward", attention_forward_flops, Resource.ATTENTION, Phase.FORWARD, "attention"),
    Work(
        "attention/backward",
        attention_backward_flops,
        Resource.ATTENTION,
        Phase.BACKWARD,
        "gradient of attention",
    ),
    Work(
        "elementwise/forward",
        elementwise_forward_bytes,
        Resource.MEMORY,
        Phase.FORWARD,
        "norms, activations, sums",
    ),
    Work(
        "elementwise/backward",
        elementwise_backward_bytes,
        Resource.MEMORY,
        Phase.BACKWARD,
        "gradients of the same",
    ),
    Work("head/both", head_flops, Resource.LINEAR, Phase.LOSS, "output head, forward and backward"),
)
