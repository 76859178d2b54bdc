"""A value that is no number is named where it first stands: layer, tokens, document; and nothing else is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from streamed_step import CPU, make_streamed, make_streamed_loss
from test_trainer_parity import _batch
from torch import Tensor
from trainer_tiny import make_plan, save_model, write_sources

from planner.errors import PlanError
from trainer.run import execute
from trainer.step import nothing
from trainer.streamed.finite import Finite
from trainer.streamed.row import Row


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("llama")
    save_model("llama", place, torch.float64)
    return place


def _step(folder: Path, spoil: Callable[[Any], None], lengths: tuple[int, ...] = (10, 10, 10), **given: Any) -> None:
    batch = _batch(*lengths)
    loss, adapted = make_streamed_loss(folder, batch, chunk=8, group=2, **given)
    with torch.no_grad():
        spoil(adapted.get_base_model())
    loss(batch, torch.tensor(30.0).double(), nothing).backward()


def _weight(layer: int, value: float) -> Callable[[Any], None]:
    def spoil(model: Any) -> None:
        model.model.layers[layer].mlp.down_proj.base_layer.weight[5, 7] = value

    return spoil


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_layer_of_a_bad_weight_is_named(folder: Path, layer: int, value: float) -> None:
    said = rf"the output of layer {layer + 1} of 3 \(layers\.{layer}\), tokens 0–8 \(document 1 of 3\), is not finite"
    with pytest.raises(PlanError, match=said):
        _step(folder, _weight(layer, value))


def test_chunk_and_documents_of_a_bad_embedding_are_named(folder: Path) -> None:
    batch = _batch(10, 10, 10)
    row = Row.of(batch, 8)
    only = next(each for each in row.tokens[16:24].tolist() if each not in row.tokens[:16].tolist())

    def spoil(model: Any) -> None:
        model.model.embed_tokens.weight[only] = torch.nan

    with pytest.raises(PlanError, match=r"the embedding, tokens 16–24 \(documents 2 to 3 of 3\), is not finite.*first"):
        _step(folder, spoil)


def test_gradient_that_is_not_finite_is_named_where_no_scale_can_be_lowered(folder: Path) -> None:
    class Spoilt(torch.autograd.Function):
        """The value itself, with a gradient that is no number."""

        @staticmethod
        def forward(ctx: Any, value: Tensor) -> Tensor:
            return value.clone()

        @staticmethod
        def backward(ctx: Any, *gradients: Tensor) -> Tensor:
            return gradients[0] * torch.nan

    def spoil(model: Any) -> None:
        module = model.model.layers[1].mlp
        own = module.forward
        module.forward = lambda hidden: Spoilt.apply(own(hidden))

    said = r"the gradient of the input of layer 2 of 3 \(layers\.1\), tokens 0–8 \(document 1 of 1\), is not finite"
    with pytest.raises(PlanError, match=said):
        _step(folder, spoil, lengths=(30,))
    _step(folder, spoil, lengths=(30,), scaled=True)  # the scaler sees it in the adapters' gradients


def test_what_is_finite_is_let_through_up_to_the_last_number() -> None:
    finite = Finite(2, 2, 4, torch.float32, CPU)
    largest = torch.full((3, 5), torch.finfo(torch.float32).max)
    row = Row.of(_batch(6), 4)
    finite.output(0, (0, 4), largest)
    finite.gradient(1, (4, 6), -largest)
    finite.check_outputs(row)
    finite.check_gradients(row)
    finite.output(1, (4, 6), largest * 2)
    with pytest.raises(PlanError, match=r"layer 2 of 2 \(layers.1\), tokens 4–6 \(document 1 of 1\)"):
        finite.check_outputs(row)
    finite.begin()
    finite.check_outputs(row)


def test_float16_is_told_of_bfloat16() -> None:
    finite = Finite(1, 1, 4, torch.float16, CPU)
    finite.output(0, (0, 4), torch.full((2, 2), 65504.0, dtype=torch.float16) * 2)
    with pytest.raises(PlanError, match="may need bfloat16"):
        finite.check_outputs(Row.of(_batch(4), 4))


def test_a_run_over_a_bad_weight_says_so(tmp_path: Path) -> None:
    model = save_model("llama", tmp_path / "model")
    with torch.no_grad():
        model.model.layers[1].input_layernorm.weight[3] = torch.nan
    model.save_pretrained(tmp_path / "model")
    write_sources(tmp_path / "data")
    choices = {"lora": {"rank": 4, "alpha": 8}, "chunked_loss": {"rows": 16}}
    streamed = {"chunk": 8, "heads": 2, "staging": "host", "kernel": "cpu"}
    plan = make_plan(
        tmp_path / "model",
        data=str(tmp_path / "data"),
        out=str(tmp_path / "out"),
        choices=choices | {"streamed": streamed},
        steps=2,
    )
    with pytest.raises(PlanError, match=r"training: the output of layer 2 of 3 \(layers\.1\), tokens 0–8"):
        execute(plan)


def test_streamed_step_is_what_it_was(folder: Path) -> None:
    """The magnitudes are taken beside the step and not of it: equal to the bit with and without them."""
    batch = _batch(17)
    loss, gradients = make_streamed(folder, batch, chunk=5, group=2)
    made, adapted = make_streamed_loss(folder, batch, chunk=5, group=2)
    made.layers.finite.output = made.layers.finite.gradient = lambda *_: None  # type: ignore[method-assign]
    other = made(batch, torch.tensor(float(batch.trained)).double(), nothing)
    other.backward()
    assert torch.equal(loss, other.detach())
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad:
            assert torch.equal(parameter.grad, gradients[name])
