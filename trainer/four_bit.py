"""NF4 weights through bitsandbytes, for models that transformers cannot quantise while it loads them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig
from transformers.pytorch_utils import Conv1D

from trainer.layers import is_linear

Place = tuple[Any, str]
"""An object, and by what name it holds a tensor."""


@dataclass(frozen=True)
class FourBit:
    """How the linears of the layers are held: NF4, its scales in 8 bits where they are quantised as well."""

    double_quantization: bool

    def config(self, dtype: torch.dtype) -> BitsAndBytesConfig:
        """The same for ``from_pretrained``; the output head stays as it is, which is its default."""
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=self.double_quantization,
            bnb_4bit_compute_dtype=dtype,
        )


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


def quantise_linears(layer: nn.Module, four_bit: FourBit, dtype: torch.dtype, device: torch.device) -> None:
    """Quantise every linear of a layer, one after the other, each on the device."""
    for path, module in list(layer.named_modules()):
        if is_linear(module):
            layer.set_submodule(path, quantised(module, four_bit, dtype, device))


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
