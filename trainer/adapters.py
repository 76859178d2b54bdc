"""LoRA through PEFT, with a lean forward: float32 adapters under 16-bit activations, and no spare copies.

PEFT casts the input of every adapted linear to float32, computes there, and keeps base output, adapter output,
scaled adapter output and their sum all alive. Here the small adapter matrices are cast instead, and the product
is added into the base output in place; the same function with fewer bytes. Files stay PEFT's own.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers.pytorch_utils import Conv1D

from trainer.four_bit import multiplied


def adapted_forward(layer: LoraLayer, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Base linear plus scaled adapter; ``x`` is ``[..., inputs]``, the result ``[..., outputs]``."""
    rows = x.reshape(-1, x.shape[-1])  # two dimensions, so that adding in place is no edit of a view
    base = layer.base_layer
    conv1d = isinstance(base, Conv1D)  # it would give a view of what it computes
    result = torch.addmm(base.bias, rows, base.weight) if conv1d else multiplied(base, rows, *args, **kwargs)
    if not (layer.disable_adapters or layer.merged):
        for name in layer.active_adapters:
            if name in layer.lora_A:
                down = linear(rows, layer.lora_A[name].weight.to(x.dtype))
                result.addmm_(down, layer.lora_B[name].weight.to(x.dtype).t(), alpha=layer.scaling[name])
    return result.view(*x.shape[:-1], -1)


def make_lean(model: nn.Module) -> int:
    """Give every plain LoRA layer of a PEFT model the lean forward; returns how many layers were changed.

    Raises:
        ValueError: a layer has a feature that the lean forward does not compute (dropout, DoRA and its kin).
    """
    changed = 0
    for path, layer in model.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        if layer.lora_variant or any(not isinstance(drop, nn.Identity) for drop in layer.lora_dropout.values()):
            raise ValueError(f"{path}: only plain LoRA without dropout has a lean forward")
        layer.forward = MethodType(adapted_forward, layer)  # type: ignore[method-assign]
        changed += 1
    return changed


def trainable_to_float32(model: nn.Module) -> None:
    """Hold what is trained in float32 whatever the frozen weights are held in."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.float32)
