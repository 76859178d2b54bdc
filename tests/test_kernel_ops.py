"""Windows and sinks by the kernels' own operators, against scores written out in float64."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from trainer import kernel_ops
from trainer.attention import KERNEL_OPS, KERNELS, register
from trainer.kernel_ops import Band, attend_within

SCALE = 0.3


def written_out(query: Tensor, key: Tensor, value: Tensor, window: int | None, sinks: Tensor | None) -> Tensor:
    """Attention as transformers' eager functions compute it."""
    length, groups = query.shape[2], query.shape[1] // key.shape[1]
    key, value = (tensor.repeat_interleave(groups, dim=1) for tensor in (key, value))
    back = torch.arange(length)[:, None] - torch.arange(length)
    unseen = (back < 0) | (back >= (window or length))
    scores = (query @ key.transpose(2, 3) * SCALE).masked_fill(unseen.to(query.device), -torch.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks[None, :, None, None].expand(len(query), -1, length, 1)], dim=-1)
    return scores.softmax(-1)[..., :length] @ value


def drawn(length: int, kv_heads: int, *, heads: int = 4, size: int = 16) -> tuple[Tensor, ...]:
    torch.manual_seed(length)
    return tuple(
        torch.randn(2, length, count, size, dtype=torch.float64).transpose(1, 2).requires_grad_()
        for count in (heads, kv_heads, kv_heads)
    )


@pytest.mark.parametrize("length", [1, 5, 40, 100])
@pytest.mark.parametrize("window", [None, 1, 7, 33, 64])
@pytest.mark.parametrize("sinks", [None, torch.tensor([-1.0, 0.0, 2.0, 30.0], dtype=torch.float64)], ids=("-", "sinks"))
def test_windows_and_sinks_are_exact(
    monkeypatch: pytest.MonkeyPatch, length: int, window: int | None, sinks: Tensor | None
) -> None:
    for rows, kv_heads in product((16, 512), (1, 2, 4)):
        monkeypatch.setattr(kernel_ops, "CPU_ROWS", rows)
        inputs = drawn(length, kv_heads)
        given = attend_within(KERNEL_OPS["cpu"], *inputs, Band(window, SCALE), sinks)
        wanted = written_out(*inputs, window, sinks)
        gradient = torch.randn_like(wanted)
        torch.testing.assert_close(given, wanted, rtol=1e-10, atol=1e-12)
        ours, theirs = (torch.autograd.grad(output, inputs, gradient) for output in (given, wanted))
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_output_lies_as_the_query_so_that_the_next_linear_copies_nothing() -> None:
    given = attend_within(KERNEL_OPS["cpu"], *drawn(9, 2), Band(4, SCALE))
    assert given.transpose(1, 2).is_contiguous()


def test_a_window_as_long_as_the_sequence_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """So a kernel without windows will do, and it is the same call as in models that have none."""
    monkeypatch.setattr("trainer.attention.attend_within", None)
    attend = AttentionInterface()[register("cpu")]
    inputs = drawn(9, 2)
    given, _ = attend(nn.Module(), *inputs, None, scaling=SCALE, sliding_window=9)
    torch.testing.assert_close(given.transpose(1, 2), written_out(*inputs, None, None))


def test_every_kernel_but_cudnn_has_windows() -> None:
    assert set(KERNELS) - set(KERNEL_OPS) == {"cudnn"}
    attend = AttentionInterface()[register("cudnn")]
    with pytest.raises(AssertionError, match="neither windows"):
        attend(nn.Module(), *drawn(9, 4), None, scaling=SCALE, sliding_window=4)


def test_operators_have_the_arguments_that_are_given() -> None:
    """Nothing here runs these two; a release that renames an argument is noticed all the same."""
    names = {
        name: {argument.name for argument in getattr(torch.ops.aten, name).default._schema.arguments}
        for name in (
            "_flash_attention_forward", "_flash_attention_backward", "_efficient_attention_forward",
            "_efficient_attention_backward",
        )
    }  # fmt: skip
    for name, arguments in names.items():
        wanted = {"window_size"} if "efficient" in name else {"window_size_left", "window_size_right"}
        assert wanted | {"scale"} <= arguments, name


CARD = pytest.mark.skipif(not torch.cuda.is_available(), reason="a card's kernels run on a card")


@CARD
@pytest.mark.parametrize("kernel", ["flash", "efficient"])
@pytest.mark.parametrize("window", [None, 128, 1000])
@pytest.mark.parametrize("sinks", [False, True])
def test_kernels_of_a_card(kernel: str, window: int | None, sinks: bool) -> None:
    inputs = drawn(1500, 4 if kernel == "efficient" else 2, size=64)
    scores = torch.tensor([-1.0, 0.0, 1.0, 3.0], dtype=torch.float64) if sinks else None
    halves = [tensor.detach().half().cuda().requires_grad_() for tensor in inputs]
    given = attend_within(
        KERNEL_OPS[kernel], *halves, Band(window, SCALE), None if scores is None else scores.half().cuda()
    )
    wide = [tensor.detach().double().cpu().requires_grad_() for tensor in halves]
    wanted = written_out(*wide, window, scores)
    gradient = torch.randn_like(wanted)
    ours = torch.autograd.grad(given, halves, gradient.half().cuda())
    theirs = torch.autograd.grad(wanted, wide, gradient)
    for one, other in zip((given, *ours), (wanted, *theirs), strict=True):
        assert (one.double().cpu() - other).norm() / other.norm() < 3e-3
