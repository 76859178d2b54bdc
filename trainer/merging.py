"""Merges adapters into the weights: a 16-bit model that stock transformers loads, written matrix by matrix.

What is merged into is what was trained against: 16-bit weights as they are, NF4 weights dequantised. The product of the
adapters is added in float32, some rows at a time, and the sum is rounded once. Files come one after the other, and the
folder appears only when it is whole.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from peft import PeftModel
from peft.tuners.lora.layer import LoraLayer
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils import cached_file

from planner.errors import PlanError
from planner.finished import plan_of_run
from planner.merging import BLOCK, FILE
from planner.plan import Rope
from planner.units import format_bytes
from trainer.finished import put_on, read_adapter
from trainer.loading import Source, find_source, read_config
from trainer.rotary import scale as scale_rotary
from trainer.session import ResidentSession
from trainer.streamed.weights import Weights

SIXTEEN_BITS = (torch.bfloat16, torch.float16)
Product = tuple[Tensor, Tensor, float]
"""Two matrices of an adapter, ``[R, inputs]`` and ``[outputs, R]``, and the scale of their product."""


def merge(
    model: PeftModel,
    source: Source,
    tokenizer: Any,
    final: Path,
    dtype: torch.dtype,
    weights: Weights | None = None,
    rope: Rope | None = None,
) -> Path:
    """Write the merged model as a folder of its own: weights, config, tokenizer.

    Args:
        dtype: of the training; where it has more than 16 bits the weights get the 16-bit type that their config names,
            else bfloat16.
        weights: of the layers, where they are not all on the card.
        rope: the rotary scaling it was trained with, if any; it goes into the config.

    Raises:
        PlanError: the folder is there already, the disk has no room for it, or a weight is no float16 number.
    """
    if final.exists():
        raise PlanError(f"merged model {final}", "is there already, and nothing is overwritten.", "Move it away.")
    config = _stock_config(source, rope or Rope())
    dtype = dtype if dtype in SIXTEEN_BITS else _own_sixteen_bits(config)
    made = final.with_name(f".{final.name}-being-written")
    shutil.rmtree(made, ignore_errors=True)
    try:
        made.mkdir(parents=True)
        write_weights(model, config, made, dtype, weights or Weights())
        config.save_pretrained(made)
        if tokenizer is not None:
            tokenizer.save_pretrained(made)
        copy_generation_config(source, made)
        (made / "README.md").write_text(_card(source, dtype), encoding="utf-8")
        made.rename(final)
    except (OSError, SafetensorError) as error:
        raise PlanError(f"merged model {final}", f"cannot be written: {error}.") from error
    finally:
        shutil.rmtree(made, ignore_errors=True)
    return final


def write_weights(
    model: PeftModel, config: PretrainedConfig, folder: Path, dtype: torch.dtype, weights: Weights
) -> None:
    """Write merged weights under the names that transformers gives them in files; an index where there are several.

    ``config`` is told the dtype and the class.

    Raises:
        PlanError: the disk has no room for it, or a weight is no number of the dtype.
    """
    with torch.device("meta"):
        stock = AutoModelForCausalLM.from_config(config, dtype=dtype)
    config.dtype, config.architectures = dtype, [type(stock).__name__]
    stored, paths = _stored(stock)
    files = split_torch_state_dict_into_shards(stored, max_shard_size=FILE)
    needed, free = int(files.metadata["total_size"]), shutil.disk_usage(folder).free
    if free < needed:
        why = f"needs {format_bytes(needed)} on disk, and {format_bytes(free)} are free."
        raise PlanError(f"merged model {folder.parent}", why, "Free some; `plan merge` writes it any time later.")
    base: Any = model.get_base_model()
    for name, tensors in files.filename_to_tensors.items():
        merged: dict[str, Tensor] = {}
        for path in dict.fromkeys(paths[key] for key in tensors):
            whole = merged_tensor(base, path, dtype, weights)
            parts = revert_weight_conversion(stock, {path: whole})
            # What is a part of another tensor is copied: a file holds no memory twice.
            merged |= {
                key: part if part.nbytes == whole.nbytes else part.clone()
                for key, part in parts.items()
                if key in tensors
            }
        save_file(merged, folder / name, {"format": "pt"})
        del merged  # before the next file's
    if files.is_sharded:
        index = {"metadata": {"total_size": needed}, "weight_map": files.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def merged_tensor(base: PreTrainedModel, path: str, dtype: torch.dtype, weights: Weights) -> Tensor:
    """One parameter of the model, merged and rounded, in host memory."""
    owner, _, key = path.rpartition(".")
    module = base.get_submodule(owner)
    products: list[Product] = []
    if isinstance(module, LoraLayer):
        if key == "weight":
            products = [_product(module, name) for name in module.active_adapters]
        holder: Any = module.get_base_layer()
    else:
        holder = module
    parameter = getattr(holder, key)
    weights.need(parameter)
    weight = _dequantised(parameter)
    merged = torch.empty(weight.shape, dtype=dtype)
    rows = max(1, BLOCK // max(1, weight[0].numel()))
    with torch.no_grad():
        for start in range(0, len(weight), rows):
            part = slice(start, start + rows)
            merged[part] = _merged_rows(weight[part], [(a, b[part], scale) for a, b, scale in products], dtype)
            if not bool(torch.isfinite(merged[part]).all()):
                why = f"{path} is no {str(dtype).removeprefix('torch.')} number any more once it is merged."
                raise PlanError("the merged model", why, "The adapter itself is whole.")
    return merged


def merge_run(folder: Path) -> Path:
    """Merge the adapter of a finished run into its base model; gives the folder that was written.

    The base is built as the run's plan says, on the device it was planned for.

    Raises:
        PlanError: it is no folder of a run, has no adapter, or the plan's device or model is not here.
    """
    plan = plan_of_run("plan merge", folder)
    final = folder / "merged"
    if final.exists():  # before minutes of loading
        raise PlanError(f"merged model {final}", "is there already, and nothing is overwritten.", "Move it away.")
    adapter = read_adapter(folder)
    session = ResidentSession(plan)
    session.apply_choices()
    adapted, tokenizer, _ = session.adapted_model()
    put_on(adapted, adapter, folder)
    return merge(adapted, find_source(plan.model.source), tokenizer, final, session.dtype, session.weights, plan.rope)


def _merged_rows(weight: Tensor, products: Sequence[Product], dtype: torch.dtype) -> Tensor:
    """Some rows of a weight, ``[rows, inputs]``, with the products added, rounded once."""
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32), copy=True)
    for a, b, scale in products:
        wide.addmm_(b.to(wide.dtype), a.to(wide.dtype), alpha=scale)
    return wide.to(dtype)


def _product(module: LoraLayer, name: str) -> Product:
    """Adapter matrices of which the product is laid out as the weight; Conv1D has its inputs first."""
    a, b, scale = module.lora_A[name].weight, module.lora_B[name].weight, module.scaling[name]
    return (b.t(), a.t(), scale) if module.fan_in_fan_out else (a, b, scale)


def _dequantised(parameter: Tensor) -> Tensor:
    """A weight as the training computes with it."""
    state = getattr(parameter, "quant_state", None)
    if state is None:
        return parameter.detach()
    from bitsandbytes.functional import dequantize_4bit

    dequantised: Tensor = dequantize_4bit(parameter.data, state)
    return dequantised


def _stored(stock: PreTrainedModel) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Parameters under the names they have in files, shapes alone; and for each such name that of the parameter.

    A tied weight is one parameter and comes once. Experts are one parameter in a model and many in files.
    """
    stored: dict[str, Tensor] = {}
    paths: dict[str, str] = {}
    for path, parameter in stock.named_parameters():
        parts = revert_weight_conversion(stock, {path: parameter.detach()})
        stored |= {key: torch.empty_like(part) for key, part in parts.items()}
        paths |= dict.fromkeys(parts, path)
    return stored, paths


