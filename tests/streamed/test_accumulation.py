"""Micro-batches of unequal rows add up to the gradient of all rows at once, in float64, in both executors."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel
from streamed_step import make_streamed_loss
from test_trainer_parity import (
    CPU,
    _adapted,
    _assert_same,
    _gradients,
    _grouped_products_of_any_type,
    _kernel,
    _stock_of,
    _wide_norms,
    folders,
)
from trainer_tiny import VOCAB

from trainer.adapters import make_lean
from trainer.attention import register
from trainer.checkpointing import DeviceStore, checkpoint_layers
from trainer.data import Row, collate
from trainer.layers import layers_of
from trainer.loading import find_source, load_config, load_model
from trainer.rotary import go_by_batch
from trainer.step import Loss, make_loss, nothing
from trainer.training import forward_backward

__all__ = ["_grouped_products_of_any_type", "folders"]
FAMILIES = ["llama", "phi", "qwen3_moe"]


def _rows(*sizes: tuple[int, int]) -> list[Row]:
    """Rows of so many inputs, of which so many are trained."""
    generator = torch.Generator().manual_seed(23)
    return [Row(torch.randint(VOCAB, (inputs + 1,), generator=generator), trained) for inputs, trained in sizes]


def _resident(folder: Path) -> tuple[Loss, PeftModel]:
    source = find_source(str(folder))
    model = load_model(
        source,
        load_config(source),
        dtype=torch.float64,
        attention=register(_kernel(folder.name)),
        device=CPU,
        four_bit=None,
        seed=0,
    )
    go_by_batch(model)
    _wide_norms(model)
    adapted = _adapted(model)
    make_lean(adapted)
    checkpoint_layers(layers_of(model), DeviceStore())
    return make_loss(model, 5), adapted


def _accumulated(loss: Any, adapted: PeftModel, parts: Sequence[Sequence[Row]]) -> tuple[torch.Tensor, dict[str, Any]]:
    built: Any = SimpleNamespace(loss=loss, device=CPU, scaler=None, streamed=None)
    mean = forward_backward(built, [collate(part) for part in parts], SimpleNamespace(mark=nothing))  # type: ignore[arg-type]
    return torch.tensor(mean, dtype=torch.float64), _gradients(adapted)


ROWS = ((31, 31), (4, 4), (17, 5), (1, 1), (23, 23))
PARTS = [(5,), (1, 1, 1, 1, 1), (2, 3), (4, 1)]


def _split(counts: tuple[int, ...]) -> list[list[Row]]:
    rows = iter(_rows(*ROWS))
    return [[next(rows) for _ in range(count)] for count in counts]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("counts", PARTS, ids=str)
@pytest.mark.parametrize("executor", ["resident", "streamed"])
def test_parts_add_up_to_the_whole(
    folders: dict[str, Path], family: str, counts: tuple[int, ...], executor: str
) -> None:
    folder, whole = folders[family], collate(_rows(*ROWS))
    if executor == "resident":
        loss, adapted = _resident(folder)
    else:
        loss, adapted = make_streamed_loss(folder, whole, chunk=7, group=2)
    found, gradients = _accumulated(loss, adapted, _split(counts))
    stock = _stock_of(folder, whole)
    # The loss that is told is summed in float32; gradients are what is trained by.
    assert float(found) == pytest.approx(float(stock[0]), rel=1e-6)
    _assert_same((stock[0], gradients), stock)


def test_a_mean_of_the_parts_means_is_another_gradient(folders: dict[str, Path]) -> None:
    """What dividing each part by its own tokens would give: short rows would count for more."""
    loss, adapted = _resident(folders["llama"])
    for part in _split((1, 1, 1, 1, 1)):
        batch = collate(part)
        (loss(batch, torch.tensor(float(batch.trained)), nothing) / len(ROWS)).backward()
    stock = _stock_of(folders["llama"], collate(_rows(*ROWS)))[1]
    errors = [float((_gradients(adapted)[name] - wanted).norm() / wanted.norm()) for name, wanted in stock.items()]
    assert min(errors) > 0.1
