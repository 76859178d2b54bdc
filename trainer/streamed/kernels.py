"""Attention kernels by their own forward and backward calls, which give and take the log-sum-exp of the scores.

With output and log-sum-exp kept, the backward pass of any block of a sequence can be computed alone, at any later time:
autograd's way would compute the forward pass once more for that. All take ``[b, h, s, E]``, are causal over square
blocks or see every key, and never hold the scores.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

_OPS: Any = torch.ops.aten
_LSE_PADDING = 32  # the memory-efficient kernel pads queries to a multiple of this in its log-sum-exp


class Kernel(Protocol):
    """One exact kernel; ``name`` is its name in plans. Fewer key heads than query heads are taken as they are."""

    name: str

    def forward(self, query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
        """Query ``[b, H, s, E]``, key and value ``[b, K, t, E]``; causal needs s = t.

        Gives the output ``[b, H, s, E]`` and the natural log-sum-exp of the scaled scores ``[b, H, s]``.
        """
        ...

    def backward(
        self,
        gradient: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        output: Tensor,
        log_sum_exp: Tensor,
        causal: bool,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of query, key and value.

        Output and log-sum-exp are those over all keys of a query; those of this block may be a part of them.
        """
        ...


class Cpu:
    """The CPU's flash kernel, in float64 as well."""

    name = "cpu"

    def forward(self, query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
        """See `Kernel`."""
        output, log_sum_exp = _OPS._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, causal, scale=scale
        )
        return output, log_sum_exp

    def backward(
        self,
        gradient: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        output: Tensor,
        log_sum_exp: Tensor,
        causal: bool,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `Kernel`."""
        return _OPS._scaled_dot_product_flash_attention_for_cpu_backward(
            gradient, query, key, value, output, log_sum_exp, 0.0, causal, scale=scale
        )


class Flash:
    """FlashAttention-2 as PyTorch ships it: compute capability 8.0 and up, 16 bits."""

    name = "flash"

    def forward(self, query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
        """See `Kernel`."""
        output, log_sum_exp, *_ = _OPS._scaled_dot_product_flash_attention(
            query, key, value, 0.0, causal, False, scale=scale
        )
        return output, log_sum_exp

    def backward(
        self,
        gradient: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        output: Tensor,
        log_sum_exp: Tensor,
        causal: bool,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `Kernel`."""
        seed, offset = _no_dropout(query)
        return _OPS._scaled_dot_product_flash_attention_backward(
            gradient, query, key, value, output, _closed(log_sum_exp), None, None, query.shape[2], key.shape[2],
            0.0, causal, seed, offset, scale=scale,
        )  # fmt: skip


class Cudnn:
    """cuDNN's fused attention: compute capability 8.0 and up, 16 bits; the fastest on Hopper."""

    name = "cudnn"

    def forward(self, query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
        """See `Kernel`."""
        output, log_sum_exp, *_ = _OPS._scaled_dot_product_cudnn_attention(
            query, key, value, None, True, 0.0, causal, False, scale=scale
        )
        return output, log_sum_exp.view(query.shape[:3])

    def backward(
        self,
        gradient: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        output: Tensor,
        log_sum_exp: Tensor,
        causal: bool,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `Kernel`."""
        seed, offset = _no_dropout(query)
        return _OPS._scaled_dot_product_cudnn_attention_backward(
            gradient, query, key, value, output, _closed(log_sum_exp).unsqueeze(-1), seed, offset, None, None, None,
            query.shape[2], key.shape[2], 0.0, causal, scale=scale,
        )  # fmt: skip


class Efficient:
    """The memory-efficient kernel: every card from compute capability 5.0 on; the one for Turing.

    It wants a key and a value for each query head: one of either is shown to several without being copied.
    """

    name = "efficient"

    def forward(self, query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
        """See `Kernel`."""
        found = [
            _OPS._scaled_dot_product_efficient_attention(*each, None, True, 0.0, causal, scale=scale)[:2]
            for each in _by_key_head(query, key, value)
        ]
        output, log_sum_exp = (_together(each) for each in zip(*found, strict=True))
        return output, log_sum_exp[..., : query.shape[2]]

    def backward(
        self,
        gradient: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        output: Tensor,
        log_sum_exp: Tensor,
        causal: bool,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `Kernel`."""
        seed, offset = _no_dropout(query)
        short = -query.shape[2] % _LSE_PADDING
        padded = torch.nn.functional.pad(log_sum_exp, (0, short), value=float("inf"))
        shared = query.shape[1] > key.shape[1]
        count = key.shape[1] if shared else 1
        each_head = zip(
            _by_key_head(query, key, value), *(each.chunk(count, 1) for each in (gradient, output, padded)), strict=True
        )
        found = []
        for (q, k, v), grad, out, sums in each_head:
            dq, dk, dv, _ = _OPS._scaled_dot_product_efficient_attention_backward(
                grad, q, k, v, None, _as_made(out), sums.contiguous(), seed, offset, 0.0,
                [True, True, True, False], causal, scale=scale,
            )  # fmt: skip
            found.append((dq, dk.sum(1, keepdim=True) if shared else dk, dv.sum(1, keepdim=True) if shared else dv))
        dq, dk, dv = (_together(each) for each in zip(*found, strict=True))
        return dq, dk, dv


def _by_key_head(query: Tensor, key: Tensor, value: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Each key and value head, shown to every query head that reads it, with these; all at once if each has its own."""
    heads, groups = key.shape[1], query.shape[1] // key.shape[1]
    if groups == 1:
        return [(query, key, value)]
    parts = zip(query.chunk(heads, 1), key.chunk(heads, 1), value.chunk(heads, 1), strict=True)
    return [(q, k.expand(-1, groups, -1, -1), v.expand(-1, groups, -1, -1)) for q, k, v in parts]


def _closed(log_sum_exp: Tensor) -> Tensor:
    """The log-sum-exp without gaps, as where a document is a part of a row.

    Flash and cuDNN take it to be so whatever the strides say, and give wrong gradients otherwise: seen on an H100.
    """
    return log_sum_exp.contiguous()


def _as_made(output: Tensor) -> Tensor:
    """An output ``[b, H, s, E]`` laid out as the kernel gave it, token by token.

    Its backward pass takes it to be so whatever the strides say, and gives wrong gradients otherwise.
    """
    return output.transpose(1, 2).contiguous().transpose(1, 2)


def _together(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), 1)


def _no_dropout(like: Tensor) -> tuple[Tensor, Tensor]:
    """The random state of a dropout that there is none of."""
    zero = torch.zeros((), dtype=torch.int64, device=like.device)
    return zero, zero


KERNELS: dict[str, Kernel] = {kernel.name: kernel for kernel in (Cudnn(), Flash(), Efficient(), Cpu())}
