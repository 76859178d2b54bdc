"""NF4 weights through bitsandbytes, for models that transformers cannot quantise while it loads them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from trainer.layers import is_linear, layers_of

Place = tuple[Any, str]
"""An object, and by what name it holds a tensor."""


@dataclass(frozen=True)
class FourBit:
    """How the linears of the layers are held: NF4, its scales in 8 bits where they are quantised as well."""

    double_quantization: bool


class Shelf:
    """One storage for the four-bit weights of all layers, made before any of them, in which each has its place.

    Each is quantised beside 16-bit weights that go again. Left where they are made, they have gaps between them that
    are smaller than a page, and an allocator at its limit can give back none of these. The bytes are the same.

    Args:
        linears: all that will be quantised.
    """

    def __init__(self, linears: Iterable[nn.Linear | Conv1D], device: torch.device) -> None:
        # Every weight begins at a multiple of the largest power of two in its size, and nothing lies between two.
        sizes = [(id(linear), (linear.weight.numel() + 1) // 2) for linear in linears]
        sizes.sort(key=lambda named: -(named[1] & -named[1]))
        names, counts = [name for name, _ in sizes], [count for _, count in sizes]
        places = torch.empty(sum(counts), dtype=torch.uint8, device=device).split_with_sizes(counts)
        self._places = dict(zip(names, places, strict=True))

    @staticmethod
    def of(model: PreTrainedModel, device: torch.device) -> Shelf:
        """For all linears of a model's layers."""
        return Shelf(filter(is_linear, layers_of(model).modules()), device)

    def put(self, linear: nn.Module, made: nn.Module) -> None:
        """Move the four-bit weight that was made of a linear to its place."""
        weight, place = made.weight, self._places.pop(id(linear))
        assert isinstance(weight, Tensor) and weight.dtype == torch.uint8
        weight.data = place.copy_(weight.data.flatten()).view(weight.shape)


def quantised(linear: nn.Linear | Conv1D, four_bit: FourBit, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """A linear's NF4 counterpart on the device; its own weight can go afterwards."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    weight = linear.weight.data.to(device, dtype)
    weight = weight.t().contiguous() if isinstance(linear, Conv1D) else weight
    made = Linear4bit(
        weight.shape[1],
        weight.shape[0],
        bias=linear.bias is not None,
        compute_dtype=dtype,
        compress_statistics=four_bit.double_quantization,
        quant_type="nf4",
        device="meta",
    )
    made.weight = Params4bit(
        weight,
        requires_grad=False,
        compress_statistics=four_bit.double_quantization,
        quant_type="nf4",
        module=made,
    )
    if linear.bias is not None:
        made.bias = nn.Parameter(linear.bias.data.to(dtype), requires_grad=False)
    return made.to(device)  # quantises on the way


def quantise_linears(
    layer: nn.Module, four_bit: FourBit, dtype: torch.dtype, device: torch.device, shelf: Shelf | None
) -> None:
    """Quantise every linear of a layer, one after the other, each on the device."""
    for path, module in list(layer.named_modules()):
        if is_linear(module):
            made = quantised(module, four_bit, dtype, device)
            if shelf is not None:
                shelf.put(module, made)
            layer.set_submodule(path, made)


FUSED_ROWS = 1536
"""bitsandbytes may multiply up to so many rows by a kernel that makes no wide matrix; beyond it always makes one."""


class _Product(torch.autograd.Function):
    """Rows times a four-bit matrix as bitsandbytes computes it, but what stays is made before what goes again.

    Where outputs are kept layer by layer, one that is made beside the wide matrix leaves a gap of that size in front of
    it, and what is left of each gap is lost to an allocator at its limit.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, state: Any, bias: Tensor | None) -> Tensor:
        assert bias is None or not bias.requires_grad, "a bias is frozen, and gets no gradient here"
        ctx.weight, ctx.state = weight, state
        result = rows.new_empty(len(rows), state.shape[0])
        wide = dequantised(weight, state).t()
        if bias is None:
            return torch.mm(rows, wide, out=result)
        return torch.addmm(bias, rows, wide, out=result)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        return gradients[0] @ dequantised(ctx.weight, ctx.state), None, None, None


def dequantised(weight: Tensor, state: Any) -> Tensor:
    """A four-bit weight in the type that it had before."""
    from bitsandbytes.functional import dequantize_4bit

    wide: Tensor = dequantize_4bit(weight.data, state)
    return wide


def multiplied(linear: nn.Module, rows: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """What a frozen linear gives for ``[T, D]``."""
    state, bias = getattr(linear.weight, "quant_state", None), linear.bias
    as_it_is = state is not None and state.dtype == rows.dtype and (bias is None or bias.dtype == rows.dtype)
    if as_it_is and len(rows) > FUSED_ROWS and torch.is_grad_enabled():
        found: Tensor = _Product.apply(rows, linear.weight, state, bias)
    else:
        found = linear(rows, *args, **kwargs)
    return found


def mark_as_four_bit(model: Any) -> None:
    """Say it where PEFT looks for it, so that it puts the adapters for four-bit linears on."""
    model.is_loaded_in_4bit = True


def constants_of(parameter: Tensor) -> list[Place]:
    """Scales and tables that bitsandbytes keeps beside a four-bit weight; none beside another."""
    found: list[Place] = []
    state: Any = getattr(parameter, "quant_state", None)
    while state is not None:
        found += [(state, name) for name in ("absmax", "code", "offset") if getattr(state, name) is not None]
        state = state.state2
    return found
