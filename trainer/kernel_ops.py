"""Attention kernels by their own operators, for what `scaled_dot_product_attention` has no argument for.

A window: each token sees itself and the tokens before it, so many in all. Sinks: each head has a learned score that
takes part in the softmax and stands for no key. Both are exact, nothing of length S × S exists, and what is kept for
the backward pass is what the kernels keep anyway: query, key, value, output and one float32 for each query and head.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

ATEN = torch.ops.aten
CAUSAL_FROM_TOP_LEFT = 1  # of the memory-efficient kernel's masks
CPU_ROWS = 512  # queries that the CPU's kernel gets at a time, with a mask of so many rows and their keys


@dataclass(frozen=True)
class Band:
    """What a token sees: ``window`` tokens up to itself, None for all; scores are multiplied by ``scale``.

    With ``softcap`` scores are bent by tanh so that none passes it, which only blocks of plain products do.
    """

    window: int | None
    scale: float
    softcap: float | None = None


class Kernel(Protocol):
    """A kernel's forward and backward pass; query ``[B, H, S, E]``, key and value ``[B, K, S, E]``.

    The log-sum-exp is ``[B, H, S]`` or padded at its end; ``states`` is what else the backward pass wants.
    """

    def forward(self, query: Tensor, key: Tensor, value: Tensor, band: Band) -> tuple[Tensor, Tensor, tuple[Any, ...]]:
        """Output ``[B, H, S, E]``, log-sum-exp, states."""
        ...

    def backward(
        self, gradient: Tensor, saved: tuple[Tensor, Tensor, Tensor, Tensor, Tensor], states: Any, band: Band
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of query, key and value; ``saved`` are these three, output and log-sum-exp."""
        ...


class Flash:
    """The flash kernel, which has windows; it takes fewer key/value heads as they are."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, band: Band) -> tuple[Tensor, Tensor, tuple[Any, ...]]:
        """See `Kernel`."""
        q, k, v = (tensor.transpose(1, 2) for tensor in (query, key, value))
        length = q.shape[1]
        output, summed, state, unused, _ = ATEN._flash_attention_forward(
            q, k, v, None, None, length, length, 0.0, True, False, scale=band.scale, **self._window(band)
        )
        return output.transpose(1, 2), summed, (state, unused)

    def backward(
        self, gradient: Tensor, saved: tuple[Tensor, Tensor, Tensor, Tensor, Tensor], states: Any, band: Band
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `Kernel`."""
        query, key, value, output, summed = saved
        g, q, k, v, out = (tensor.transpose(1, 2) for tensor in (gradient, query, key, value, output))
        length = q.shape[1]
        found = ATEN._flash_attention_backward(
            g, q, k, v, out, summed, None, None, length, length, 0.0, True, *states, scale=band.scale,
            **self._window(band),
        )  # fmt: skip
        return tuple(tensor.transpose(1, 2) for tensor in found)

    def _window(self, band: Band) -> dict[str, int]:
        return {} if band.window is None else {"window_size_left": band.window - 1, "window_size_right": 0}


class Efficient:
    """The memory-efficient kernel, the one for Turing; key and value have a head for every query head."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, band: Band) -> tuple[Tensor, Tensor, tuple[Any, ...]]:
        """See `Kernel`."""
        q, k, v = (tensor.transpose(1, 2) for tensor in (query, key, value))
        output, summed, seed, offset, most_q, most_k = ATEN._efficient_attention_forward(
            q, k, v, None, None, None, None, None, 0.0, CAUSAL_FROM_TOP_LEFT, True, scale=band.scale,
            window_size=band.window,
        )  # fmt: skip
        return output.transpose(1, 2), summed, (most_q, most_k, seed, offset)

    def backward(
        self, gradient: Tensor, saved: tuple[Tensor, Tensor, Tensor, Tensor, Tensor], states: Any, band: Band
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `Kernel`."""
        query, key, value, output, summed = saved
        most_q, most_k, seed, offset = states
        g, q, k, v, out = (tensor.transpose(1, 2) for tensor in (gradient, query, key, value, output))
        # torch's own formula for this operator forgets the window, so it is given here.
        *found, _ = ATEN._efficient_attention_backward(
            g, q, k, v, None, out, None, None, most_q, most_k, summed, 0.0, seed, offset, CAUSAL_FROM_TOP_LEFT, False,
            scale=band.scale, window_size=band.window,
        )  # fmt: skip
        return tuple(tensor.transpose(1, 2) for tensor in found)


