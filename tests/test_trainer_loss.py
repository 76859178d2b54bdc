"""The chunked loss against PyTorch's cross-entropy, in every dtype it is used in."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import cross_entropy

from trainer.loss import chunked_cross_entropy


def _case(tokens: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, 24, generator=generator, dtype=torch.float64)
    weight = torch.randn(53, 24, generator=generator, dtype=torch.float64)
    bias = torch.randn(53, generator=generator, dtype=torch.float64)
    targets = torch.randint(53, (tokens,), generator=generator)
    return hidden.to(dtype), weight.to(dtype), bias.to(dtype), targets


def _whole(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Loss summed and its gradient, in float64 from the same rounded numbers."""
    wide = hidden.double().requires_grad_()
    logits = wide @ weight.double().t() + (0 if bias is None else bias.double())
    loss = cross_entropy(logits, targets, reduction="sum")
    loss.backward()
    assert wide.grad is not None
    return loss.detach(), wide.grad


@given(tokens=st.integers(1, 40), rows=st.integers(1, 50), biased=st.booleans(), seed=st.integers(0, 9))
@settings(deadline=None, max_examples=60)
def test_float64_equals_cross_entropy(tokens: int, rows: int, biased: bool, seed: int) -> None:
    hidden, weight, bias, targets = _case(tokens, torch.float64, seed)
    hidden.requires_grad_()
    divisor = torch.tensor(7.0, dtype=torch.float64)
    loss = chunked_cross_entropy(hidden, weight, bias if biased else None, targets, rows=rows, divisor=divisor)
    (3 * loss).backward()
    wanted, gradient = _whole(hidden.detach(), weight, bias if biased else None, targets)
    torch.testing.assert_close(loss.detach(), wanted / 7, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(hidden.grad, 3 * gradient / 7, rtol=1e-12, atol=1e-12)


@given(
    tokens=st.integers(1, 40),
    rows=st.integers(1, 50),
    biased=st.booleans(),
    seed=st.integers(0, 9),
    smoothing=st.sampled_from([0.05, 0.1, 0.5, 0.9]),
    softcap=st.sampled_from([None, 3.0]),
)
@settings(deadline=None, max_examples=60)
def test_a_smoothed_loss_is_that_of_torch(
    tokens: int, rows: int, biased: bool, seed: int, smoothing: float, softcap: float | None
) -> None:
    hidden, weight, bias, targets = _case(tokens, torch.float64, seed)
    divisor, given_bias = torch.tensor(7.0, dtype=torch.float64), bias if biased else None
    found = []
    for whole in (False, True):
        rows_of = hidden.clone().requires_grad_()
        if whole:
            logits = rows_of @ weight.t() + (0 if given_bias is None else given_bias)
            logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
            loss = cross_entropy(logits, targets, reduction="sum", label_smoothing=smoothing) / divisor
        else:
            loss = chunked_cross_entropy(
                rows_of,
                weight,
                given_bias,
                targets,
                rows=rows,
                divisor=divisor,
                softcap=softcap,
                smoothing=smoothing,
            )
        (3 * loss).backward()
        found.append((loss.detach(), rows_of.grad))
    torch.testing.assert_close(found[0], found[1], rtol=1e-12, atol=1e-12)


def test_what_is_judged_is_not_smoothed() -> None:
    hidden, weight, bias, targets = _case(9, torch.float64)
    given = {"rows": 4, "divisor": torch.tensor(9.0, dtype=torch.float64)}
    plain, smoothed = (
        chunked_cross_entropy(hidden, weight, bias, targets, smoothing=share, **given)  # type: ignore[arg-type]
        for share in (0.0, 0.3)
    )
    assert torch.equal(plain, smoothed)
    trained = chunked_cross_entropy(hidden.requires_grad_(), weight, bias, targets, smoothing=0.3, **given)  # type: ignore[arg-type]
    assert trained.item() != plain.item()


@pytest.mark.parametrize(("dtype", "loss_error", "gradient_error"), [
    (torch.float32, 1e-6, 1e-6),
    (torch.float16, 1e-3, 2e-3),
    (torch.bfloat16, 8e-3, 1e-2),
])  # fmt: skip
def test_sixteen_bits_round_like_sixteen_bits(dtype: torch.dtype, loss_error: float, gradient_error: float) -> None:
    hidden, weight, bias, targets = _case(37, dtype)
    hidden.requires_grad_()
    loss = chunked_cross_entropy(hidden, weight, bias, targets, rows=8, divisor=torch.tensor(37.0))
    loss.backward()
    wanted, gradient = _whole(hidden.detach(), weight, bias, targets)
    assert loss.dtype == torch.float32 and hidden.grad is not None and hidden.grad.dtype == dtype
    assert abs(loss.detach().double() / (wanted / 37) - 1) < loss_error
    assert (hidden.grad.double() - gradient / 37).norm() / (gradient / 37).norm() < gradient_error


def test_float16_gradient_survives_a_large_divisor_under_a_loss_scale() -> None:
    """A mean over 100,000 tokens alone would push half of these gradients below float16's smallest number."""
    hidden, weight, bias, targets = _case(16, torch.float16)
    hidden.requires_grad_()
    loss = chunked_cross_entropy(hidden, weight, bias, targets, rows=4, divisor=torch.tensor(100_000.0))
    (loss * 65536.0).backward()
    _, gradient = _whole(hidden.detach(), weight, bias, targets)
    wanted = gradient * 65536 / 100_000
    assert hidden.grad is not None
    assert (hidden.grad.double() - wanted).norm() / wanted.norm() < 2e-3


def test_without_gradient_the_hidden_states_stay_as_they_are() -> None:
    hidden, weight, bias, targets = _case(11, torch.float64)
    before = hidden.clone()
    loss = chunked_cross_entropy(hidden, weight, bias, targets, rows=4, divisor=torch.tensor(11.0))
    assert torch.equal(hidden, before) and not loss.requires_grad
    torch.testing.assert_close(loss, _whole(hidden, weight, bias, targets)[0] / 11)


def test_trainable_head_and_no_rows_are_refused() -> None:
    hidden, weight, bias, targets = _case(3, torch.float32)
    with pytest.raises(ValueError, match="trainable"):
        chunked_cross_entropy(hidden, weight.requires_grad_(), None, targets, rows=4, divisor=torch.tensor(1.0))
    with pytest.raises(ValueError, match="rows"):
        chunked_cross_entropy(hidden, weight.detach(), bias, targets, rows=0, divisor=torch.tensor(1.0))
