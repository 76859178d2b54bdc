"""Attention of new tokens to themselves and to all that a cache holds: exact, and without a mask of the prompt's size.

Where a kernel attends, a chunk goes once to the keys before it, all of which it sees, and once to its own, causally;
the two are added by their log-sum-exps. Where none does (layers with a window, soft-capped scores, learned sinks)
scores are written out, some rows of the chunk at a time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from planner.generating import INSTEAD, SCORES
from trainer.streamed.kernels import KERNELS, Kernel

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
        if found is None or window is not None or s_aux is not None or softcap is not None:
            attended = written_out(query, key, value, scale, window, s_aux, softcap)
        else:
            attended = by_kernel(found, query, key, value, scale)
        return attended.transpose(1, 2), None

    AttentionInterface.register(name, attend)
    return name


def by_kernel(kernel: Kernel, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Causal attention of the last tokens, shapes as in ``register``; gives ``[B, H, q, E]``."""
    new = query.shape[2]
    if new == 1:  # it sees all there is
        return kernel.forward(query, key, value, False, scale)[0]
    before = key.shape[2] - new
    own, sums = kernel.forward(query, key[:, :, before:], value[:, :, before:], True, scale)
    if not before:
        return own
    past, of_past = kernel.forward(query, key[:, :, :before], value[:, :, :before], False, scale)
    wide = torch.promote_types(own.dtype, torch.float32)
    both = torch.logaddexp(sums.to(wide), of_past.to(wide))
    added = own.to(wide, copy=True).mul_(torch.exp(sums.to(wide) - both).unsqueeze(-1))
    added.add_(past.to(wide).mul_(torch.exp(of_past.to(wide) - both).unsqueeze(-1)))
    return added.to(own.dtype)


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
