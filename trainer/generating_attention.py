"""Attention of new tokens to themselves and to all that a cache holds: exact, and without a mask of the prompt's size.

A chunk goes to a kernel once with the keys before it and once with its own, causally; the two are added by their
log-sum-exps. With a window the keys before it are a triangle, which read backwards is causal again. A learned sink is a
score more in each softmax, whose value is nothing. Where no kernel attends (soft-capped scores, or a plan without one)
scores are written out, some rows of the chunk at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from planner.generating import INSTEAD, SCORES
from trainer.streamed.kernels import KERNELS, Kernel
from trainer.streamed.windows import banded

ROOM = 16
"""Scores are written out so many times smaller: some models have scores that float16 does not reach."""


def register(kernel: str | None) -> str:
    """Make attention over a cache known to transformers, by a kernel of plans or with scores written out.

    transformers builds no mask for a name that it has no mask builder for.
    """
    found = KERNELS.get(INSTEAD.get(kernel or "", kernel or ""))
    name = f"tierplan_cache_{[*KERNELS].index(found.name) if found is not None else len(KERNELS)}"

    def attend(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        dropout: float = 0.0,
        sliding_window: int | None = None,
        s_aux: Tensor | None = None,
        softcap: float | None = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        """Query ``[B, H, q, E]``, key and value ``[B, K, k, E]``, the last q of them the query's own.

        Gives ``[B, q, H, E]``. ``sliding_window``, ``s_aux`` (sinks ``[H]``) and ``softcap`` are as transformers
        hands them on.
        """
        assert attention_mask is None and dropout == 0.0
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        window = sliding_window if sliding_window is not None and sliding_window < key.shape[2] else None
        if found is None or softcap is not None:
            attended = written_out(query, key, value, scale, window, s_aux, softcap)
        else:
            attended = by_kernel(found, query, key, value, scale, window, s_aux)
        return attended.transpose(1, 2), None

    AttentionInterface.register(name, attend)
    return name


def by_kernel(
    kernel: Kernel,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    window: int | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Causal attention of the last tokens, shapes as in ``register``; gives ``[B, H, q, E]``.

    B is 1 where more tokens than a window come at once.
    """
    assert window is None or query.shape[2] <= window or len(query) == 1
    new, before = query.shape[2], key.shape[2] - query.shape[2]
    if window is not None and before >= window:  # of a cache that keeps more than a window, as one that nothing passes
        key, value = key[:, :, before - window + 1 :], value[:, :, before - window + 1 :]
        before = window - 1
    if new == 1:  # it sees all that the cache gives
        output, sums = kernel.forward(query, key, value, False, scale)
    else:
        own = (query, key[:, :, before:], value[:, :, before:])
        output, sums = (
            kernel.forward(*own, True, scale) if window is None or new <= window else banded(kernel, own, window, scale)
        )
        for rows, part, part_sums in _of_past(kernel, query, key[:, :, :before], value[:, :, :before], window, scale):
            _add(output[:, :, rows], sums[:, :, rows], part, part_sums)
    if sinks is not None:
        grown = torch.logaddexp(sums, sinks.to(sums.dtype)[:, None])
        output.mul_(torch.exp(sums - grown).unsqueeze(-1))
    return output


def _of_past(
    kernel: Kernel, query: Tensor, key: Tensor, value: Tensor, window: int | None, scale: float
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """What queries see of the keys before them: which of them, output and log-sum-exp over these keys.

    Of P keys the query i sees those from i + P + 1 − window on.
    """
    before, every = key.shape[2], slice(None)
    if window is None:
        parts = [(every, every, False)] if before else []
    else:
        all_seen = window - 1 - before  # so many queries see every key
        last = min(query.shape[2], window - 1)
        falling = max(0, last - all_seen)  # the ones after these: from one to the next a key less
        parts = [
            (slice(0, last), slice(falling, before), False),
            (slice(0, all_seen), slice(0, falling), False),
            (slice(all_seen, last), slice(0, falling), True),
        ]
    for rows, keys, triangle in parts:
        q, k, v = query[:, :, rows], key[:, :, keys], value[:, :, keys]
        if not q.shape[2] or not k.shape[2]:
            continue
        if triangle:  # query r of these sees key r and those after it: both backwards, that is causal
            found = kernel.forward(q.flip(2), k.flip(2), v.flip(2), True, scale)
            yield rows, found[0].flip(2), found[1].flip(2)
        else:
            yield rows, *kernel.forward(q, k, v, False, scale)


def _add(output: Tensor, sums: Tensor, part: Tensor, part_sums: Tensor) -> None:
    """To output ``[B, H, q, E]`` and log-sum-exp over some keys those over others, in place."""
    wide = torch.promote_types(output.dtype, torch.float32)
    both = torch.logaddexp(sums.to(wide), part_sums.to(wide))
    added = output.to(wide, copy=True).mul_(torch.exp(sums.to(wide) - both).unsqueeze(-1))
    added.add_(part.to(wide).mul_(torch.exp(part_sums.to(wide) - both).unsqueeze(-1)))
    output.copy_(added)
    sums.copy_(both)


def written_out(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    window: int | None = None,
    sinks: Tensor | None = None,
    softcap: float | None = None,
) -> Tensor:
    """The same with scores, no more than ``SCORES`` of them at a time unless one row has more.

    Query heads that share a key head are rows of one product, so that nothing is repeated.
    """
    batch, heads, new, size = query.shape
    shared, length = key.shape[1], key.shape[2]
    before, group = length - new, heads // shared
    output = torch.empty_like(query)
    rows = max(1, SCORES // (batch * heads * length))
    places = torch.arange(length, device=query.device)
    for start in range(0, new, rows):
        stop = min(start + rows, new)
        some = (query[:, :, start:stop] * (scale / ROOM)).reshape(batch, shared, group * (stop - start), size)
        scores = some @ key.transpose(2, 3)
        weights = _weights(scores.view(batch, heads, stop - start, length), softcap)
        del scores
        if new > 1 or window is not None:
            back = torch.arange(before + start, before + stop, device=query.device)[:, None] - places
            hidden = back < 0 if window is None else (back < 0) | (back >= window)
            weights.masked_fill_(hidden, -torch.inf)
            del back, hidden
        if sinks is not None:  # one more score in each row's softmax, whose value is nothing
            beside = sinks.to(weights.dtype)[None, :, None, None].expand(*weights.shape[:3], 1)
            weights = torch.cat([weights, beside], dim=-1)
        weights = torch.softmax(weights, dim=-1).to(value.dtype)[..., :length]
        found = weights.reshape(batch, shared, group * (stop - start), length) @ value
        output[:, :, start:stop] = found.view(batch, heads, stop - start, size)
        del weights
    return output


def _weights(scores: Tensor, softcap: float | None) -> Tensor:
    """Scores in float32 or wider, as large as they are, capped."""
    wide = scores.to(torch.promote_types(scores.dtype, torch.float32), copy=True).mul_(ROOM)
    return wide if softcap is None else wide.div_(softcap).tanh_().mul_(softcap)
