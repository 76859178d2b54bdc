"""The streamed step gives the loss and gradients of stock transformers and PEFT, to the last digits of float64."""

from __future__ import annotations

from pathlib import Path

import pytest
from streamed_step import make_streamed
from test_trainer_parity import _assert_same, _batch, _grouped_products_of_any_type, _stock, folders
from trainer_tiny import CONFIGS

from planner.errors import PlanError

__all__ = ["_grouped_products_of_any_type", "folders"]
CAPPED = {"gemma2"}  # their attention caps its scores, which no exact kernel does
FAMILIES = sorted(CONFIGS.keys() - CAPPED)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("lengths", [(17,), (32, 32), (31, 19, 1)], ids=str)
@pytest.mark.parametrize("sizes", [(8, 1), (7, 3), (1000, 4)], ids=str)
def test_step_equals_stock_step(
    folders: dict[str, Path], family: str, lengths: tuple[int, ...], sizes: tuple[int, int]
) -> None:
    batch = _batch(*lengths)
    ours = make_streamed(folders[family], batch, chunk=sizes[0], group=sizes[1], away=len(lengths) > 1)
    _assert_same(ours, _stock(folders[family], *lengths))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("spacing", [2, 3])
@pytest.mark.parametrize("keep_outputs", [False, True])
def test_spacing_and_kept_outputs_change_nothing(
    folders: dict[str, Path], family: str, spacing: int, keep_outputs: bool
) -> None:
    batch = _batch(23, 9, trained=5)
    ours = make_streamed(folders[family], batch, chunk=9, group=2, spacing=spacing, keep_outputs=keep_outputs)
    _assert_same(ours, _stock(folders[family], 23, 9, trained=5))


@pytest.mark.parametrize("family", sorted(CAPPED))
def test_attention_that_kernels_do_not_know_is_refused_by_name(folders: dict[str, Path], family: str) -> None:
    with pytest.raises(PlanError, match=r"streaming Gemma2Attention.*softcap"):
        make_streamed(folders[family], _batch(9), chunk=4, group=2)
