"""Work of the streamed executor, pass by pass: what each computes, moves in the card's memory, and sends over the link.

Forward a layer goes through chunks before and after attention, backward three times: query, key and value once more and
attention after them, then what follows attention with its gradient, then query, key and value with theirs. A pass waits
for the one before it, so each has a first and a last piece that nothing hides.
"""

from __future__ import annotations

from planner.baseline_work import attention_forward_flops, linear_backward_flops, linear_forward_flops
from planner.elementwise import (
    WIDE,
    adapters_between,
    after,
    after_backward,
    before,
    before_backward,
    norm,
    put,
    tables,
)
from planner.launches import chunks, groups
from planner.streamed_memory import group_heads, projected_width, tokens
from planner.streamed_windows import windowed
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


def between(x: Letters) -> Number:
    """FLOPs of the linears before attention, once forward."""
    return 2 * tokens(x) * x.L * (x.D * projected_width(x) + x.R * adapters_between(x))


def project_flops_again(x: Letters) -> Number:
    """Query, key and value once more, before attention is computed again and before its gradient."""
    return between(x) * (x.L + layers_again(x)) // x.L


def project_flops_back(x: Letters) -> Number:
    """Query, key and value once more, and the gradient of the layer's input through them."""
    return 2 * between(x) + 2 * tokens(x) * x.L * x.R * adapters_between(x)


def finish_flops(x: Letters) -> Number:
    """The linears after attention."""
    return greatest(linear_forward_flops(x) - between(x), 0)  # of real layers it is never less


def finish_flops_back(x: Letters) -> Number:
    """The same once more, their gradients, and the forward passes that spacing repeats."""
    gradients = linear_backward_flops(x) - between(x) - 2 * tokens(x) * x.L * x.R * adapters_between(x)
    return greatest(gradients, 0) + finish_flops(x) * (x.L + layers_again(x)) // x.L


def project_bytes(x: Letters) -> Number:
    """Memory's traffic before attention: the layer's own, laid out by heads, and the positions of each chunk anew.

    Where what lies between the passes is on the card, it is copied there.
    """
    kept = (1 - x.j_h) * 2 * projected_width(x) * x.a // 8
    return tokens(x) * x.L * (before(x) + put(x) + x.j_h * tables(x) + kept)


def project_bytes_again(x: Letters) -> Number:
    """The same once more."""
    return project_bytes(x) * (x.L + layers_again(x)) // x.L


