"""Bytes that attention kernels take for themselves in their backward pass, where layers run in passes."""

from __future__ import annotations

from planner.streamed_memory import group_heads, tokens
from planner.streamed_windows import stretch_queries, windowed
from planner.symbols import Letters, Number, greatest, least, round_up


def call_tokens(x: Letters) -> Number:
    """Queries of the longest call: the row or a block of it, unless every layer has a window.

    A layer that has one is called with the queries of a stretch, in blocks as long as the window. Approximate: rows of
    a micro-batch are called one by one, and counted as one.
    """
    sees_all = least(x.L - x.l * windowed(x), 1)
    return greatest(sees_all * least(tokens(x), x.S_b), windowed(x) * least(tokens(x), stretch_queries(x)))


def flash_workspace(x: Letters) -> Number:
    """What a kernel takes in its backward pass: gradients of the queries in float32, and a row sum for each.

    The flash kernel rounds the head size up to a multiple of 32 and the sequence to one of 128. Where several query
    heads read a key head, the gradients of key and value are made for each of them, in the compute dtype, before they
    are summed. It takes its output and its gradient as copies, token by token, where there is more than one head.
    """
    copies = least(group_heads(x) - 1, 1) * 2 * call_tokens(x) * group_heads(x) * x.E * x.a // 8
    return _workspace(x, round_up(x.E, 32)) + copies


def cudnn_workspace(x: Letters) -> Number:
    """The same of cuDNN, which takes heads as wide as they are: measured at 64, 80 and 128 (reports/validation)."""
    return _workspace(x, x.E)


def efficient_workspace(x: Letters) -> Number:
    """The same of the memory-efficient kernel, in tiles 64 wide; and its output and gradient token by token.

    It takes both as copies, and row sums padded: measured at a head size of 80 (reports/validation). All heads of a
    group at once at most.
    """
    return _workspace(x, round_up(x.E, 64)) + round_up(call_tokens(x), 32) * group_heads(x) * (2 * x.E * x.a // 8 + 4)


def _workspace(x: Letters, width: Number) -> Number:
    rows, shared = round_up(call_tokens(x), 128) * group_heads(x), least(x.H // x.K - 1, 1)
    return 4 * rows * (width + 1) + shared * 2 * rows * x.E * x.a // 8
