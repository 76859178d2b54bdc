"""The work of a training step with nothing switched on: FLOPs of its products, bytes of everything between them."""

from __future__ import annotations

from planner import launches
from planner.elementwise import WIDE, after, after_backward, before, before_backward, narrow, norm, tables
from planner.ledger import Phase, Resource, Work
from planner.symbols import Letters, Number, least


def tokens(x: Letters) -> Number:
    """Tokens in one micro-batch."""
    return x.B * x.S


def active_weights(x: Letters) -> Number:
    """Weights of one layer that a token meets: linears, the scores of all experts, and the experts that it takes."""
    return x.P + x.X * x.D + 3 * x.d * x.D * x.F


def linear_forward_flops(x: Letters) -> Number:
    """Two FLOPs for each weight that a token meets, adapters included, and each token."""
    return 2 * tokens(x) * x.L * (active_weights(x) + x.R * x.U)


def linear_backward_flops(x: Letters) -> Number:
    """Gradient of the inputs through base and adapters, and of the adapters themselves; the base is frozen.

    Approximate: counts the gradient of the first layer's input, which nobody needs and autograd leaves out.
    """
    return 2 * tokens(x) * x.L * (active_weights(x) + 2 * x.R * x.U)


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
    """Bytes that norms, rotary embedding, activation functions, sums and adapters move in one forward pass.

    Those of the layers, of the embedding with its positions, and of the final norm.
    """
    return tokens(x) * (x.L * (before(x) + after(x)) + tables(x) + norm(x, x.D))


def elementwise_backward_bytes(x: Letters) -> Number:
    """The same in the backward pass; the final norm's takes the place of the first layer's, whose input needs none."""
    return tokens(x) * (x.L * (before_backward(x) + after_backward(x)) - 15 * x.D * x.a // 8)


def head_flops(x: Letters) -> Number:
    """Logits and the gradient of the hidden states, for every token."""
    return 4 * tokens(x) * x.V * x.D


def logits_bytes(x: Letters) -> Number:
    """Bytes that the loss moves over the logits of every token, between its two products.

    A cast to float32 and back, and what makes the softmax and its gradient of them; where they are capped, seven ops
    more. Approximate: as many as by slices, whose ops write in place. Of the runs of Phi-2 the one with this loss was
    the slower, by more than these.
    """
    return tokens(x) * x.V * (8 * WIDE + 2 * narrow(x) * (WIDE + x.a // 8) + 15 * WIDE * x.t)


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
    Work("logits/both", logits_bytes, Resource.MEMORY, Phase.LOSS, "from logits to the loss and back"),
    Work("launches/forward", launches.forward, Resource.LAUNCH, Phase.FORWARD, "kernels of the layers"),
    Work("launches/loss", launches.loss, Resource.LAUNCH, Phase.LOSS, "kernels of the loss"),
    Work("launches/backward", launches.backward, Resource.LAUNCH, Phase.BACKWARD, "kernels of the layers' gradients"),
)
