"""Kernels that the host launches, one for each op that is no view; each pass over a layer launches as many.

How many there are does not grow with the tokens of a piece, so short pieces leave a card waiting for its host. Counted
on the trainer's own step by ``tests/test_traffic.py``.

Where layers are compiled (letter k_c) there are fewer: what only adds and multiplies between two products is one, which
no test counts.
Approximate: each counts as long as one that autograd launches, although compiled code asks less of the host.
"""

from __future__ import annotations

from planner.elementwise import cut, gated, narrow, written_out
from planner.streamed_memory import chunk_tokens, group_heads, tokens
from planner.streamed_windows import STRETCH, windowed
from planner.symbols import Letters, Number, ceil_div, greatest, least

FOUR_BIT_KERNELS = 3
"""More kernels of a product whose weight is in four bits: its scales, their offset, the weight itself."""
FOUR_BIT = 7
"""As many launches take the host as long as it takes to such a product, with what the library does in Python.

Small steps with and without four bits, by turns: 203 microseconds more for each product of a resident step, in which
another launch took 29.7; 202 of a streamed one, in which it took 41.1 (reports/validation/others/h200-own-rates.json).
"""
EIGHT_BIT_UPDATE = 5
"""As many launches take the host as long as the update of one matrix whose moments are in eight bits.

131 and 155 microseconds for each (reports/validation.md, how these runs were made), where a launch took 31: its
library goes from matrix to matrix in Python.
"""
CLIPPED_ROWS = 5
"""As many launches take the host as long as clipping the rows of one matrix, which is nine ops without a graph.

111 microseconds for each matrix, where a launch took 23: the optimiser's phase of wide-adaptive_clipping less that of
wide-base, in reports/validation/pairs.
"""
NOISE_PIECE = 2**18
"""Numbers of a matrix that noise is made for at a time: a mebibyte. About one launch's time (wide-gradient_noise)."""
SLICE = 20
"""Kernels of a slice of the loss, forward and backward; ``BENT``: more where logits are capped."""
BENT = 8
STORED, STORED_BACKWARD, STORED_BENT = 10, 9, 6
"""Kernels of a layer's attention that writes scores out, forward and backward; more of each where they are bent."""
BLOCK, BLOCK_BACKWARD = 24, 38
"""Kernels of a block of queries whose scores are written out, forward and backward, scores computed again."""
WINDOW, WINDOW_BACKWARD = 24, 29
"""Kernels of a stretch of blocks, forward and backward: copies, turning round, two calls, merging."""


