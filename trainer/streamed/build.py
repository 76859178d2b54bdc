"""Puts the streamed executor together: arrays in host memory or on the card, and the loss that runs over them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from transformers import PreTrainedModel

from trainer.host_memory import Arena
from trainer.step import Head
from trainer.streamed.arrays import TokenArray
from trainer.streamed.between import Arrays, Sizes
from trainer.streamed.blocks import ByBlocks
from trainer.streamed.checkpoints import Checkpoints, Codec, Exact, Int8, Nf4
from trainer.streamed.disk_file import DiskFile
from trainer.streamed.heads import Attention, ByHeads
from trainer.streamed.kernels import KERNELS, Kernel
from trainer.streamed.layer import Layers
from trainer.streamed.loss import StreamedLoss
from trainer.streamed.shelf import Shelf, shelf_on
from trainer.streamed.split import Split
from trainer.streamed.transfers import Transfers
from trainer.streamed.weights import Weights

Form = Literal["exact", "int8", "nf4"]


@dataclass(frozen=True)
class Streaming:
    """What a plan says of the streamed executor.

    Attributes:
        kernel: for attention.
        chunk: tokens of a chunk; ``heads``: query heads of a group.
        block: tokens of a block where attention goes by blocks of the row, 0 where by all of it.
        staging: where query, key, value and what else lies between the passes of a layer is kept.
        spacing: layers for which one input is kept; ``form``: how it is written down.
        keep_outputs: attended values of all layers are kept.
        disk: a folder on the disk where layer inputs lie but for those that are worked on; None: all are in the host.
    """

    kernel: str
    chunk: int
    heads: int
    staging: Literal["host", "card"]
    spacing: int = 1
    form: Form = "exact"
    keep_outputs: bool = False
    disk: Path | None = None
    block: int = 0


@dataclass(frozen=True)
class Streamed:
    """The loss, and the host memory and the disk that it works with."""

    loss: StreamedLoss
    host: Arena
    disk: DiskFile | None = None


def codec_of(form: Form, dtype: torch.dtype) -> Codec:
    """The codec of a form."""
    if form == "exact":
        return Exact(dtype)
    return Int8() if form == "int8" else Nf4()


def attention_of(kernel: Kernel, transfers: Transfers, arrays: Arrays, sizes: Sizes) -> Attention:
    """By blocks of the row where the sizes name one, and else by all of it."""
    return (ByBlocks if sizes.block else ByHeads)(kernel, transfers, arrays, sizes)


def build_streamed(
    model: PreTrainedModel,
    streaming: Streaming,
    weights: Weights,
    *,
    tokens: int,
    dtype: torch.dtype,
    device: torch.device,
    rows: int,
    scaled: bool,
    smoothing: float = 0.0,
) -> Streamed:
    """The streamed executor of a model whose adapters are on.

    Args:
        model: loaded with ``attn_implementation=split.register()``.
        weights: of its layers.
        tokens: of the largest micro-batch, all its rows together.
        rows: rows of logits computed at a time.
        smoothing: share of each target that is spread over the vocabulary in training.
        scaled: there is a loss scale.

    Raises:
        PlanError: the model cannot be cut, or the host has not the memory or the disk not the room; what was taken is
            given back.
    """
    config, split = model.config, Split(model)
    heads, count = config.num_attention_heads, len(split.layers)
    sizes = Sizes(
        tokens=tokens,
        chunk=min(streaming.chunk, tokens),
        heads=heads,
        key_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_size=getattr(config, "head_dim", None) or config.hidden_size // heads,
        width=config.hidden_size,
        group=min(streaming.heads, heads),
        dtype=dtype,
        block=streaming.block,
    )
    host = Arena(torch.device("cpu"), away=True, pinned=device.type == "cuda")
    between = host if streaming.staging == "host" else Arena(device, away=False, pinned=False)
    transfers = Transfers(device)
    files = list[DiskFile]()

    def shelve(places: list[list[TokenArray]], inputs: int) -> Shelf | None:
        assert streaming.disk is not None
        shelf = shelf_on(streaming.disk, places, inputs, mark=transfers.mark)
        files.extend([shelf.file] if shelf is not None else [])
        return shelf

    try:
        arrays = Arrays(between, sizes, kept_outputs=count if streaming.keep_outputs else 0)
        layers = Layers(
            split,
            attention_of(KERNELS[streaming.kernel], transfers, arrays, sizes),
            transfers,
            arrays,
            Checkpoints(
                host,
                count,
                tokens,
                sizes.width,
                dtype,
                spacing=streaming.spacing,
                codec=codec_of(streaming.form, dtype),
                shelve=shelve if streaming.disk is not None else None,
            ),
            sizes,
            keep_outputs=streaming.keep_outputs,
            weights=weights,
        )
    except BaseException:
        for file in files:
            file.close()
        host.close()
        raise
    return Streamed(StreamedLoss(layers, Head.of(model, smoothing), rows, scaled=scaled), host, layers.checkpoints.file)
