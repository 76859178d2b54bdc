"""Attention with a window of W keys, of stock kernels' calls alone, none with a mask.

A sequence is cut into blocks of W: a block sees itself causally, and of the block before it the keys that are still
within the window. Those are, read backwards, causal too: query a sees key b of the block before where b > a, so with
both turned round it is the triangle below the diagonal again. Two calls for some blocks at once, merged by their
log-sum-exp; S·W pairs and no more. As many blocks at once as make a *stretch*, so that what is copied and turned round
does not grow with the sequence.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from planner.streamed_windows import STRETCH
from trainer.streamed.kernels import Kernel


def merge(first: Tensor, first_sum: Tensor, second: Tensor, second_sum: Tensor) -> tuple[Tensor, Tensor]:
    """Two outputs over different keys and their log-sum-exps, as one over all of them; in the wider of their types."""
    total = torch.logaddexp(first_sum, second_sum)
    share, other = (torch.exp(each - total).unsqueeze(-1) for each in (first_sum, second_sum))
    return (first * share + second * other).to(first.dtype), total


def banded(kernel: Kernel, parts: Sequence[Tensor], window: int, scale: float) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of query ``[1, G, n, E]``, key and value ``[1, g, n, E]`` with a window of fewer keys."""
    query, key, value = parts
    output = torch.empty_like(query)
    sums = torch.empty(query.shape[:3], dtype=torch.promote_types(query.dtype, torch.float32), device=query.device)
    for start, stop, before in stretches(query.shape[2], window):
        here, seen = slice(start, stop), slice(before, stop)
        made = stretch_forward(kernel, query[:, :, here], key[:, :, seen], value[:, :, seen], window, scale)
        output[:, :, here], sums[:, :, here] = made
    return output, sums


def banded_backward(
    kernel: Kernel, parts: Sequence[Tensor], window: int, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value from gradient, query, key, value, output and log-sum-exp; as `banded`."""
    gradient, query, key, value, output, sums = parts
    dq, dk, dv = (torch.empty_like(each) for each in (query, key, value))
    for start, stop, before in stretches(query.shape[2], window):
        here, seen = slice(start, stop), slice(before, stop)
        rows = [each[:, :, here] for each in (gradient, query, output, sums)]
        made = stretch_backward(kernel, rows, key[:, :, seen], value[:, :, seen], window, scale)
        dq[:, :, here] = made[0]
        for whole, part in ((dk, made[1]), (dv, made[2])):
            whole[:, :, before:start] += part[:, :, : start - before]  # the block before, which has its own already
            whole[:, :, here] = part[:, :, start - before :]
    return dq, dk, dv


def stretches(length: int, window: int) -> Iterator[tuple[int, int, int]]:
    """Ranges of whole blocks, and where the keys begin that they see: a block earlier."""
    stretch = -(-STRETCH // window) * window
    for start in range(0, length, stretch):
        yield start, min(start + stretch, length), max(start - window, 0)


def stretch_forward(
    kernel: Kernel, query: Tensor, key: Tensor, value: Tensor, window: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of the queries of a stretch, and of all keys that they see."""
    length = query.shape[2]
    first = (key.shape[2] - length) // window  # 1 where a block of keys comes before the queries
    query, key, value = (_blocks(each, window) for each in (query, key, value))
    output, sums = kernel.forward(query, key[first:], value[first:], True, scale)
    if window > 1 and len(key) > 1:
        late = 1 - first  # which block of queries has a block before it
        # Queries 0 … W−2 of a block, and keys 1 … W−1 of the one before, both backwards.
        earlier, earlier_sums = kernel.forward(*_turned(query[late:], key[:-1], value[:-1]), True, scale)
        rest = (slice(late, None), slice(None), slice(None, -1))
        merged, merged_sums = merge(output[rest], sums[rest], earlier.flip(2), earlier_sums.flip(2))
        output[rest], sums = merged, sums.contiguous()
        sums[rest] = merged_sums
    return _row(output, length), _row(sums, length)


def stretch_backward(
    kernel: Kernel, rows: Sequence[Tensor], key: Tensor, value: Tensor, window: int, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the queries, and of all keys and values that they see."""
    length, seen = rows[0].shape[2], key.shape[2]
    first = (seen - length) // window
    gradient, query, output, sums = (_blocks(each, window) for each in rows)
    key, value = _blocks(key, window), _blocks(value, window)
    dq, dk, dv = kernel.backward(gradient, query, key[first:], value[first:], output, sums, True, scale)
    if first:
        dk, dv = (torch.cat([torch.zeros_like(each[:1]), each]) for each in (dk, dv))
    if window > 1 and len(key) > 1:
        late = 1 - first
        turned = [each[late:, :, :-1].flip(2) for each in (gradient, output, sums)]
        made = kernel.backward(
            turned[0], *_turned(query[late:], key[:-1], value[:-1]), turned[1], turned[2], True, scale
        )
        dq[late:, :, :-1] += made[0].flip(2)
        dk[:-1, :, 1:] += made[1].flip(2)
        dv[:-1, :, 1:] += made[2].flip(2)
    return _row(dq, length), _row(dk, seen), _row(dv, seen)


def _turned(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Blocks of queries without the last of each, of keys before them without the first, backwards."""
    return query[:, :, :-1].flip(2), key[:, :, 1:].flip(2), value[:, :, 1:].flip(2)


def _blocks(row: Tensor, window: int) -> Tensor:
    """``[1, h, s, …]`` as ``[blocks, h, window, …]``; what is added at the end is zero, and no real token sees it."""
    short = -row.shape[2] % window
    filled = pad(row, (0,) * (2 * (row.dim() - 3)) + (0, short)) if short else row
    return filled[0].unflatten(1, (-1, window)).transpose(0, 1).contiguous()


def _row(blocks: Tensor, length: int) -> Tensor:
    """The inverse of `_blocks`."""
    return blocks.transpose(0, 1).flatten(1, 2)[None, :, :length]
