"""Attention kernels, lean adapters, checkpointing's refusals, and the optimiser step, each alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn.functional import linear, scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AttentionInterface

from planner.errors import PlanError
from trainer import measure
from trainer.adapters import make_lean, trainable_to_float32
from trainer.attention import KERNELS, attention_name, register
from trainer.checkpointing import DeviceStore, checkpoint_layers
from trainer.counting import TensorBytes
from trainer.four_bit import FUSED_ROWS, FourBit, multiplied, quantised
from trainer.gradients import Shaping
from trainer.measure import Recorder
from trainer.step import Evaluation, update


class _Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(12, 20), nn.Linear(20, 6, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.first(x)))


def _adapted(**options: object) -> nn.Module:
    torch.manual_seed(1)
    config = LoraConfig(r=3, lora_alpha=6, target_modules=["first", "second"], init_lora_weights=False, **options)
    return get_peft_model(_Two(), config)


@pytest.mark.parametrize("shape", [(7, 12), (2, 7, 12), (2, 3, 7, 12)], ids=str)
def test_lean_forward_is_peft_s(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    plain, lean = _adapted(), _adapted()
    assert make_lean(lean) == 2
    wanted = plain(x)
    wanted.square().sum().backward()
    given = lean(x)
    given.square().sum().backward()
    torch.testing.assert_close(given, wanted)
    for one, other in zip(lean.parameters(), plain.parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None)
        if other.grad is not None:
            torch.testing.assert_close(one.grad, other.grad)


def test_lean_forward_knows_when_adapters_are_off() -> None:
    lean, x = _adapted(), torch.randn(4, 12)
    make_lean(lean)
    with lean.disable_adapter():
        off = lean(x)
    torch.manual_seed(1)
    torch.testing.assert_close(off, _Two()(x))


@pytest.mark.parametrize("options", [{"lora_dropout": 0.1}, {"use_dora": True}], ids=str)
def test_lean_forward_refuses_what_it_does_not_compute(options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="plain LoRA"):
        make_lean(_adapted(**options))


def test_adapters_are_float32_under_sixteen_bits() -> None:
    model = _adapted().to(torch.bfloat16)
    trainable_to_float32(model)
    make_lean(model)
    x = torch.randn(5, 12, dtype=torch.bfloat16)
    output = model(x)
    output.float().sum().backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert output.dtype == torch.bfloat16
    assert {p.dtype for p in trained} == {torch.float32} == {p.grad.dtype for p in trained if p.grad is not None}


def test_registered_kernel_is_exact_and_gets_fewer_key_heads() -> None:
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, heads, 33, 16, dtype=torch.float64) for heads in (4, 2, 2))
    attend = AttentionInterface()[register("cpu")]
    given, _ = attend(nn.Module(), query, key, value, None, scaling=0.2)
    mask = torch.ones(33, 33, dtype=torch.bool).tril()
    wanted = scaled_dot_product_attention(
        query, key.repeat_interleave(2, 1), value.repeat_interleave(2, 1), attn_mask=mask, scale=0.2
    )
    torch.testing.assert_close(given, wanted.transpose(1, 2))


def test_kernel_names_do_not_make_transformers_load_a_package() -> None:
    names = {attention_name(kernel) for kernel in KERNELS}
    assert len(names) == len(KERNELS) and not any("flash" in name for name in names)


def test_checkpointing_refuses_dropout() -> None:
    with pytest.raises(ValueError, match=r"dropout 0\.3"):
        checkpoint_layers(nn.ModuleList([nn.Sequential(nn.Dropout(0.3))]), DeviceStore())


def test_counted_bytes_are_those_of_live_tensors() -> None:
    weight = torch.zeros(100, 50)
    with TensorBytes([weight]) as counter:
        counter.mark("forward")
        x = torch.zeros(10, 50)
        y = linear(x, weight)
        view = y[:5]
        del x, y
        counter.mark("backward")
        assert view is not None
    assert counter.peaks["forward"] == 20_000 + 2_000 + 4_000
    assert counter.peaks["backward"] == 20_000 + 4_000  # a view keeps its whole storage


def _trained(gradient: float) -> nn.Parameter:
    parameter = nn.Parameter(torch.ones(3))
    parameter.grad = torch.full((3,), gradient)
    return parameter


def _clip(parameter: nn.Parameter, most: float) -> float:
    return Shaping().shape([parameter], [], 0, most)


def test_update_clips_and_keeps_gradient_buffers() -> None:
    parameter = _trained(4.0)
    buffer = parameter.grad
    made = update(torch.optim.SGD([parameter], lr=1.0), None, partial(_clip, parameter, 1.0))
    assert made.taken and math.isclose(made.gradient_norm, 4 * math.sqrt(3), rel_tol=1e-6)
    torch.testing.assert_close(parameter.data, torch.full((3,), 1 - 1 / math.sqrt(3)))
    assert parameter.grad is buffer and not buffer.any()


def test_update_without_a_loss_scale_stops_at_the_first_infinity() -> None:
    parameter = _trained(math.inf)
    with pytest.raises(PlanError, match="norm is inf"):
        update(torch.optim.SGD([parameter], lr=1.0), None, partial(_clip, parameter, 1.0))
    assert torch.equal(parameter.data, torch.ones(3))


def test_update_with_a_loss_scale_skips_an_overflow_and_lowers_the_scale() -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(torch.ones(()))
    parameter = _trained(math.inf)
    optimizer = torch.optim.AdamW([parameter], lr=0.1, fused=True)
    assert not update(optimizer, scaler, partial(_clip, parameter, 1.0)).taken
    assert torch.equal(parameter.data, torch.ones(3)) and scaler.get_scale() == 4.0
    parameter.grad = torch.full((3,), 4.0)
    made = update(optimizer, scaler, partial(_clip, parameter, 100.0))
    assert made.taken and math.isclose(made.gradient_norm, math.sqrt(3), rel_tol=1e-6)
    assert (parameter.data < 1).all()


def test_perplexity_of_a_lost_model_is_infinite() -> None:
    assert Evaluation(0.0, 1, 1).perplexity == 1.0 and Evaluation(1e4, 1, 1).perplexity == math.inf


class _Sizes(TorchDispatchMode):
    """The bytes of every new tensor, in the order in which they are made."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[int] = []
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and (place := result.untyped_storage().data_ptr()) not in self._known:
            self._known.add(place)
            self.made.append(result.nbytes)
        return result


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_four_bit_product_is_that_of_bitsandbytes_and_made_before_the_wide_matrix(
    dtype: torch.dtype, bias: bool
) -> None:
    pytest.importorskip("bitsandbytes")
    plain = torch.nn.Linear(64, 128, bias=bias, dtype=dtype).requires_grad_(False)
    four_bit = quantised(plain, FourBit(double_quantization=True), dtype, torch.device("cpu"))
    rows, gradient = torch.randn(FUSED_ROWS + 8, 64, dtype=dtype), torch.randn(FUSED_ROWS + 8, 128, dtype=dtype)

    def both(of: Callable[[torch.Tensor], torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        leaf = rows.clone().requires_grad_()
        found = of(leaf)
        found.backward(gradient)
        assert leaf.grad is not None
        return found, leaf.grad

    for found, wanted in zip(both(lambda x: multiplied(four_bit, x)), both(four_bit), strict=True):
        assert torch.equal(found, wanted)
    with _Sizes() as sizes:
        multiplied(four_bit, rows.requires_grad_())
    result, wide = len(rows) * 128 * dtype.itemsize, 64 * 128 * dtype.itemsize
    assert sizes.made[0] == result and wide in sizes.made and sizes.made.count(result) == 1


def test_what_the_driver_said_before_a_run_had_less_does_not_count_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sample that is under way while the run is held to less."""
    recorder, reads = Recorder(torch.device("cpu")), []

    def read() -> int:
        reads.append(1)
        if len(reads) == 1:
            recorder.held(2)
            return 1000
        recorder._stop.set()
        return 10

    monkeypatch.setattr(recorder, "_driver", read)
    monkeypatch.setattr(measure, "_EVERY_SECONDS", 0)
    recorder._sample_until_stopped()
    assert recorder.driver == 10 and recorder.before is not None and recorder.before["driver_bytes"] is None
