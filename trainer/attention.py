"""Exact causal attention through one named kernel, registered with transformers as an attention function.

Layers with a window that is shorter than the sequence, or with learned sinks, call the kernel's own operators
(`trainer.kernel_ops`), soft-capped scores go by blocks (`trainer.block_attention`); all others go through
`scaled_dot_product_attention`.

transformers builds no mask for an attention function it has no mask builder for, so nothing of size S × S ever
exists. Rows are causal from their first token and padded, if at all, on the right: a padded position is never
seen by a real one, so no padding mask is needed either.
"""

from __future__ import annotations

from typing import Any

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
        **_: Any,
    ) -> tuple[Tensor, None]:
        """Attend; query ``[B, H, S, E]``, key and value ``[B, K, S, E]``; gives ``[B, S, H, E]``.

        ``sliding_window``, ``s_aux`` (sinks ``[H]``) and ``softcap`` are how transformers hands them on.
        """
        assert attention_mask is None and dropout == 0.0
        assert softcap is None or kernel == BLOCKS, f"{kernel} caps no scores"
        groups = query.shape[1] // key.shape[1]
        if groups > 1 and not grouped:
            key, value = (tensor.repeat_interleave(groups, dim=1) for tensor in (key, value))
        # Kernels lay their output out as the query; in [B, S, H, E] order the output projection needs no copy of it.
        query = query.transpose(1, 2).contiguous().transpose(1, 2)
        window = sliding_window if sliding_window is not None and sliding_window < query.shape[2] else None
        if window is not None or s_aux is not None or backend is None:
            assert kernel in KERNEL_OPS, f"{kernel} has neither windows nor sinks"
            band = Band(window, query.shape[-1] ** -0.5 if scaling is None else scaling, softcap)
            return attend_within(KERNEL_OPS[kernel], query, key, value, band, s_aux).transpose(1, 2), None
        with sdpa_kernel(backend):
            attended = scaled_dot_product_attention(
                query, key, value, is_causal=True, scale=scaling, enable_gqa=groups > 1 and grouped
            )
        return attended.transpose(1, 2), None

    name = attention_name(kernel)
    AttentionInterface.register(name, attend)
    return name
