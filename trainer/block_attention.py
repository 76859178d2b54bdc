"""Exact attention in plain products, some queries at a time: for scores that no kernel of torch computes.

Gemma 2 caps its scores by tanh. Here the scores of a block of queries live at once, in the forward pass and again in
the backward pass, which computes them anew; what is kept is what the other kernels keep. The blocks are made so
that memory does not grow with the length (`planner.optimizations.attention.blockwise_attention` counts it).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from planner.optimizations.attention.blockwise_attention import SCORES
from trainer.kernel_ops import Band


class Blocks:
    """A `trainer.kernel_ops.Kernel`; it takes fewer key/value heads as they are."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, band: Band) -> tuple[Tensor, Tensor, tuple[Any, ...]]:
        """See `trainer.kernel_ops.Kernel`."""
        output = torch.empty_like(query)
        summed = query.new_empty(query.shape[:3], dtype=torch.promote_types(query.dtype, torch.float32))
        for rows, keys in _blocks(query, band):
            wide = _capped(_scores(query, key, rows, keys, band), band)
            wide.masked_fill_(_unseen(rows, keys, band, query.device), -torch.inf)
            highest = wide.amax(dim=-1, keepdim=True)
            total = wide.sub_(highest).exp_().sum(dim=-1, keepdim=True)
            weights = _folded(wide.div_(total), key).to(query.dtype)
            del wide
            output[:, :, rows] = _unfolded(weights @ value[:, :, keys], query)
            summed[:, :, rows] = (highest + total.log()).squeeze(-1)
        return output, summed, ()

    def backward(
        self, gradient: Tensor, saved: tuple[Tensor, Tensor, Tensor, Tensor, Tensor], states: Any, band: Band
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `trainer.kernel_ops.Kernel`."""
        query, key, value, output, summed = saved
        of_query = torch.empty_like(query)
        of_key, of_value = (torch.zeros_like(each, dtype=summed.dtype) for each in (key, value))
        for rows, keys in _blocks(query, band):
            bent = _bent(_scores(query, key, rows, keys, band), band)
            weights = bent.mul(band.softcap) if band.softcap is not None else bent
            weights.masked_fill_(_unseen(rows, keys, band, query.device), -torch.inf)
            weights.sub_(summed[:, :, rows].unsqueeze(-1)).exp_()
            coming = _folded(gradient[:, :, rows], key)
            of_value[:, :, keys] += _folded(weights, key).to(query.dtype).mT @ coming
            # What each weight would add to the output, less what the row as a whole adds.
            shared = (gradient[:, :, rows] * output[:, :, rows]).sum(dim=-1, keepdim=True, dtype=summed.dtype)
            change = _unfolded(coming @ value[:, :, keys].mT, query).to(summed.dtype)
            weights.mul_(change.sub_(shared))
            del change
            if band.softcap is not None:
                weights.mul_(bent.square_().neg_().add_(1))
            del bent
            of_scores = _folded(weights.mul_(band.scale), key).to(query.dtype)
            del weights
            of_query[:, :, rows] = _unfolded(of_scores @ key[:, :, keys], query)
            of_key[:, :, keys] += of_scores.mT @ _folded(query[:, :, rows], key)
        return of_query, of_key.to(key.dtype), of_value.to(value.dtype)


def _blocks(query: Tensor, band: Band) -> Iterator[tuple[slice, slice]]:
    """Rows of queries, and the keys that any of them sees."""
    batch, heads, length, _ = query.shape
    height = max(1, min(length, SCORES // (batch * heads * length)))
    for start in range(0, length, height):
        stop = min(start + height, length)
        yield slice(start, stop), slice(0 if band.window is None else max(0, start - band.window + 1), stop)


def _unseen(rows: slice, keys: slice, band: Band, device: torch.device) -> Tensor:
    back = torch.arange(rows.start, rows.stop, device=device)[:, None]
    back = back - torch.arange(keys.start, keys.stop, device=device)
    return back < 0 if band.window is None else (back < 0) | (back >= band.window)


def _scores(query: Tensor, key: Tensor, rows: slice, keys: slice, band: Band) -> Tensor:
    """Scores ``[B, H, rows, keys]``, at least in float32; scaled before the product, so that float16 does not pass."""
    product = _folded(query[:, :, rows] * band.scale, key) @ key[:, :, keys].mT
    return _unfolded(product.to(torch.promote_types(product.dtype, torch.float32)), query)


def _bent(scores: Tensor, band: Band) -> Tensor:
    return scores if band.softcap is None else scores.div_(band.softcap).tanh_()


def _capped(scores: Tensor, band: Band) -> Tensor:
    return _bent(scores, band).mul_(band.softcap) if band.softcap is not None else scores


def _folded(tensor: Tensor, key: Tensor) -> Tensor:
    """Query heads that share a key head one below the other: ``[B, H, rows, n]`` as ``[B, K, H / K · rows, n]``."""
    batch, heads, rows, width = tensor.shape
    return tensor.reshape(batch, key.shape[1], heads // key.shape[1] * rows, width)


def _unfolded(tensor: Tensor, query: Tensor) -> Tensor:
    """The other way."""
    batch, heads = query.shape[:2]
    return tensor.reshape(batch, heads, -1, tensor.shape[-1])
