"""Exact causal attention through one named kernel, registered with transformers as an attention function.

Layers with a window that is shorter than the sequence, or with learned sinks, call the kernel's own operators
(`trainer.kernel_ops`), soft-capped scores go by blocks (`trainer.block_attention`); all others go through
`scaled_dot_product_attention`.

transformers builds no mask for an attention function it has no mask builder for, so nothing of size S × S ever
exists. Rows are causal from their first token and padded, if at all, on the right: a padded position is never
seen by a real one, so no padding mask is needed either.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from trainer.block_attention import Blocks
from trainer.kernel_ops import Band, Cpu, Efficient, Flash, Kernel, attend_within

KERNELS: dict[str, SDPBackend] = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cpu": SDPBackend.FLASH_ATTENTION,
}
BLOCKS = "blocks"
KERNEL_OPS: dict[str, Kernel] = {"flash": Flash(), "efficient": Efficient(), "cpu": Cpu(), BLOCKS: Blocks()}
"""By name in plans. cuDNN's operator has neither windows nor a log-sum-exp that may be changed."""
NAMES = (*KERNELS, BLOCKS)
# Kernels that take fewer key/value heads than query heads as they are (torch 2.11 to 2.13, sdp_utils).
GROUPED = frozenset({"cudnn", "flash", "cpu", BLOCKS})


Lengths = tuple[tuple[int, ...], ...]
"""For each row of a batch the inputs of its documents, padding counted as one."""


def by_document(
    causal: Callable[[Tensor, Tensor, Tensor], Tensor], query: Tensor, key: Tensor, value: Tensor, documents: Lengths
) -> Tensor:
    """Attention of each document to itself, one call for each; shapes as in ``register``.

    Tensors are split, not sliced: the gradient of a slice is a tensor of the whole's size.
    """
    rows, heads, tokens, size = query.shape
    pieces = (
        piece
        for *row, lengths in zip(query.split(1), key.split(1), value.split(1), documents, strict=True)
        for piece in zip(*(tensor.split(list(lengths), dim=2) for tensor in row), strict=True)
    )
    if torch.is_grad_enabled():
        joined = torch.cat([causal(*piece) for piece in pieces], dim=1)
    else:  # nothing is saved, so one document's output is there at a time
        joined, start = query.new_empty(1, rows * tokens, heads, size), 0
        for piece in pieces:
            stop = start + piece[0].shape[2]
            joined[:, start:stop] = causal(*piece)
            start = stop
    return joined.view(rows, tokens, heads, size)


def attention_name(kernel: str) -> str:
    """The name under which the kernel is registered with transformers.

    transformers takes every name with "flash" in it for a package of its own to load, so a number stands there.
    """
    return f"tierplan_kernel_{NAMES.index(kernel)}"


def register(kernel: str) -> str:
    """Make the kernel known to transformers as an attention function, and return its name there."""
    from transformers import AttentionInterface

    backend, grouped = KERNELS.get(kernel), kernel in GROUPED

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
        documents: Lengths | None = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        """Attend; query ``[B, H, S, E]``, key and value ``[B, K, S, E]``; gives ``[B, S, H, E]``.

        ``sliding_window``, ``s_aux`` (sinks ``[H]``) and ``softcap`` are how transformers hands them on.
        Each document of a row attends to itself alone, where ``documents`` says what they are.
        """
        assert attention_mask is None and dropout == 0.0
        assert softcap is None or kernel == BLOCKS, f"{kernel} caps no scores"
        groups = query.shape[1] // key.shape[1]
        if groups > 1 and not grouped:
            key, value = (tensor.repeat_interleave(groups, dim=1) for tensor in (key, value))
        # Kernels lay their output out as the query; in [B, S, H, E] order the output projection needs no copy of it.
        query = query.transpose(1, 2).contiguous().transpose(1, 2)
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling

        def causal(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            window = sliding_window if sliding_window is not None and sliding_window < query.shape[2] else None
            if window is not None or s_aux is not None or backend is None:
                assert kernel in KERNEL_OPS, f"{kernel} has neither windows nor sinks"
                band = Band(window, scale, softcap)
                return attend_within(KERNEL_OPS[kernel], query, key, value, band, s_aux).transpose(1, 2)
            with sdpa_kernel(backend):
                attended = scaled_dot_product_attention(
                    query, key, value, is_causal=True, scale=scaling, enable_gqa=groups > 1 and grouped
                )
            return attended.transpose(1, 2)

        if documents is None:
            return causal(query, key, value), None
        return by_document(causal, query, key, value, documents), None

    name = attention_name(kernel)
    AttentionInterface.register(name, attend)
    return name
