"""The streamed step gives the loss and gradients of stock transformers and PEFT, to the last digits of float64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_trainer_parity import UNSCALED, _adapted, _assert_same, _batch, _gradients, _stock, _wide_norms, folders
from torch import Tensor
from trainer_tiny import CONFIGS

from planner.plan import Rope
from trainer.adapters import make_lean
from trainer.data import Batch
from trainer.host_memory import Arena
from trainer.loading import find_source, load_config, load_model
from trainer.rotary import go_by_batch, scale
from trainer.step import Head, nothing
from trainer.streamed.checkpoints import Checkpoints, Exact
from trainer.streamed.kernels import KERNELS
from trainer.streamed.layer import Arrays, Layers, Sizes
from trainer.streamed.loss import StreamedLoss
from trainer.streamed.split import Split, register
from trainer.streamed.transfers import Transfers

__all__ = ["folders"]
CPU = torch.device("cpu")


def streamed(
    folder: Path,
    batch: Batch,
    *,
    chunk: int,
    group: int,
    spacing: int = 1,
    keep_outputs: bool = False,
    rows: int = 5,
    away: bool = True,
    rope: Rope = UNSCALED,
) -> tuple[Tensor, dict[str, Tensor]]:
    source = find_source(str(folder))
    config = load_config(source)
    scale(config, rope)
    model = load_model(source, config, dtype=torch.float64, attention=register(), device=CPU, four_bit=None, seed=0)
    go_by_batch(model)
    _wide_norms(model)
    adapted = _adapted(model)
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
        dtype=torch.float64,
    )
    arena, count = Arena(CPU, away=away, pinned=False), config.num_hidden_layers
    layers = Layers(
        Split(model),
        KERNELS["cpu"],
        Transfers(CPU),
        Arrays(arena, sizes, kept_outputs=count if keep_outputs else 0),
        Checkpoints(arena, count, tokens, sizes.width, sizes.dtype, spacing=spacing, codec=Exact(torch.float64)),
        sizes,
        keep_outputs=keep_outputs,
    )
    loss = StreamedLoss(layers, Head.of(model), rows)(batch, torch.tensor(float(batch.trained)).double(), nothing)
    loss.backward()
    return loss.detach(), _gradients(adapted)


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("lengths", [(17,), (32, 32), (31, 19, 1)], ids=str)
@pytest.mark.parametrize("sizes", [(8, 1), (7, 3), (1000, 4)], ids=str)
def test_step_equals_stock_step(
    folders: dict[str, Path], family: str, lengths: tuple[int, ...], sizes: tuple[int, int]
) -> None:
    batch = _batch(*lengths)
    ours = streamed(folders[family], batch, chunk=sizes[0], group=sizes[1], away=len(lengths) > 1)
    _assert_same(ours, _stock(folders[family], batch))


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("spacing", [2, 3])
@pytest.mark.parametrize("keep_outputs", [False, True])
def test_spacing_and_kept_outputs_change_nothing(
    folders: dict[str, Path], family: str, spacing: int, keep_outputs: bool
) -> None:
    batch = _batch(23, 9, trained=5)
    ours = streamed(folders[family], batch, chunk=9, group=2, spacing=spacing, keep_outputs=keep_outputs)
    _assert_same(ours, _stock(folders[family], batch))
