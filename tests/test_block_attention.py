"""Attention by blocks of queries against scores written out, in float64: caps, windows, sinks, blocks of any height."""

from __future__ import annotations

import pytest
import torch
from test_kernel_ops import SCALE, drawn
from torch import Tensor

from trainer import block_attention
from trainer.attention import BLOCKS, KERNEL_OPS
from trainer.kernel_ops import Band, attend_within


def written_out(query: Tensor, key: Tensor, value: Tensor, band: Band, sinks: Tensor | None) -> Tensor:
    """As Gemma 2's eager attention in transformers, with GPT-OSS's sinks."""
    length, groups = query.shape[2], query.shape[1] // key.shape[1]
    key, value = (tensor.repeat_interleave(groups, dim=1) for tensor in (key, value))
    scores = query @ key.transpose(2, 3) * band.scale
    if band.softcap is not None:
        scores = torch.tanh(scores / band.softcap) * band.softcap
    back = torch.arange(length)[:, None] - torch.arange(length)
    scores = scores.masked_fill((back < 0) | (back >= (band.window or length)), -torch.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks[None, :, None, None].expand(len(query), -1, length, 1)], dim=-1)
    return scores.softmax(-1)[..., :length] @ value


@pytest.mark.parametrize("softcap", [None, 0.4, 50.0])
@pytest.mark.parametrize("window", [None, 1, 7])
@pytest.mark.parametrize("sinks", [None, torch.tensor([-1.0, 0.0, 2.0, 30.0], dtype=torch.float64)], ids=("-", "sinks"))
@pytest.mark.parametrize("together", [1, 2 * 4 * 24 * 7, 2**24], ids=("one row", "7 rows", "all"))
def test_blocks_are_exact(
    monkeypatch: pytest.MonkeyPatch, softcap: float | None, window: int | None, sinks: Tensor | None, together: int
) -> None:
    monkeypatch.setattr(block_attention, "SCORES", together)
    band = Band(window, SCALE, softcap)
    for kv_heads in (1, 4):
        inputs = drawn(24, kv_heads)
        given = attend_within(KERNEL_OPS[BLOCKS], *inputs, band, sinks)
        wanted = written_out(*inputs, band, sinks)
        gradient = torch.randn_like(wanted)
        torch.testing.assert_close(given, wanted, rtol=1e-10, atol=1e-12)
        ours, theirs = (torch.autograd.grad(output, inputs, gradient) for output in (given, wanted))
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bits_differ_by_their_rounding(dtype: torch.dtype) -> None:
    inputs = drawn(300, 2)
    halves = [tensor.detach().to(dtype).requires_grad_() for tensor in inputs]
    wide = [tensor.detach().double().requires_grad_() for tensor in halves]
    band = Band(50, SCALE, 2.0)
    given, wanted = attend_within(KERNEL_OPS[BLOCKS], *halves, band), written_out(*wide, band, None)
    gradient = torch.randn_like(wanted)
    ours = torch.autograd.grad(given, halves, gradient.to(dtype))
    theirs = torch.autograd.grad(wanted, wide, gradient)
    for one, other in zip((given, *ours), (wanted, *theirs), strict=True):
        assert one.dtype == dtype
        assert (one.double() - other).norm() / other.norm() < 8 * torch.finfo(dtype).eps
