"""Attention of spans and windows, and of kernels' own calls, against scores that are written out, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from trainer.streamed.kernels import KERNELS
from trainer.streamed.tiles import attend, attend_backward
from trainer.streamed.windows import merge

SCALE = 0.3


def _written_out(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    spans: list[tuple[int, int]],
    window: int | None,
    scale: float = SCALE,
) -> Tensor:
    groups, length = query.shape[0] // key.shape[0], query.shape[1]
    key, value = key.repeat_interleave(groups, 0), value.repeat_interleave(groups, 0)
    place = torch.arange(length, device=query.device)
    document = torch.cat([torch.full((stop - start,), index) for index, (start, stop) in enumerate(spans)]).to(
        query.device
    )
    back = place[:, None] - place[None]
    seen = (back >= 0) & (back < (window or length)) & (document[:, None] == document[None])
    return (query @ key.transpose(1, 2) * scale).masked_fill(~seen, -torch.inf).softmax(-1) @ value


@pytest.mark.parametrize("stretch", [8192, 7, 1])  # several of them, each with the block of keys before it
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (3, 1)], ids=str)
@pytest.mark.parametrize("spans", [[(0, 29)], [(0, 1), (1, 12), (12, 29)]], ids=str)
@pytest.mark.parametrize("window", [None, 1, 2, 5, 8, 28, 29, 64])
def test_forward_and_backward(
    monkeypatch: pytest.MonkeyPatch,
    heads: tuple[int, int],
    spans: list[tuple[int, int]],
    window: int | None,
    stretch: int,
) -> None:
    monkeypatch.setattr("trainer.streamed.windows.STRETCH", stretch)
    generator = torch.Generator().manual_seed(5)

    def made(count: int) -> Tensor:
        return torch.randn(count, 29, 8, generator=generator, dtype=torch.float64)

    query, key, value, gradient = made(heads[0]), made(heads[1]), made(heads[1]), made(heads[0])
    wanted_inputs = [each.clone().requires_grad_() for each in (query, key, value)]
    wanted = _written_out(*wanted_inputs, spans, window)
    wanted_gradients = torch.autograd.grad(wanted, wanted_inputs, gradient)

    output, sums = attend(KERNELS["cpu"], query, key, value, spans, window, SCALE)
    made_gradients = attend_backward(KERNELS["cpu"], gradient, query, key, value, output, sums, spans, window, SCALE)

    torch.testing.assert_close(output, wanted.detach(), rtol=1e-12, atol=1e-13)
    for mine, theirs in zip(made_gradients, wanted_gradients, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-12)


def test_merging_two_halves_of_the_keys_gives_the_whole() -> None:
    generator = torch.Generator().manual_seed(6)
    query, key, value = (torch.randn(1, 2, 16, 8, generator=generator, dtype=torch.float64) for _ in range(3))
    kernel = KERNELS["cpu"]
    whole, whole_sums = kernel.forward(query, key, value, False, SCALE)
    halves = [
        kernel.forward(query, key[:, :, part], value[:, :, part], False, SCALE) for part in (slice(5), slice(5, 16))
    ]
    output, sums = merge(*halves[0], *halves[1])
    torch.testing.assert_close(output, whole, rtol=1e-13, atol=1e-14)
    torch.testing.assert_close(sums, whole_sums, rtol=1e-13, atol=1e-14)


class _Seen:
    """Stands in for torch's operators and keeps what a backward pass is called with."""

    def __init__(self) -> None:
        self.given: tuple[object, ...] = ()

    def __getattr__(self, name: str) -> object:
        def call(*given: object, **named: object) -> tuple[None, None, None]:
            self.given = given
            return None, None, None

        return call


@pytest.mark.parametrize("name", ["flash", "cudnn"])
def test_kernels_that_take_no_strides_get_sums_without_gaps(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """A document is a part of a row: its log-sum-exp has gaps between heads, over which these kernels would read."""
    seen = _Seen()
    monkeypatch.setattr("trainer.streamed.kernels._OPS", seen)
    sums = torch.randn(1, 3, 20)[:, :, 5:12]
    rows = torch.randn(1, 3, 7, 8)
    assert not sums.is_contiguous()
    KERNELS[name].backward(rows, rows, rows, rows, rows, sums, True, SCALE)
    handed = seen.given[5]
    assert isinstance(handed, Tensor) and handed.is_contiguous() and torch.equal(handed.view(1, 3, 7), sums)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a card")
@pytest.mark.parametrize("name", ["cudnn", "flash", "efficient"])
@pytest.mark.parametrize("size", [64, 80, 128])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1), (1, 1)], ids=str)
@pytest.mark.parametrize("window", [None, 128])
def test_kernels_of_a_card_keep_documents_apart(
    name: str, size: int, heads: tuple[int, int], window: int | None
) -> None:
    """In bfloat16 within a hundredth of scores that are written out in float32; 2,048 tokens in three documents."""
    spans, scale = [(0, 300), (300, 1000), (1000, 2048)], size**-0.5
    generator = torch.Generator("cuda").manual_seed(7)

    def made(count: int) -> Tensor:
        return torch.randn(count, 2048, size, generator=generator, device="cuda").bfloat16()

    query, key, value, gradient = made(heads[0]), made(heads[1]), made(heads[1]), made(heads[0])
    output, sums = attend(KERNELS[name], query, key, value, spans, window, scale)
    mine = attend_backward(KERNELS[name], gradient, query, key, value, output, sums, spans, window, scale)
    inputs = [each.float().requires_grad_() for each in (query, key, value)]
    wanted = _written_out(*inputs, spans, window, scale)
    theirs = torch.autograd.grad(wanted, inputs, gradient.float())
    for one, other in zip((output, *mine), (wanted.detach(), *theirs), strict=True):
        assert float((one.float() - other).norm() / other.norm()) < 0.01
