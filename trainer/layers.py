"""Where a model of transformers has its layers, what in them is a linear, and what its config calls their sizes."""

from __future__ import annotations

from typing import TypeGuard

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from planner.families import FAMILIES


def layers_of(model: PreTrainedModel) -> nn.ModuleList:
    """The decoder layers; GPT-2 calls them h."""
    decoder = model.get_decoder()
    layers = decoder.layers if hasattr(decoder, "layers") else decoder.h
    assert isinstance(layers, nn.ModuleList)
    return layers


def is_linear(module: nn.Module) -> TypeGuard[nn.Linear | Conv1D]:
    """Whether it is a linear; GPT-2's are Conv1D, whose weight lies the other way."""
    return isinstance(module, nn.Linear | Conv1D)


def activation_field(config: PretrainedConfig) -> str:
    """What a model's config calls its activation function."""
    known = FAMILIES[config.model_type].names.get("hidden_act", ("hidden_act",))
    return next(name for name in known if getattr(config, name, None))


def mlp_width(config: PretrainedConfig) -> int:
    """The width of the MLP, also where it is left to follow from that of the model."""
    family = FAMILIES[config.model_type]
    names = family.names.get("intermediate_size", ("intermediate_size",))
    given = [width for name in names if (width := getattr(config, name, None))]
    return int(given[0]) if given else (family.absent_mlp_ratio or 0) * int(config.hidden_size)
