"""Attention of some heads over a row of documents, of stock kernels' calls alone, none with a mask.

A document is computed in one causal call. Where a layer has a window of W keys, the document is cut into blocks of W:
a block sees itself causally, and of the block before it the keys that are still within the window. Those are, read
backwards, causal too: query a sees key b of the block before where b > a, so with both turned round it is the triangle
below the diagonal again. Two calls for all blocks at once, merged by their log-sum-exp; S·W pairs and no more.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from trainer.streamed.kernels import Kernel

Span = tuple[int, int]
"""A range of tokens, half open."""


def attend(
    kernel: Kernel,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    documents: Sequence[Span],
    window: int | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Attention within each document; query ``[G, n, E]``, key and value ``[g, n, E]``.

    Args:
        documents: they follow each other and fill the n tokens.

    Gives the output ``[G, n, E]`` and the log-sum-exp ``[G, n]``.
    """
    found = []
    for start, stop in documents:
        parts = tuple(each[None, :, start:stop] for each in (query, key, value))
        whole = window is None or stop - start <= window
        found.append(kernel.forward(*parts, True, scale) if whole else _banded(kernel, parts, window or 0, scale))
    outputs, sums = ([each[place][0] for each in found] for place in (0, 1))
    return (outputs[0], sums[0]) if len(found) == 1 else (torch.cat(outputs, 1), torch.cat(sums, 1))


def attend_backward(
    kernel: Kernel,
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    log_sum_exp: Tensor,
    documents: Sequence[Span],
    window: int | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value, given what `attend` gave; shapes as there."""
    found = []
    for start, stop in documents:
        heads = [each[None, :, start:stop] for each in (gradient, query, key, value, output, log_sum_exp)]
        whole = window is None or stop - start <= window
        made = kernel.backward(*heads, True, scale) if whole else _banded_backward(kernel, heads, window or 0, scale)
        found.append(tuple(each[0] for each in made))
    if len(found) == 1:
        return found[0]
    made_of = [list(each) for each in zip(*found, strict=True)]
    found.clear()
    dq, dk, dv = (_joined(made_of.pop(0)) for _ in range(3))
    return dq, dk, dv


def _joined(pieces: list[Tensor]) -> Tensor:
    """One tensor of the documents' own, which are gone then: what is joined next finds room."""
    return torch.cat(pieces, 1)


def merge(first: Tensor, first_sum: Tensor, second: Tensor, second_sum: Tensor) -> tuple[Tensor, Tensor]:
    """Two outputs over different keys and their log-sum-exps, as one over all of them; in the wider of their types."""
    total = torch.logaddexp(first_sum, second_sum)
    share, other = (torch.exp(each - total).unsqueeze(-1) for each in (first_sum, second_sum))
    return (first * share + second * other).to(first.dtype), total


def _banded(kernel: Kernel, parts: Sequence[Tensor], window: int, scale: float) -> tuple[Tensor, Tensor]:
    length = parts[0].shape[2]
    query, key, value = (_blocks(each, window) for each in parts)
    output, sums = kernel.forward(query, key, value, True, scale)
    if window > 1:
        # Queries 0 … W−2 of a block, and keys 1 … W−1 of the one before, both backwards.
        earlier, earlier_sums = kernel.forward(*_turned(query, key, value), True, scale)
        merged, merged_sums = merge(output[1:, :, :-1], sums[1:, :, :-1], earlier.flip(2), earlier_sums.flip(2))
        output[1:, :, :-1], sums = merged, sums.contiguous()
        sums[1:, :, :-1] = merged_sums
    return _row(output, length), _row(sums, length)


def _banded_backward(
    kernel: Kernel, parts: Sequence[Tensor], window: int, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    length = parts[0].shape[2]
    gradient, query, key, value, output, sums = (_blocks(each, window) for each in parts)
    dq, dk, dv = kernel.backward(gradient, query, key, value, output, sums, True, scale)
    if window > 1:
        turned = [each[1:, :, :-1].flip(2) for each in (gradient, output, sums)]
        made = kernel.backward(turned[0], *_turned(query, key, value), turned[1], turned[2], True, scale)
        dq[1:, :, :-1] += made[0].flip(2)
        dk[:-1, :, 1:] += made[1].flip(2)
        dv[:-1, :, 1:] += made[2].flip(2)
    return _row(dq, length), _row(dk, length), _row(dv, length)


def _turned(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return query[1:, :, :-1].flip(2), key[:-1, :, 1:].flip(2), value[:-1, :, 1:].flip(2)


def _blocks(row: Tensor, window: int) -> Tensor:
    """``[1, h, s, …]`` as ``[blocks, h, window, …]``; what is added at the end is zero, and no real token sees it."""
    short = -row.shape[2] % window
    filled = pad(row, (0,) * (2 * (row.dim() - 3)) + (0, short)) if short else row
    return filled[0].unflatten(1, (-1, window)).transpose(0, 1).contiguous()


def _row(blocks: Tensor, length: int) -> Tensor:
    """The inverse of `_blocks`."""
    return blocks.transpose(0, 1).flatten(1, 2)[None, :, :length]
