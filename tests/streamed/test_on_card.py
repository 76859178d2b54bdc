"""The streamed step on a card: real streams, pinned memory and copies that run beside the computation.

In float64, with attention written out for these tests, it gives what stock transformers and PEFT give on that card,
to the last digits. Copies of so few tokens are over soon: that one is waited for is not what this shows. In float32
with the card's own kernel it gives what they give on the CPU, to float32's digits. Without a card none of it runs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from streamed_step import CPU, On, make_streamed
from test_going_on import LAYERS, going_on_changes_no_bit
from test_gradients import FAMILIES, packed_and_alone
from test_trainer_parity import _assert_same, _batch, _grouped_products_of_any_type, _stock_of, folders
from torch import Tensor

from trainer.data import Batch
from trainer.host_memory import Arena
from trainer.streamed.kernels import KERNELS
from trainer.streamed.weights import StreamedWeights

__all__ = ["_grouped_products_of_any_type", "folders"]
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a card")
CARD = torch.device("cuda", 0)
GIVEN: tuple[dict[str, Any], ...] = (
    {"chunk": 8, "group": 1},
    {"chunk": 7, "group": 3, "away": False},
    {"chunk": 7, "group": 2, "block": 8},
    {"chunk": 9, "group": 2, "spacing": 2},
    {"chunk": 1000, "group": 4, "keep_outputs": True},
    {"chunk": 8, "group": 2, "spacing": 2, "block": 5, "keep_outputs": True},
)


class WrittenOut:
    """Attention with all scores held, in any dtype."""

    name = "written out"

    def forward(self, query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
        scores = self._scores(query, key, causal, scale)
        sums = scores.logsumexp(-1)
        return (scores - sums.unsqueeze(-1)).exp() @ self._each(value, query), sums

    def backward(
        self,
        gradient: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        output: Tensor,
        log_sum_exp: Tensor,
        causal: bool,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        shares = (self._scores(query, key, causal, scale) - log_sum_exp.unsqueeze(-1)).exp()
        inner = gradient @ self._each(value, query).mT - (gradient * output).sum(-1, keepdim=True)
        scored = shares * inner * scale
        return (
            scored @ self._each(key, query),
            self._whole(scored.mT @ query, key),
            self._whole(shares.mT @ gradient, key),
        )

    def _scores(self, query: Tensor, key: Tensor, causal: bool, scale: float) -> Tensor:
        scores = scale * query @ self._each(key, query).mT
        unseen = torch.ones_like(scores[0, 0], dtype=torch.bool).triu(1)
        return scores.masked_fill(unseen, -math.inf) if causal else scores

    def _each(self, shared: Tensor, query: Tensor) -> Tensor:
        return shared.repeat_interleave(query.shape[1] // shared.shape[1], 1)

    def _whole(self, each: Tensor, key: Tensor) -> Tensor:
        return each.unflatten(1, (key.shape[1], -1)).sum(2)


@pytest.fixture(autouse=True)
def nothing_stays_pinned(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a test has pinned is given back after it, as a run does at its end."""
    made: list[Arena] = []
    own = Arena.__init__

    def remembered(arena: Arena, *args: Any, **kwargs: Any) -> None:
        own(arena, *args, **kwargs)
        made.append(arena)

    monkeypatch.setattr(Arena, "__init__", remembered)
    yield
    torch.cuda.synchronize()
    for arena in made:
        arena.close()


EXACT = On(CARD, WrittenOut(), torch.float64)
SINGLE = On(CARD, KERNELS["efficient"], torch.float32)
Step = tuple[Tensor, dict[str, Tensor]]


def on_cpu(step: Step) -> Step:
    loss, gradients = step
    return loss.to(CPU).double(), {name: each.to(CPU).double() for name, each in gradients.items()}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("given", GIVEN, ids=str)
def test_a_step_on_a_card_equals_stock_transformers(
    folders: dict[str, Path], family: str, given: dict[str, Any]
) -> None:
    batch = _batch(31, 19, trained=12)
    ours = make_streamed(folders[family], batch, on=EXACT, **given)
    _assert_same(ours, _stock_of(folders[family], batch, CARD))


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_documents_on_a_card_are_as_if_each_were_alone(folders: dict[str, Path], family: str) -> None:
    packed, alone = packed_and_alone(None)
    ours = make_streamed(folders[family], packed, chunk=9, group=2, on=EXACT)
    _assert_same(ours, _stock_of(folders[family], alone, CARD))


@pytest.mark.parametrize("family", ["phi", "llama", "qwen3", "gemma3_text"])
@pytest.mark.parametrize("spacing", [1, 2])
def test_weights_that_come_from_the_host_layer_by_layer(folders: dict[str, Path], family: str, spacing: int) -> None:
    batch = _batch(23, 9, trained=5)
    given: dict[str, Any] = {"chunk": 9, "group": 2, "spacing": spacing, "weights": StreamedWeights(CARD)}
    _assert_same(make_streamed(folders[family], batch, on=EXACT, **given), _stock_of(folders[family], batch, CARD))


@pytest.mark.parametrize("family", ["phi", "llama", "gemma3_text"])
def test_layer_inputs_on_disk(folders: dict[str, Path], family: str, tmp_path: Path) -> None:
    batch = _batch(31, 19, trained=12)
    ours = make_streamed(folders[family], batch, chunk=8, group=2, disk=tmp_path, on=EXACT)
    _assert_same(ours, _stock_of(folders[family], batch, CARD))


@pytest.mark.parametrize("stop_after", range(1, LAYERS))
@pytest.mark.parametrize("family", ["phi", "llama", "gemma3_text"])
def test_going_on_changes_no_bit_on_a_card(folders: dict[str, Path], family: str, stop_after: int) -> None:
    going_on_changes_no_bit(folders[family], LAYERS, stop_after, {"chunk": 8, "group": 2, "spacing": 2}, EXACT)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("packed", [False, True])
def test_the_kernel_of_every_card_is_exact_to_the_digits_of_float32(
    folders: dict[str, Path], family: str, packed: bool
) -> None:
    together, alone = packed_and_alone(None)
    batch: Batch = together if packed else _batch(200, 77)
    ours = on_cpu(make_streamed(folders[family], batch, chunk=64, group=2, block=0 if packed else 96, on=SINGLE))
    stock = _stock_of(folders[family], alone if packed else batch)
    assert abs(ours[0] / stock[0] - 1) <= 1e-5
    for name, wanted in stock[1].items():
        error = (ours[1][name] - wanted).norm() / wanted.norm()
        assert error <= 1e-4, f"{name}: relative error {error:.1e}"
