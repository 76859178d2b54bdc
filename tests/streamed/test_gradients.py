"""The streamed step gives the loss and gradients of stock transformers and PEFT, to the last digits of float64."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from streamed_step import make_streamed
from test_trainer_packing import _together
from test_trainer_parity import _assert_same, _batch, _grouped_products_of_any_type, _stock_of, folders
from trainer_tiny import CONFIGS

from planner.errors import PlanError
from trainer.data import Batch, PackedRow, collate

__all__ = ["_grouped_products_of_any_type", "folders"]
REFUSED = {"gemma2": "Gemma2Attention.*softcap", "gpt_oss": "GptOssAttention.*s_aux"}  # what the kernels do not know
FAMILIES = sorted(CONFIGS.keys() - REFUSED.keys())


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
    ours = make_streamed(folders[family], batch, chunk=sizes[0], group=sizes[1], away=len(lengths) > 1)
    _assert_same(ours, _stock_of(folders[family], batch))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_smoothed_step_equals_stock_step(folders: dict[str, Path], family: str) -> None:
    batch = _batch(23, 9, trained=5)
    ours = make_streamed(folders[family], batch, chunk=7, group=2, rows=3, smoothing=0.2)
    _assert_same(ours, _stock_of(folders[family], batch, smoothing=0.2))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("spacing", [2, 3])
@pytest.mark.parametrize("keep_outputs", [False, True])
def test_spacing_and_kept_outputs_change_nothing(
    folders: dict[str, Path], family: str, spacing: int, keep_outputs: bool
) -> None:
    batch = _batch(23, 9, trained=5)
    ours = make_streamed(folders[family], batch, chunk=9, group=2, spacing=spacing, keep_outputs=keep_outputs)
    _assert_same(ours, _stock_of(folders[family], batch))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("lengths", [(29,), (31, 19, 1)], ids=str)
@pytest.mark.parametrize("sizes", [(8, 1, 5), (7, 2, 8), (1000, 4, 13), (5, 3, 100)], ids=str)
@pytest.mark.parametrize("stretch", [8192, 7])  # a window's stretches: one, or several
def test_blocks_of_the_row_change_nothing(
    monkeypatch: pytest.MonkeyPatch,
    folders: dict[str, Path],
    family: str,
    lengths: tuple[int, ...],
    sizes: tuple[int, int, int],
    stretch: int,
) -> None:
    monkeypatch.setattr("trainer.streamed.windows.STRETCH", stretch)
    batch, (chunk, group, block) = _batch(*lengths), sizes
    keep = chunk == 7  # attended values of all layers, each in its place
    ours = make_streamed(
        folders[family], batch, chunk=chunk, group=group, block=block, keep_outputs=keep, away=len(lengths) > 1
    )
    _assert_same(ours, _stock_of(folders[family], batch))


@pytest.mark.parametrize("family", sorted(REFUSED))
def test_attention_that_kernels_do_not_know_is_refused_by_name(folders: dict[str, Path], family: str) -> None:
    with pytest.raises(PlanError, match=f"streaming {REFUSED[family]}"):
        make_streamed(folders[family], _batch(9), chunk=4, group=2)
