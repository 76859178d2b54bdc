"""A streamed step over a tiny model, on the CPU or a card, put together by hand for the tests."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from peft import PeftModel
from test_trainer_parity import UNSCALED, _adapted, _gradients, _wide_norms
from torch import Tensor

from planner.plan import Rope
from trainer.adapters import make_lean
from trainer.data import Batch
from trainer.host_memory import Arena
from trainer.loading import find_source, load_config, load_model
from trainer.rotary import go_by_batch, scale
from trainer.step import Head, nothing
from trainer.streamed.between import Arrays, Sizes
from trainer.streamed.build import attention_of
from trainer.streamed.checkpoints import Checkpoints, Codec, Exact
from trainer.streamed.kernels import KERNELS, Kernel
from trainer.streamed.layer import Layers
from trainer.streamed.loss import StreamedLoss
from trainer.streamed.shelf import shelf_on
from trainer.streamed.split import Split, register
from trainer.streamed.transfers import Transfers
from trainer.streamed.weights import StreamedWeights

CPU = torch.device("cpu")


@dataclass(frozen=True)
class On:
    """Where a step is computed, how, and in what."""

    device: torch.device
    kernel: Kernel
    dtype: torch.dtype


ON_CPU = On(CPU, KERNELS["cpu"], torch.float64)


def make_streamed_loss(
    folder: Path,
    batch: Batch,
    *,
    chunk: int,
    group: int,
    block: int = 0,
    spacing: int = 1,
    keep_outputs: bool = False,
    rows: int = 5,
    away: bool = True,
    scaled: bool = False,
    weights: StreamedWeights | None = None,
    rope: Rope = UNSCALED,
    codec: Codec | None = None,
    disk: Path | None = None,
    on: On = ON_CPU,
    smoothing: float = 0.0,
) -> tuple[StreamedLoss, PeftModel]:
    """The loss over a model in float64 with adapters that are not zero, and that model."""
    source = find_source(str(folder))
    config = load_config(source)
    scale(config, rope)
    model = load_model(
        source,
        config,
        dtype=on.dtype,
        attention=register(),
        device=on.device,
        four_bit=None,
        seed=0,
        put_away=weights.put_away if weights is not None else None,
    )
    if weights is not None:
        weights.ready()
    go_by_batch(model)
    _wide_norms(model)
    adapted = _adapted(model)
    for parameter in adapted.parameters():
        parameter.data = parameter.data.to(on.device, on.dtype)
    make_lean(adapted)
    config = model.config
    tokens = sum(batch.lengths)
    heads = config.num_attention_heads
    sizes = Sizes(
        tokens=tokens,
        chunk=chunk,
        heads=heads,
        key_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_size=getattr(config, "head_dim", None) or config.hidden_size // heads,
        width=config.hidden_size,
        group=group,
        dtype=on.dtype,
        block=block,
    )
    there = on.device if not away else CPU
    arena = Arena(there, away=away, pinned=away and on.device.type == "cuda")
    count, transfers = config.num_hidden_layers, Transfers(on.device)
    arrays = Arrays(arena, sizes, kept_outputs=count if keep_outputs else 0)
    layers = Layers(
        Split(model),
        attention_of(on.kernel, transfers, arrays, sizes),
        transfers,
        arrays,
        Checkpoints(
            arena,
            count,
            tokens,
            sizes.width,
            sizes.dtype,
            spacing=spacing,
            codec=codec or Exact(on.dtype),
            shelve=partial(shelf_on, disk, mark=transfers.mark) if disk is not None else None,
        ),
        sizes,
        keep_outputs=keep_outputs,
        weights=weights,
    )
    return StreamedLoss(layers, Head.of(model, smoothing), rows, scaled=scaled), adapted


def make_streamed(
    folder: Path,
    batch: Batch,
    *,
    chunk: int,
    group: int,
    block: int = 0,
    spacing: int = 1,
    keep_outputs: bool = False,
    rows: int = 5,
    away: bool = True,
    weights: StreamedWeights | None = None,
    rope: Rope = UNSCALED,
    disk: Path | None = None,
    on: On = ON_CPU,
    smoothing: float = 0.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The mean loss of a batch, and the gradients of all adapters by name."""
    made, adapted = make_streamed_loss(
        folder,
        batch,
        chunk=chunk,
        group=group,
        block=block,
        spacing=spacing,
        keep_outputs=keep_outputs,
        rows=rows,
        away=away,
        weights=weights,
        rope=rope,
        disk=disk,
        on=on,
        smoothing=smoothing,
    )
    divisor = torch.tensor(float(batch.trained), dtype=on.dtype, device=on.device)
    loss = made(batch.to(on.device), divisor, nothing)
    loss.backward()
    return loss.detach(), _gradients(adapted)
