"""A backward pass that is broken off after any layer and gone on with gives the same gradients, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from streamed_step import ON_CPU, On, make_streamed, make_streamed_loss
from test_trainer_parity import _batch, _gradients
from torch import Tensor
from trainer_tiny import CONFIGS, save_model
from transformers import LlamaConfig

from trainer.step import nothing
from trainer.streamed.arrays import TokenArray
from trainer.streamed.loss import Halfway

LAYERS = 3


@pytest.fixture(scope="module", params=["llama", "phi", "gemma3_text"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp(request.param)
    save_model(request.param, place, torch.float64)
    return place


class Stopped(Exception):
    """The machine went down."""


@pytest.mark.parametrize("stop_after", range(1, 7))
@pytest.mark.parametrize("given", [{}, {"keep_outputs": True}, {"spacing": 2}], ids=str)
def test_going_on_with_layer_inputs_on_disk_changes_no_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop_after: int, given: dict[str, Any]
) -> None:
    def deep() -> LlamaConfig:
        config = tiny()
        config.num_hidden_layers = 7
        return config

    tiny = CONFIGS["llama"]
    monkeypatch.setitem(CONFIGS, "llama", deep)
    save_model("llama", tmp_path / "model", torch.float64)
    going_on_changes_no_bit(tmp_path / "model", 7, stop_after, {"chunk": 7, "group": 2, "disk": tmp_path, **given})


@pytest.mark.parametrize("stop_after", range(1, LAYERS))
@pytest.mark.parametrize("given", [
    {"chunk": 7, "group": 2},
    {"chunk": 64, "group": 1, "keep_outputs": True},
    {"chunk": 8, "group": 4, "spacing": 2, "away": False},
    {"chunk": 8, "group": 4, "spacing": 3, "keep_outputs": True},
], ids=str)  # fmt: skip
def test_going_on_after_any_layer_changes_no_bit(folder: Path, stop_after: int, given: dict[str, Any]) -> None:
    going_on_changes_no_bit(folder, LAYERS, stop_after, given)


def going_on_changes_no_bit(folder: Path, layers: int, stop_after: int, given: dict[str, Any], on: On = ON_CPU) -> None:
    batch, divisor = _batch(23, 9, trained=6).to(on.device), torch.tensor(12.0, dtype=on.dtype, device=on.device)
    whole_loss, whole = make_streamed(folder, batch, on=on, **given)
    stopped, adapted = make_streamed_loss(folder, batch, on=on, **given)

    def stop(layer: int) -> None:
        if layer == stop_after:
            raise Stopped

    stopped.after_layer = stop
    loss = stopped(batch, divisor, nothing)
    with pytest.raises(Stopped):
        loss.backward()
    kept = stopped.layers.arrays.stream.at(0, 32).clone()
    gradients = {name: each.clone() for name, each in _gradients(adapted).items()}
    assert 0 < len(gradients) < len(whole)

    again, adapted = make_streamed_loss(folder, batch, on=on, **given)
    for name, parameter in adapted.named_parameters():
        if name in gradients:
            parameter.grad = gradients[name]
    told: list[tuple[str, int]] = []
    again.tell = lambda direction, done, count: told.append((direction, done))

    def fill(stream: TokenArray) -> None:
        stream.at(0, 32).copy_(kept)

    again.go_on(Halfway(stop_after - 1, loss.detach(), fill))
    resumed: Tensor = again(batch, divisor, nothing)
    assert torch.equal(resumed, whole_loss)
    resumed.backward()
    made = _gradients(adapted)
    assert made.keys() == whole.keys()
    for name, gradient in whole.items():
        assert torch.equal(made[name], gradient), name
    forward = [("forward", done) for done in range(stop_after)]
    assert told == [*forward, ("backward", 0), *(("backward", layers - left) for left in reversed(range(stop_after)))]

    fresh = again(batch, divisor, nothing)  # what was gone on with once is over
    assert torch.equal(fresh.detach(), whole_loss) and told[-1] == ("forward", layers)
