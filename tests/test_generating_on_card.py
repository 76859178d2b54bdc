"""Attention over a cache by a card's own kernels: windows turned backwards, what is before, sinks.

In float32 as float64 says on the CPU, to float32's digits; in 16 bits no further from it than scores that are written
out in the same 16 bits. Without a card none of it runs.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from trainer.generating_attention import by_kernel, written_out
from trainer.streamed.kernels import KERNELS

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a card")
CARD = torch.device("cuda", 0)
BEFORE = (0, 1, 255, 300, 1000)
SCALE = 0.125


def _some(new: int, before: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Query, key, value and sinks of one row in float64, eight heads over two."""
    generator = torch.Generator().manual_seed(new + 7 * before)

    def some(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    length = new + before
    return some(1, 8, new, 64), some(1, 2, length, 64), some(1, 2, length, 64), some(8)


@pytest.mark.parametrize("sinks", [False, True], ids=["plain", "sinks"])
@pytest.mark.parametrize("window", [None, 2, 256])
@pytest.mark.parametrize("new", [1, 2, 200, 700])
def test_in_float32_as_float64_says(new: int, window: int | None, sinks: bool) -> None:
    for before in BEFORE:
        *parts, own = _some(new, before)
        each = own if sinks else None
        wanted = written_out(*parts, SCALE, window, each)
        on_card = [part.float().to(CARD) for part in parts]
        sinks_there = None if each is None else each.float().to(CARD)
        found = by_kernel(KERNELS["efficient"], *on_card, SCALE, window, sinks_there).double().cpu()
        assert (found - wanted).norm() <= 2e-6 * wanted.norm(), before


@pytest.mark.parametrize("kernel", ["flash", "efficient", "cudnn"])
@pytest.mark.parametrize("window", [None, 2, 256])
@pytest.mark.parametrize("new", [1, 2, 200, 700])
def test_in_16_bits_as_near_as_scores_written_out(new: int, window: int | None, kernel: str) -> None:
    if kernel != "efficient" and torch.cuda.get_device_capability() < (8, 0):
        pytest.skip(f"{kernel} needs compute capability 8.0")
    for before in BEFORE:
        *parts, _ = _some(new, before)
        rounded = [part.bfloat16() for part in parts]
        wanted = written_out(*(part.double() for part in rounded), SCALE, window)
        on_card = [part.to(CARD) for part in rounded]
        off = (by_kernel(KERNELS[kernel], *on_card, SCALE, window).double().cpu() - wanted).norm()
        stock = (written_out(*on_card, SCALE, window).double().cpu() - wanted).norm()
        assert off <= 1.5 * stock + 1e-4 * wanted.norm(), before