class Cpu:
    """The CPU's flash kernel, which has masks and no windows: some rows at a time, with the keys they see."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, band: Band) -> tuple[Tensor, Tensor, tuple[Any, ...]]:
        """See `Kernel`."""
        # Laid out as the query, like what the other kernels give.
        output, summed = torch.empty_like(query), query.new_empty(query.shape[:3], dtype=_wide(query.dtype))
        for rows, keys, options in self._parts(query, band):
            output[:, :, rows], summed[:, :, rows] = ATEN._scaled_dot_product_flash_attention_for_cpu(
                query[:, :, rows], key[:, :, keys], value[:, :, keys], **options
            )
        return output, summed, ()

    def backward(
        self, gradient: Tensor, saved: tuple[Tensor, Tensor, Tensor, Tensor, Tensor], states: Any, band: Band
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `Kernel`."""
        query, key, value, output, summed = saved
        of_query, of_key, of_value = torch.empty_like(query), torch.zeros_like(key), torch.zeros_like(value)
        for rows, keys, options in self._parts(query, band):
            causal = options.pop("is_causal", False)
            part = ATEN._scaled_dot_product_flash_attention_for_cpu_backward(
                gradient[:, :, rows], query[:, :, rows], key[:, :, keys], value[:, :, keys], output[:, :, rows],
                summed[:, :, rows], 0.0, causal, **options,
            )  # fmt: skip
            of_query[:, :, rows] = part[0]
            of_key[:, :, keys] += part[1]
            of_value[:, :, keys] += part[2]
        return of_query, of_key, of_value

    def _parts(self, query: Tensor, band: Band) -> Iterator[tuple[slice, slice, dict[str, Any]]]:
        length = query.shape[2]
        if band.window is None or band.window >= length:
            yield slice(0, length), slice(0, length), {"is_causal": True, "scale": band.scale}
            return
        for start in range(0, length, CPU_ROWS):
            stop, first = min(start + CPU_ROWS, length), max(0, start - band.window + 1)
            back = torch.arange(start, stop)[:, None] - torch.arange(first, stop)  # how far back a key lies
            mask = torch.zeros(back.shape, dtype=query.dtype)
            mask.masked_fill_((back < 0) | (back >= band.window), -torch.inf)
            yield slice(start, stop), slice(first, stop), {"attn_mask": mask, "scale": band.scale}


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, kernel: Kernel, band: Band, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None
    ) -> Tensor:
        output, summed, states = kernel.forward(query, key, value, band)
        if sinks is not None:
            # One more score in each row's softmax, whose value is nothing: the sum grows, and the output shrinks by
            # as much. With these two the kernel's own backward pass gives the right gradients.
            length = query.shape[2]
            grown = torch.logaddexp(summed[..., :length], sinks.to(summed.dtype)[:, None])
            output.mul_(torch.exp(summed[..., :length] - grown).unsqueeze(-1).to(output.dtype))
            summed[..., :length] = grown
        ctx.save_for_backward(query, key, value, output, summed)
        ctx.kernel, ctx.band, ctx.states = kernel, band, states
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        found = ctx.kernel.backward(gradients[0], ctx.saved_tensors, ctx.states, ctx.band)
        return None, None, *found, None


def attend_within(
    kernel: Kernel, query: Tensor, key: Tensor, value: Tensor, band: Band, sinks: Tensor | None = None
) -> Tensor:
    """Exact causal attention within a band, with or without a learned sink in each head.

    Args:
        query: ``[B, H, S, E]``; key and value ``[B, K, S, E]``, K being H where the kernel wants it.
        sinks: ``[H]``, frozen, or None.

    Returns:
        ``[B, H, S, E]``.
    """
    return _Attend.apply(kernel, band, query, key, value, sinks)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