def linears_between(x: Letters) -> Number:
    """Linears before attention: three, or one for query, key and value."""
    return 1 + 2 * least(x.J // 6, 1)


def adapter(x: Letters) -> Number:
    """Kernels of the adapter of one linear, forward: two products and, in 16 bits, two casts; a share where few are."""
    return (2 + 2 * narrow(x)) * least(x.I, x.J)


def adapter_backward(x: Letters) -> Number:
    """Kernels of its gradients: four products, scaling, sums and casts."""
    return (8 + 2 * narrow(x)) * least(x.I, x.J)


def norm(x: Letters) -> Number:
    """Kernels of a norm."""
    return 1 + x.Q * (5 + 2 * narrow(x) + 2 * least(x.z, 1))


def norm_backward(x: Letters) -> Number:
    """Kernels of its gradient."""
    return 1 + x.Q * (11 + 2 * narrow(x))


def tables(x: Letters) -> Number:
    """Kernels that embed a piece to learn its cosines and sines."""
    return 5 + 8 * least(x.o, 1) * greatest(ceil_div(x.o, x.E), 1)


def before(x: Letters) -> Number:
    """Kernels from a layer's input to query, key and value."""
    linears = linears_between(x)
    rotary = least(x.o, 1) * (2 * x.k_c + (1 - x.k_c) * (10 + 2 * least(cut(x), 1)))
    return norm(x) * (1 + 2 * x.q) + linears + adapter(x) * linears // greatest(x.J, 1) + rotary


def before_backward(x: Letters) -> Number:
    """Kernels of the gradient of the same."""
    linears = linears_between(x)
    rotary = least(x.o, 1) * (2 * x.k_c + (1 - x.k_c) * (18 + 8 * least(cut(x), 1)))
    adapters = adapter_backward(x) * linears // greatest(x.J, 1)
    sums = (1 - x.k_c) * (2 * linears + 2)
    return norm_backward(x) * (1 + 2 * x.q) + linears + sums + adapters + rotary


def after(x: Letters) -> Number:
    """Kernels from attended values to the layer's output."""
    linears = x.J - linears_between(x)
    activation = 1 + 7 * written_out(x) // 3 + (1 - x.k_c) * (gated(x) + 2)
    return norm(x) * (x.n - 1) + linears + adapter(x) * linears // greatest(x.J, 1) + activation


def after_backward(x: Letters) -> Number:
    """Kernels of the gradient of the same."""
    linears = x.J - linears_between(x)
    activation = 1 + 12 * written_out(x) // 3 + (1 - x.k_c) * 3 * gated(x)
    norms = norm_backward(x) * greatest(x.n - 1, 1)
    sums = (1 - x.k_c) * (linears + 1)
    return norms + linears + sums + adapter_backward(x) * linears // greatest(x.J, 1) + activation


def stored_scores(x: Letters) -> Number:
    """Kernels of attention that writes its scores out, beside the first: masks, softmax, casts, and bent scores."""
    return x.e * (STORED + STORED_BENT * x.c)


def stored_scores_backward(x: Letters) -> Number:
    """Kernels of its gradient."""
    return x.e * (STORED_BACKWARD + STORED_BENT * x.c)


def forward(x: Letters) -> Number:
    """A forward pass of the layers, over all tokens at once."""
    return x.L * (before(x) + after(x) + 1 + stored_scores(x))


def backward(x: Letters) -> Number:
    """The backward pass, with the forward passes that it repeats."""
    return x.L * (before_backward(x) + after_backward(x) + 3 + stored_scores_backward(x)) + x.p * forward(x)


def loss(x: Letters) -> Number:
    """The loss of all tokens at once. Approximate: by slices as well, which follow layers that left the host ahead."""
    return SLICE + BENT * x.t


def loss_by_slices(x: Letters) -> Number:
    """The loss of so many trained tokens at a time, with the final norm; every layer is asked as in `project`."""
    normed = norm(x) + norm_backward(x) + 22 + x.L // 2
    return x.B * ceil_div(x.T, x.C) * (SLICE + BENT * x.t + normed)


def chunks(x: Letters) -> Number:
    """Chunks of the micro-batch's tokens."""
    return ceil_div(tokens(x), chunk_tokens(x))


def groups(x: Letters) -> Number:
    """Groups of heads. Approximate: where a key head is read by several groups there may be more."""
    return ceil_div(x.H, group_heads(x))


def project(x: Letters) -> Number:
    """A chunk's pass before attention.

    Approximate: what embeds it anew asks every layer, of which two take the host as long as a kernel.
    """
    return before(x) + 8 + x.j_h * (tables(x) + x.L // 2)


def finish(x: Letters) -> Number:
    """A chunk's pass after attention; the norm before it is computed and not used."""
    return after(x) + norm(x) + 5


def chunks_forward(x: Letters) -> Number:
    """The passes by chunks, forward; one copy for each array and chunk."""
    return x.L * chunks(x) * (project(x) + finish(x))


def chunks_backward(x: Letters) -> Number:
    """The passes by chunks, backward, and the forward passes that spacing repeats."""
    spaced = (least(x.L_s, x.L) - 1) * (ceil_div(x.L, x.L_s) - 1)
    once = project(x) + finish(x) + after_backward(x) + 4 + project(x) + before_backward(x) + 4
    return chunks(x) * (x.L * once + spaced * (project(x) + finish(x)))


def stretches(x: Letters) -> Number:
    """Stretches of all layers with a window, for all groups."""
    return x.l * windowed(x) * groups(x) * ceil_div(tokens(x), x.s * ceil_div(STRETCH, x.s))


def heads_forward(x: Letters) -> Number:
    """Attention by groups: the kernel, a copy for each of four arrays and block of tokens, and the log-sum-exp."""
    return x.L * groups(x) * (1 + x.j_h * (4 * chunks(x) + 1)) + WINDOW * stretches(x)


def heads_backward(x: Letters) -> Number:
    """The same backward, with eight arrays, and attention that is computed again."""
    again = (1 - x.k_a) * heads_forward(x)
    return x.L * groups(x) * (4 + x.j_h * (8 * chunks(x) + 1)) + WINDOW_BACKWARD * stretches(x) + again


def row_clipping(x: Letters) -> Number:
    """Kernels of clipping each matrix of the adapters by its rows."""
    return CLIPPED_ROWS * 2 * x.I * x.L


def gradient_noise(x: Letters) -> Number:
    """Kernels of the noise on their gradients, piece by piece. Approximate: as if small matrices shared pieces."""
    return greatest(2 * x.I * x.L, x.R * x.U * x.L // NOISE_PIECE)


def relative_noise(x: Letters) -> Number:
    """The same, and one kernel more for each matrix, which takes its norm."""
    return gradient_noise(x) + 2 * x.I * x.L


def centralization(x: Letters) -> Number:
    """Kernels of taking off means of first matrices' rows: half a launch for each (wide-gradient_centralization)."""
    return x.I * x.L // 2
