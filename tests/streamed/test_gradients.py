"""The streamed step gives the loss and gradients of stock transformers and PEFT, to the last digits of float64."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_trainer_packing import LENGTHS, _together
from test_trainer_parity import (
    _adapted,
    _assert_same,
    _batch,
    _gradients,
    _grouped_products_of_any_type,
    _stock_of,
    _wide_norms,
    folders,
)
from torch import Tensor
from trainer_tiny import CONFIGS

from planner.errors import PlanError
from trainer.adapters import make_lean
from trainer.data import Batch, PackedRow, collate
from trainer.host_memory import Arena
from trainer.loading import find_source, load_config, load_model
from trainer.step import Head, nothing
from trainer.streamed.checkpoints import Checkpoints, Exact
from trainer.streamed.kernels import KERNELS
from trainer.streamed.layer import Arrays, Layers, Sizes
from trainer.streamed.loss import StreamedLoss
from trainer.streamed.row import Row
from trainer.streamed.split import Split, register
from trainer.streamed.transfers import Transfers

__all__ = ["_grouped_products_of_any_type", "folders"]
CPU = torch.device("cpu")
REFUSED = {"gemma2": "Gemma2Attention.*softcap", "gpt_oss": "GptOssAttention.*s_aux"}  # what the kernels do not know
FAMILIES = sorted(CONFIGS.keys() - REFUSED.keys())


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
) -> tuple[Tensor, dict[str, Tensor]]:
    source = find_source(str(folder))
    model = load_model(
        source, load_config(source), dtype=torch.float64, attention=register(), device=CPU, four_bit=None, seed=0
    )
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


def packed_and_alone(trained: int | None) -> tuple[Batch, Batch]:
    """Documents that share rows, and the same with a row for each; so many targets of each are trained, or all."""
    together = [
        PackedRow(tuple(replace(piece, trained=min(trained or piece.trained, piece.trained)) for piece in row.pieces))
        for row in _together()
    ]
    return collate(together), collate([piece for row in together for piece in row.pieces])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("lengths", [(17,), (32, 32), (31, 19, 1)], ids=str)
@pytest.mark.parametrize("sizes", [(8, 1), (7, 3), (1000, 4)], ids=str)
def test_step_equals_stock_step(
    folders: dict[str, Path], family: str, lengths: tuple[int, ...], sizes: tuple[int, int]
) -> None:
    batch = _batch(*lengths)
    ours = streamed(folders[family], batch, chunk=sizes[0], group=sizes[1], away=len(lengths) > 1)
    _assert_same(ours, _stock_of(folders[family], batch))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("spacing", [2, 3])
@pytest.mark.parametrize("keep_outputs", [False, True])
def test_spacing_and_kept_outputs_change_nothing(
    folders: dict[str, Path], family: str, spacing: int, keep_outputs: bool
) -> None:
    batch = _batch(23, 9, trained=5)
    ours = streamed(folders[family], batch, chunk=9, group=2, spacing=spacing, keep_outputs=keep_outputs)
    _assert_same(ours, _stock_of(folders[family], batch))


def test_packed_rows_are_taken_apart_into_their_documents() -> None:
    row = Row.of(collate(_together()), chunk=8)
    assert row.documents == (
        (0, 7),
        (7, 19),
        (19, 20),
        (20, 25),
        (25, 34),
        (34, 37),
    )  # the second row's padding is gone
    assert row.positions.tolist() == [place for lengths in LENGTHS for length in lengths for place in range(length)]
    assert row.tokens.tolist() == [
        int(token) for row in _together() for piece in row.pieces for token in piece.tokens[:-1]
    ]
    assert row.targets.tolist() == [
        int(token) for row in _together() for piece in row.pieces for token in piece.tokens[1:]
    ]
    assert sum(stop - start for start, stop in row.trained) == 37


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("trained", [None, 3])
@pytest.mark.parametrize("sizes", [(8, 1), (7, 3), (1000, 4)], ids=str)
def test_packed_step_equals_stock_steps_of_documents_alone(
    folders: dict[str, Path], family: str, trained: int | None, sizes: tuple[int, int]
) -> None:
    """The stock steps of a batch that has a row for each document: none sees another there."""
    packed, alone = packed_and_alone(trained)
    assert packed.documents == ((7, 12, 1, 5), (9, 3, 13)) and alone.documents is None
    ours = streamed(folders[family], packed, chunk=sizes[0], group=sizes[1], spacing=2)
    _assert_same(ours, _stock_of(folders[family], alone))


@pytest.mark.parametrize("family", sorted(REFUSED))
def test_attention_that_kernels_do_not_know_is_refused_by_name(folders: dict[str, Path], family: str) -> None:
    with pytest.raises(PlanError, match=f"streaming {REFUSED[family]}"):
        streamed(folders[family], _batch(9), chunk=4, group=2)
