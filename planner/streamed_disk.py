"""Bytes of layer inputs on disk, and of those that stay in the host's memory meanwhile.

What the executor does (``trainer/streamed/shelf.py``): inputs are taken from two places in host memory. While a layer
reads one, the next layer's input is written to the other, or in the backward pass the one before it comes in there. The
last two of a forward pass are the first two of the backward pass, and never go to the disk.
"""

from __future__ import annotations

from planner.streamed_memory import tokens
from planner.streamed_work import input_bytes
from planner.symbols import Letters, Number, ceil_div, greatest, least, round_up

PLACES = 2
"""Inputs in host memory at once."""
PAGE = 4096
"""Bytes that what goes to a disk past the system's cache begins and ends at."""


def kept_inputs(x: Letters) -> Number:
    """Layer inputs that are kept, wherever they lie."""
    return ceil_div(x.L, x.L_s)


def held_inputs(x: Letters) -> Number:
    """Groups of 64 elements of those in host memory."""
    return ceil_div(least(kept_inputs(x), PLACES) * tokens(x) * x.D, 64)


def inputs_on_disk(x: Letters) -> Number:
    """Layer inputs that go to the disk and come back."""
    return greatest(kept_inputs(x) - PLACES, 0)


def stored_inputs(x: Letters) -> Number:
    """Bytes of the file; a coded input's scales begin on a page of their own."""
    return inputs_on_disk(x) * (round_up(input_bytes(x), PAGE) + PAGE * least(x.b_c, 1))


def disk_traffic(x: Letters) -> Number:
    """Bytes that go to the disk in the forward pass, and come back in the backward pass."""
    return inputs_on_disk(x) * input_bytes(x)
