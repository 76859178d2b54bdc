"""Pools the key and value heads of a model into fewer: another model, which has to be trained before it is good again.

Each new head is the mean of the heads in whose place it is (Ainslie et al. 2023, arXiv 2305.13245), matrix by matrix
and bias by bias, computed in float32 and rounded once. Files are written one after the other, under their own names,
and the folder appears when it is whole.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
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
from trainer.merging import card_head, copy_generation_config

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
    config, tokenizer, files = read_config(source), load_tokenizer(source), _files(source)
    there = next(folder for folder in final.absolute().parents if folder.exists())
    made = final.with_name(f".{final.name}-being-written")
    shutil.rmtree(made, ignore_errors=True)
    try:
        made.mkdir(parents=True)
        _write_weights(source, files, shape, kv_heads, made)
        config.num_key_value_heads = kv_heads
        config.save_pretrained(made)
        if tokenizer is not None:
            tokenizer.save_pretrained(made)
        copy_generation_config(source, made)
        (made / "README.md").write_text(_card(source, shape, kv_heads, config), encoding="utf-8")
        made.rename(final)
    except (OSError, SafetensorError) as error:
        raise PlanError(f"--out {final}", f"cannot be written: {error}.") from error
    finally:
        shutil.rmtree(made, ignore_errors=True)
        _remove_empty(final.absolute().parent, there)
    return final


def _remove_empty(folder: Path, until: Path) -> None:
    """Take back folders that were made and hold nothing, up to one that was there."""
    while folder != until and folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()
        folder = folder.parent


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
    """A tensor of a file with its key and value heads pooled; None where it has none.

    Raises:
        PlanError: it has not the rows that the config's heads have together.
    """
    keys = shape.kv_heads * shape.head_size
    if KEYS_OR_VALUES.search(name):
        _check_rows(name, weight, keys, shape)
        return pooled(weight, shape.kv_heads, kv_heads)
    if not ALL_THREE.search(name):
        return None
    queries = shape.heads * shape.head_size
    _check_rows(name, weight, queries + 2 * keys, shape)
    query, key, value = weight.split([queries, keys, keys])
    return torch.cat([query, *(pooled(part, shape.kv_heads, kv_heads) for part in (key, value))])


def _check_rows(name: str, weight: Tensor, rows: int, shape: ModelShape) -> None:
    if weight.shape[0] != rows:
        why = f"has {weight.shape[0]:,} rows in {name}, and by its config.json it has {rows:,}."
        raise PlanError(f"model {shape.id}", why, "Config and weights have to be of one model.")


def _write_weights(source: Source, files: list[Path], shape: ModelShape, kv_heads: int, folder: Path) -> None:
    needed, free = sum(file.stat().st_size for file in files), shutil.disk_usage(folder).free
    if free < needed:
        why = f"needs up to {format_bytes(needed)} on disk, and {format_bytes(free)} are free."
        raise PlanError(f"--out {folder.parent}", why)
    places: dict[str, str] = {}
    found = {KEYS_OR_VALUES: 0, ALL_THREE: 0}
    size = 0
    for file in files:
        tensors: dict[str, Tensor] = {}
        for name, weight in _tensors(source, file):
            part = pooled_part(name, weight, shape, kv_heads)
            for pattern in found:
                found[pattern] += bool(pattern.search(name)) and name.endswith("weight")
            tensors[name] = weight if part is None else part
            size, places[name] = size + tensors[name].nbytes, file.name
        save_file(tensors, folder / file.name, {"format": "pt"})
    if found not in ({KEYS_OR_VALUES: 2 * shape.layers, ALL_THREE: 0}, {KEYS_OR_VALUES: 0, ALL_THREE: shape.layers}):
        many = sum(found.values())
        why = f"keeps keys and values of its heads in other matrices than can be pooled ({many} were found)."
        raise PlanError(f"model {source.asked}", why)
    if len(files) > 1:
        index = {"metadata": {"total_size": size}, "weight_map": places}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _tensors(source: Source, file: Path) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a file by name, one after the other."""
    try:
        with safe_open(file, framework="pt") as stored:
            for name in stored.keys():  # noqa: SIM118 – a file, which has no other way to tell
                yield name, stored.get_tensor(name)
    except (OSError, SafetensorError) as error:
        raise PlanError(f"model {source.asked}", f"{file.name} cannot be read: {error}.") from error


def _files(source: Source) -> list[Path]:
    """The files that hold a model's weights.

    Raises:
        PlanError: one is missing, or the index is none.
    """

    def here(name: str) -> Path | None:
        found = cached_file(source.place, name, _raise_exceptions_for_missing_entries=False)
        return Path(found) if found is not None else None

    names = [WHOLE]
    if (index := here(INDEX)) is not None:
        try:
            names = sorted({*map(str, json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            why = f"{INDEX} is no index of its files: {type(error).__name__} {error}."
            raise PlanError(f"model {source.asked}", why) from error
    found = [here(name) for name in names]
    if None in found or not found:
        why = f"has neither {WHOLE} nor all files of {INDEX}."
        raise PlanError(f"model {source.asked}", why)
    return [file for file in found if file is not None]


def _card(source: Source, shape: ModelShape, kv_heads: int, config: PretrainedConfig) -> str:
    return f"""{card_head(source)}# {source.asked} with {kv_heads} heads for keys and values

Made from a model with {shape.kv_heads}: each head is the mean of {shape.kv_heads // kv_heads}. It is another model, and
a worse one until it has been trained again. {type(config).__name__} loads it like any other.
"""
