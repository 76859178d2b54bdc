"""Bytes that attention kernels take for themselves in their backward pass, where layers run in passes.

A layer that sees all is called with the row or a block of it; one with a window with the queries of a stretch, in
blocks as long as the window, beside the stretch's copies, which are a term of their own.
"""

from __future__ import annotations

from collections.abc import Callable

from planner.streamed_memory import group_heads, group_key_heads, tokens
from planner.streamed_windows import stretch_queries, window_backward, windowed
from planner.symbols import Letters, Number, greatest, least, round_up


def flash_workspace(x: Letters) -> Number:
    """What a kernel takes in its backward pass: gradients of the queries in float32, and a row sum for each.

    The flash kernel rounds the head size up to a multiple of 32 and the sequence to one of 128. Where several query
    heads read a key head, the gradients of key and value are made for each of them, in the compute dtype, before they
    are summed. It takes its output and its gradient as copies, token by token, where there is more than one head.
    """

    def taken(queries: Number) -> Number:
        heads = group_heads(x)
        copies = least(heads - 1, 1) * 2 * queries * heads * x.E * x.a // 8
        return _sums(queries, heads, round_up(x.E, 32)) + _for_each_head(x, queries) + copies

    return _largest(x, taken)


def cudnn_workspace(x: Letters) -> Number:
    """The same of cuDNN, which takes heads as wide as they are: measured at 64, 80 and 128 (reports/validation)."""
    return _largest(x, lambda queries: _sums(queries, group_heads(x), x.E) + _for_each_head(x, queries))


def efficient_workspace(x: Letters) -> Number:
    """The same of the memory-efficient kernel, in tiles 64 wide; and its output and gradient token by token.

    It takes both as copies where there is more than one head, and row sums padded: measured at a head size of 80
    (reports/validation). Heads that read one key head are a call of their own, whose gradients of key and value, one
    for each, are summed before the next; what several calls gave is there twice while it is joined.
    """

    def taken(queries: Number) -> Number:
        several = least(x.H // x.K - 1, 1)
        heads = several * least(group_heads(x), x.H // x.K) + (1 - several) * group_heads(x)
        rows, more = round_up(queries, 32) * heads, least(heads - 1, 1)
        for_each = several * 2 * (heads - 1) * round_up(queries, 128) * x.E * x.a // 8
        called = _sums(queries, heads, round_up(x.E, 64)) + rows * (more * 2 * x.E * x.a // 8 + 4) + for_each
        calls = group_key_heads(x)
        joined = several * least(calls - 1, 1) * queries * x.E * x.a // 8 * (group_heads(x) + 2 * calls)
        return greatest(called, joined)

    return _largest(x, taken)


def _largest(x: Letters, taken: Callable[[Number], Number]) -> Number:
    """What there is beside the copies of a stretch, in a layer with a window or in one that sees all, which has none.

    With these copies it adds up to what the one takes or the other, whichever is more. Approximate: rows of a
    micro-batch are called one by one, and counted as one.
    """
    sees_all = least(x.L - x.l * windowed(x), 1)
    whole = sees_all * taken(least(tokens(x), x.S_b))
    return greatest(whole - window_backward(x), windowed(x) * taken(least(tokens(x), stretch_queries(x))))


def _sums(queries: Number, heads: Number, width: Number) -> Number:
    """Gradients of the queries in float32, and a row sum for each."""
    return 4 * round_up(queries, 128) * heads * (width + 1)


def _for_each_head(x: Letters, queries: Number) -> Number:
    """Gradients of key and value for each of several heads that read one key head."""
    heads = group_heads(x)
    several = least(x.H // x.K - 1, 1) * least(heads - 1, 1)
    return several * 2 * round_up(queries, 128) * heads * x.E * x.a // 8
