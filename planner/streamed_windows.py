"""Bytes of attention with a window where layers run in passes: copies of one stretch of the sequence.

What the executor does (``trainer/streamed/windows.py``): a stretch of blocks, each as long as the window, is copied so
that its blocks lie one behind the other, computed, turned round, computed with the block before, and merged.
"""

from __future__ import annotations

from planner.streamed_memory import group_heads, group_key_heads
from planner.symbols import Letters, Number, ceil_div, greatest, least, round_up

STRETCH = 8192
"""Tokens that a stretch has at least, where the sequence has as many: enough to fill a card."""


def windowed(x: Letters) -> Number:
    """1 where any layer has a window and a sequence is longer."""
    return least(x.l, 1) * least(greatest(x.S - x.s, 0), 1)


def stretch(x: Letters) -> Number:
    """Tokens of a stretch with the block of keys before it."""
    return least(round_up(x.S, x.s), x.s * ceil_div(STRETCH, x.s) + x.s)


def stretch_queries(x: Letters) -> Number:
    """Queries of a stretch."""
    return least(round_up(x.S, x.s), x.s * ceil_div(STRETCH, x.s))


def window_forward(x: Letters) -> Number:
    """Bytes while two outputs over different keys are merged.

    Query, key, value, both outputs and one of them turned round; and three products in float32.
    """
    heads, key_heads = group_heads(x), group_key_heads(x)
    return windowed(x) * stretch(x) * x.E * ((4 * heads + 2 * key_heads) * x.a // 8 + 12 * heads)


def window_backward(x: Letters) -> Number:
    """Bytes while the gradients over the earlier keys are added to those over a block's own.

    Copies of a stretch's inputs, gradients, and what is turned round of them.
    """
    heads, key_heads = group_heads(x), group_key_heads(x)
    return windowed(x) * stretch(x) * x.E * 8 * (heads + key_heads) * x.a // 8
