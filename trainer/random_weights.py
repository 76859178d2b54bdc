"""A model of a config's shape with random weights, made module by module on the device.

For measuring shapes whose weights are not at hand. With NF4 the 16-bit model never exists as a whole, and where layers
are put away, neither does the model on the device.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from trainer.four_bit import FourBit, Shelf, mark_as_four_bit, quantised
from trainer.layers import is_linear, layers_of


def random_model(
    config: PretrainedConfig,
    *,
    dtype: torch.dtype,
    attention: str,
    device: torch.device,
    four_bit: FourBit | None,
    seed: int,
    name: str,
    put_away: Callable[[nn.Module], None] | None = None,
) -> PreTrainedModel:
    """Matrices normal with the config's spread, norm weights one, biases zero, rotary tables as computed.

    Args:
        put_away: gets every layer as soon as it is made, before the next one is.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
    generator = torch.Generator(device).manual_seed(seed)
    spread = getattr(config, "initializer_range", 0.02)
    layers = set(layers_of(model).modules())
    ends = {list(layer.modules())[-1]: layer for layer in layers_of(model)}
    shelf = Shelf.of(model, device) if four_bit is not None and put_away is None else None
    made: dict[int, nn.Parameter] = {}  # tied weights are one parameter, and stay one

    def parameter(key: str, meta: Tensor) -> nn.Parameter:
        value = torch.empty(meta.shape, dtype=meta.dtype, device=device)
        if meta.dim() > 1:
            value.normal_(0.0, spread, generator=generator)
        else:
            value.fill_(1.0 if key == "weight" else 0.0)
        return nn.Parameter(value, requires_grad=False)

    for path, module in list(model.named_modules()):
        for key, meta in list(module.named_parameters(recurse=False)):
            if id(meta) not in made:
                made[id(meta)] = parameter(key, meta)
            setattr(module, key, made[id(meta)])
        if hasattr(module, "scalar_embed_scale"):  # Gemma's embedding holds its factor twice
            module.embed_scale = torch.tensor(module.scalar_embed_scale, device=device)
        elif any(True for _ in module.buffers(recurse=False)):
            # A rotary table is computed from the config; built again, outside the meta device, it is right.
            assert type(module).__name__.endswith("RotaryEmbedding"), f"{path} has buffers of an unknown kind"
            model.set_submodule(path, type(module)(config=config).to(device))
        if four_bit is not None and is_linear(module) and module in layers:
            of_four_bits = quantised(module, four_bit, dtype, device)
            if shelf is not None:
                shelf.put(module, of_four_bits)
            model.set_submodule(path, of_four_bits)
            for key, value in list(module.named_parameters(recurse=False)):
                # The list of modules still holds this one, and its 16-bit weight must go.
                setattr(module, key, None)
                made = {meta: kept for meta, kept in made.items() if kept is not value}
        if put_away is not None and module in ends:
            put_away(ends[module])
    if four_bit is not None:
        mark_as_four_bit(model)
    assert not any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])
    model.name_or_path = name
    return model