def _stock_config(source: Source, rope: Rope) -> PretrainedConfig:
    """The model's config as its source has it, with the rotary scaling of the training.

    Dropout, cache and activation are the training's own business.
    """
    config = read_config(source)
    scale_rotary(config, rope)
    if hasattr(config, "quantization_config"):  # a GGUF file's
        del config.quantization_config
    return config


def _own_sixteen_bits(config: PretrainedConfig) -> torch.dtype:
    own = getattr(config, "dtype", None)
    return own if own in SIXTEEN_BITS else torch.bfloat16


def copy_generation_config(source: Source, folder: Path) -> None:
    """Put the source's own settings for generating beside a model that is made of it, where it has any."""
    if source.gguf or source.random:
        return
    file = cached_file(
        source.place,
        "generation_config.json",
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    if file is not None:
        shutil.copyfile(file, folder / "generation_config.json")


def card_head(source: Source) -> str:
    """How the card of a model that was made of another begins, for a hub to read."""
    return f"""---
base_model: {json.dumps(source.asked, ensure_ascii=False)}
library_name: transformers
pipeline_tag: text-generation
tags: [tierplan]
---

"""


def _card(source: Source, dtype: torch.dtype) -> str:
    return f"""{card_head(source)}# {source.asked}, with an adapter merged into its weights

Weights are {str(dtype).removeprefix("torch.")}: those that the adapter was trained beside, dequantised where they were
held in four bits, plus the adapter's product, rounded once. Load it with
`transformers.AutoModelForCausalLM.from_pretrained(this_folder)`.
"""
