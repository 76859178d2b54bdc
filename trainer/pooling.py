"""Pools the key and value heads of a model into fewer: another model, which has to be trained before it is good again.

Each new head is the mean of the heads in whose place it is (Ainslie et al. 2023, arXiv 2305.13245), matrix by matrix
and bias by bias, computed in float32 and rounded once. Files are written one after the other, under their own names,
and the folder appears when it is whole.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PretrainedConfig
from transformers.utils import cached_file

from planner.errors import PlanError
from planner.model import load_model
from planner.model_shape import ModelShape
from planner.units import format_bytes
from trainer.loading import Source, find_source, load_tokenizer, read_config
from trainer.merging import copy_generation_config

KEYS_OR_VALUES = re.compile(r"\.(?:k_proj|v_proj)\.(?:weight|bias)$")
ALL_THREE = re.compile(r"\.qkv_proj\.(?:weight|bias)$")
"""A matrix with the rows of queries, keys and values, in that order."""
WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def pool_heads(asked: str, kv_heads: int, final: Path) -> Path:
    """Write a model with so many key and value heads as a folder; gives the folder.

    Raises:
        PlanError: the model's heads cannot be pooled so, or the folder cannot be written.
    """
    if final.exists():
        raise PlanError(f"--out {final}", "is there already, and nothing is overwritten.", "Name another folder.")
    source = find_source(asked)
    if source.random or source.gguf:
        kind = "random weights" if source.random else "a GGUF file, whose weights are rounded already"
        raise PlanError(f"model {asked}", f"is {kind}.", "Give the folder or the hub id of its safetensors.")
    shape = load_model(asked)
    check_heads(shape, kv_heads)
    config = read_config(source)
    made = final.with_name(f".{final.name}-being-written")
    shutil.rmtree(made, ignore_errors=True)
    try:
        made.mkdir(parents=True)
        _write_weights(source, shape, kv_heads, made)
        config.num_key_value_heads = kv_heads
        config.save_pretrained(made)
        if (tokenizer := load_tokenizer(source)) is not None:
            tokenizer.save_pretrained(made)
        copy_generation_config(source, made)
        (made / "README.md").write_text(_card(source, shape, kv_heads, config), encoding="utf-8")
        made.rename(final)
    except (OSError, SafetensorError) as error:
        raise PlanError(f"--out {final}", f"cannot be written: {error}.") from error
    finally:
        shutil.rmtree(made, ignore_errors=True)
    return final


def check_heads(shape: ModelShape, kv_heads: int) -> None:
    """Whether a model's heads can be pooled into so many.

    Raises:
        PlanError: they cannot; says which numbers would do.
    """
    fewer = [count for count in range(1, shape.kv_heads) if shape.kv_heads % count == 0]
    if kv_heads in fewer:
        return
    asked = f"--kv-heads {kv_heads}"
    if not fewer:
        raise PlanError(asked, f"{shape.id} has one head for keys and values already.")
    heads = f"{shape.id} has {shape.kv_heads} heads for keys and values"
    raise PlanError(asked, f"{heads}, and pools of equal size make {', '.join(map(str, fewer))}.")


def pooled(weight: Tensor, heads: int, kv_heads: int) -> Tensor:
    """Rows of ``heads`` heads, ``[heads · E, …]``, as those of ``kv_heads``, each the mean of its pool."""
    width = weight.shape[0] // heads
    pools = weight.to(torch.promote_types(weight.dtype, torch.float32)).unflatten(0, (kv_heads, -1, width))
    return pools.mean(dim=1).flatten(0, 1).to(weight.dtype).contiguous()


def pooled_part(name: str, weight: Tensor, shape: ModelShape, kv_heads: int) -> Tensor | None:
    """A tensor of a file with its key and value heads pooled; None where it has none."""
    if KEYS_OR_VALUES.search(name):
        return pooled(weight, shape.kv_heads, kv_heads)
    if not ALL_THREE.search(name):
        return None
    queries, keys = shape.heads * shape.head_size, shape.kv_heads * shape.head_size
    query, key, value = weight.split([queries, keys, keys])
    return torch.cat([query, *(pooled(part, shape.kv_heads, kv_heads) for part in (key, value))])


def _write_weights(source: Source, shape: ModelShape, kv_heads: int, folder: Path) -> None:
    files, found, size = _files(source), 0, 0
    needed, free = sum(file.stat().st_size for file in files), shutil.disk_usage(folder).free
    if free < needed:
        why = f"needs up to {format_bytes(needed)} on disk, and {format_bytes(free)} are free."
        raise PlanError(f"--out {folder.parent}", why)
    places: dict[str, str] = {}
    for file in files:
        tensors: dict[str, Tensor] = {}
        with safe_open(file, framework="pt") as stored:
            for name in stored.keys():  # noqa: SIM118 – a file, which has no other way to tell
                weight = stored.get_tensor(name)
                if (part := pooled_part(name, weight, shape, kv_heads)) is not None:
                    weight, found = part, found + 1
                tensors[name], size = weight, size + weight.nbytes
                places[name] = file.name
        save_file(tensors, folder / file.name, {"format": "pt"})
    if found < shape.layers:
        why = f"keeps keys and values of its heads in other matrices than can be pooled ({found} were found)."
        raise PlanError(f"model {source.asked}", why)
    if len(files) > 1:
        index = {"metadata": {"total_size": size}, "weight_map": places}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _files(source: Source) -> list[Path]:
    """The files that hold a model's weights."""

    def here(name: str) -> Path | None:
        found = cached_file(source.place, name, _raise_exceptions_for_missing_entries=False)
        return Path(found) if found is not None else None

    if (index := here(INDEX)) is not None:
        names = sorted({*json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()})
        found = [here(name) for name in names]
    else:
        found = [here(WHOLE)]
    if None in found:
        why = f"has neither {WHOLE} nor all files of {INDEX}."
        raise PlanError(f"model {source.asked}", why)
    return [file for file in found if file is not None]


def _card(source: Source, shape: ModelShape, kv_heads: int, config: PretrainedConfig) -> str:
    return f"""---
base_model: {json.dumps(source.asked, ensure_ascii=False)}
library_name: transformers
pipeline_tag: text-generation
tags: [tierplan]
---

# {source.asked} with {kv_heads} heads for keys and values

Made from a model with {shape.kv_heads}: each head is the mean of {shape.kv_heads // kv_heads}. It is another model, and
a worse one until it has been trained again. {type(config).__name__} loads it like any other.
"""
