"""Work of the streamed executor: what it computes again, and what crosses the link in each pass.

A layer's input is read twice in the forward pass and three times in the backward pass, before and after attention and
once more for its own gradient; query, key and value are projected once more than elsewhere.
"""

from __future__ import annotations

from planner.baseline_work import attention_forward_flops, elementwise_forward_bytes, linear_forward_flops
from planner.streamed_memory import group_heads, projected_width, tokens
from planner.symbols import Letters, Number, ceil_div, greatest, least


def layers_again(x: Letters) -> Number:
    """Layers run forward once more because their input was not kept; those after the last kept one still have it."""
    return (least(x.L_s, x.L) - 1) * (ceil_div(x.L, x.L_s) - 1)


def input_bits(x: Letters) -> Number:
    """Bits of 64 elements of a kept layer input: as it is, or coded."""
    return x.b_c + (1 - least(x.b_c, 1)) * 64 * x.a


def input_bytes(x: Letters) -> Number:
    """Bytes of one layer's input."""
    return tokens(x) * x.D * input_bits(x) // 512


def staged(x: Letters, width: Number) -> Number:
    """Bytes of so many elements for each token, where they lie in host memory."""
    return x.j_h * tokens(x) * width * x.a // 8


def key_reads(x: Letters) -> Number:
    """How often a key head is read: once for each of the groups that share it."""
    return greatest(ceil_div(x.H, x.K * group_heads(x)), 1)


def head_inputs(x: Letters) -> Number:
    """Elements of a token's query, key and value as attention by groups reads them."""
    return (x.H + 2 * x.K * key_reads(x)) * x.E


def chunks_in(x: Letters) -> Number:
    """Forward: the input twice, as it is, and the attended values."""
    return x.L * (2 * tokens(x) * x.D * x.a // 8 + staged(x, x.H * x.E))


def chunks_out(x: Letters) -> Number:
    """Forward: the next layer's input, as it is too where it is coded, and query, key and value."""
    beside = least(x.b_c, 1) * tokens(x) * x.D * x.a // 8
    return x.L * (input_bytes(x) + beside + staged(x, projected_width(x)))


def heads_in(x: Letters) -> Number:
    """Attention: query, key and value."""
    return x.L * staged(x, head_inputs(x))


def heads_out(x: Letters) -> Number:
    """Attention: attended values and the log-sum-exp."""
    return x.L * (staged(x, x.H * x.E) + x.j_h * 4 * tokens(x) * x.H)


def chunks_back_in(x: Letters) -> Number:
    """Backward: the input three times, attended values, gradients from above twice, and of query, key, value."""
    backward = x.L * (3 * input_bytes(x) + staged(x, x.H * x.E + 2 * x.D + projected_width(x)))
    return backward + chunks_in(x) * layers_again(x) // x.L


def chunks_back_out(x: Letters) -> Number:
    """Backward: query, key and value, the gradient of attended values, and twice that of the layer's input."""
    backward = x.L * staged(x, projected_width(x) + x.H * x.E + 2 * x.D)
    return backward + chunks_out(x) * layers_again(x) // x.L


def attention_runs_again(x: Letters) -> Number:
    """Layers whose attention is computed again."""
    return (1 - x.k_a) * (x.L + layers_again(x))


def heads_back_in(x: Letters) -> Number:
    """Attention backward: query, key and value, once more with the attended values and both gradients' sources."""
    backward = x.L * (staged(x, head_inputs(x) + 2 * x.H * x.E) + x.j_h * 4 * tokens(x) * x.H)
    return backward + heads_in(x) * attention_runs_again(x) // x.L


def heads_back_out(x: Letters) -> Number:
    """Attention backward: gradients of query, key and value; attended values where they are computed again."""
    return x.L * staged(x, projected_width(x)) + heads_out(x) * attention_runs_again(x) // x.L


def linear_again_flops(x: Letters) -> Number:
    """Every linear once more, those before attention twice, and the forward passes that spacing repeats."""
    projections = 2 * tokens(x) * x.L * x.D * projected_width(x)
    return linear_forward_flops(x) + projections + linear_forward_flops(x) * layers_again(x) // x.L


def elementwise_again_bytes(x: Letters) -> Number:
    """Norms, activations, sums once more."""
    return elementwise_forward_bytes(x) * (x.L + layers_again(x)) // x.L


def attention_again_flops(x: Letters) -> Number:
    """Attention once more, unless what it gave was kept."""
    return attention_forward_flops(x) * attention_runs_again(x) // x.L