def project_bytes_back(x: Letters) -> Number:
    """The same once more with its gradient, which is added to what passed attention by, and looked at."""
    return tokens(x) * x.L * (before(x) + x.j_h * tables(x) + before_backward(x) + 4 * x.D * x.a // 8)


def finish_bytes(x: Letters) -> Number:
    """Memory's traffic after attention; the norm before it is computed and not used, and the output is looked at."""
    return tokens(x) * x.L * (after(x) + norm(x, x.D) + (2 * x.H * x.E + x.D) * x.a // 8)


def finish_bytes_back(x: Letters) -> Number:
    """The same once more, its gradient, and the forward passes that spacing repeats."""
    once = after(x) + norm(x, x.D) + after_backward(x) + 4 * x.H * x.E * x.a // 8
    return tokens(x) * x.L * once + finish_bytes(x) * layers_again(x) // x.L


def heads_bytes(x: Letters) -> Number:
    """Memory's traffic beside the kernel of attention: what it gives, kept on the card, and a window's copies."""
    size, width, keys = x.a // 8, x.H * x.E, x.K * x.E
    banded = width * (15 * size + 6 * WIDE) + 8 * keys * size
    return tokens(x) * (x.L * (1 - x.j_h) * 2 * width * size + x.l * windowed(x) * banded)


def heads_bytes_again(x: Letters) -> Number:
    """The same where attention is computed again."""
    return heads_bytes(x) * attention_runs_again(x) // x.L


def heads_bytes_back(x: Letters) -> Number:
    """The same for its gradient."""
    size, width, keys = x.a // 8, x.H * x.E, x.K * x.E
    kept, banded = 2 * (width + 2 * keys) * size, (21 * width + 22 * keys) * size
    return tokens(x) * (x.L * (1 - x.j_h) * kept + x.l * windowed(x) * banded)


def project_in(x: Letters) -> Number:
    """Forward, before attention: the input as it is."""
    return x.L * tokens(x) * x.D * x.a // 8


def project_out(x: Letters) -> Number:
    """Forward, before attention: query, key and value."""
    return x.L * staged(x, projected_width(x))


def finish_in(x: Letters) -> Number:
    """Forward, after attention: the input as it is, and the attended values."""
    return x.L * (tokens(x) * x.D * x.a // 8 + staged(x, x.H * x.E))


def finish_out(x: Letters) -> Number:
    """Forward, after attention: the next layer's input, as it is too where it is coded."""
    return x.L * (input_bytes(x) + least(x.b_c, 1) * tokens(x) * x.D * x.a // 8)


def again_in(x: Letters) -> Number:
    """Backward, before attention that is computed again: the kept input."""
    return input_bytes(x) * (x.L + layers_again(x))


def again_out(x: Letters) -> Number:
    """Backward, before attention that is computed again: query, key and value."""
    return staged(x, projected_width(x)) * (x.L + layers_again(x))


def finish_back_in(x: Letters) -> Number:
    """Backward, after attention: the input, attended values, and the gradient from above."""
    return x.L * (input_bytes(x) + staged(x, x.H * x.E + x.D)) + finish_in(x) * layers_again(x) // x.L


def finish_back_out(x: Letters) -> Number:
    """Backward, after attention: the gradient of the attended values, and that of the layer's input so far."""
    return x.L * staged(x, x.H * x.E + x.D) + finish_out(x) * layers_again(x) // x.L


def project_back_in(x: Letters) -> Number:
    """Backward, before attention: the input, its gradient so far, and those of query, key and value."""
    return x.L * (input_bytes(x) + staged(x, x.D + projected_width(x)))


def project_back_out(x: Letters) -> Number:
    """Backward, before attention: the gradient of the layer's input."""
    return x.L * staged(x, x.D)


def exposed(inward: Number, outward: Number, pieces: Number) -> Number:
    """Of bytes in so many pieces those that nothing hides: the first piece's, coming, and the last one's, leaving."""
    return (inward + outward) // pieces


def waits(inward: Number, outward: Number, pieces: Number) -> Number:
    """The same where the link is what a stage waits for: the first piece's way in, and the computing of the last.

    Approximate: that takes as long as the way that carries less.
    """
    return 2 * least(inward, outward) // pieces


def chunks_exposed(x: Letters) -> Number:
    """Forward: one chunk's bytes before and after attention."""
    count = chunks(x)
    return waits(project_in(x), project_out(x), count) + exposed(finish_in(x), finish_out(x), count)


def chunks_back_exposed(x: Letters) -> Number:
    """Backward: the same in three passes."""
    count = chunks(x)
    projected = waits(again_in(x), again_out(x), count) + waits(project_back_in(x), project_back_out(x), count)
    return projected + exposed(finish_back_in(x), finish_back_out(x), count)


def heads_exposed(x: Letters) -> Number:
    """Attention: one group's bytes."""
    return exposed(heads_in(x), heads_out(x), groups(x))


def heads_back_exposed(x: Letters) -> Number:
    """Attention backward: one group's bytes, and again where attention is computed again."""
    backward = exposed(heads_back_in(x), heads_back_out(x), groups(x))
    return backward + heads_exposed(x) * attention_runs_again(x) // x.L


def heads_in(x: Letters) -> Number:
    """Attention: query, key and value."""
    return x.L * staged(x, head_inputs(x))


def heads_out(x: Letters) -> Number:
    """Attention: attended values and the log-sum-exp."""
    return x.L * (staged(x, x.H * x.E) + x.j_h * 4 * tokens(x) * x.H)


def attention_runs_again(x: Letters) -> Number:
    """Layers whose attention is computed again."""
    return (1 - x.k_a) * (x.L + layers_again(x))


def heads_again_in(x: Letters) -> Number:
    """Attention that is computed again: query, key and value."""
    return heads_in(x) * attention_runs_again(x) // x.L


def heads_again_out(x: Letters) -> Number:
    """Attention that is computed again: attended values and the log-sum-exp."""
    return heads_out(x) * attention_runs_again(x) // x.L


def heads_back_in(x: Letters) -> Number:
    """Attention backward: query, key and value, the attended values, their gradient, and the log-sum-exp."""
    return x.L * (staged(x, head_inputs(x) + 2 * x.H * x.E) + x.j_h * 4 * tokens(x) * x.H)


def heads_back_out(x: Letters) -> Number:
    """Attention backward: gradients of query, key and value."""
    return x.L * staged(x, projected_width(x))


def attention_again_flops(x: Letters) -> Number:
    """Attention once more, unless what it gave was kept."""
    return attention_forward_flops(x) * attention_runs_again(x) // x.L
