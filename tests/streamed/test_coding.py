"""Layer inputs in eight and four bits: how far off a value may be, and what that makes of states and gradients."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from streamed_step import make_streamed_loss
from test_trainer_parity import _batch, _gradients, folders
from torch import Tensor
from trainer_tiny import CONFIGS

from trainer.data import Batch, Row, collate
from trainer.loading import find_source, load_tokenizer
from trainer.step import nothing
from trainer.streamed.checkpoints import BLOCK, Codec, Int8, Nf4

__all__ = ["folders"]

CODECS: dict[str, Codec] = {"int8": Int8(), "nf4": Nf4()}
BITS = {"int8": 8 + 32 / BLOCK, "nf4": 4 + 32 / BLOCK}
LARGEST_STEP = {"int8": 1 / 127, "nf4": 1 - 0.6961928009986877}
"""Between two levels, as a share of the largest value of a block; NF4's widest is the one below 1."""
# Of SmolLM2-135M on 192 tokens of a text. Hidden states of the worst layer were off by 0.0171 in eight bits and by
# 0.157 in four, all gradients together by 0.0414 and by 0.348: a tenth and more above that something has changed.
HIDDEN = {"int8": 0.019, "nf4": 0.175}
GRADIENTS = {"int8": 0.046, "nf4": 0.39}
TINY = {"int8": 0.01, "nf4": 0.15}  # of two small random models, 0.008 and 0.124 at most


class InFloat32:
    """A codec for a model in float64, which bitsandbytes does not take."""

    def __init__(self, codec: Codec) -> None:
        self.codec, self.parts = codec, codec.parts

    def encode(self, hidden: Tensor) -> tuple[Tensor, ...]:
        return self.codec.encode(hidden.float())

    def decode(self, parts: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        return self.codec.decode(parts, torch.float32).to(dtype)


def hidden_like(tokens: int, width: int, dtype: torch.dtype) -> Tensor:
    """Numbers with a few channels a hundred times as large as the rest, as hidden states have them."""
    generator = torch.Generator().manual_seed(4)
    hidden = torch.randn(tokens, width, generator=generator)
    hidden[:, ::97] *= 100
    return hidden.to(dtype)


@pytest.mark.parametrize("form", CODECS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_no_value_is_further_off_than_half_a_step(form: str, dtype: torch.dtype) -> None:
    hidden, codec = hidden_like(40, 4 * BLOCK, dtype), CODECS[form]
    back = codec.decode(codec.encode(hidden), dtype)
    assert (back.shape, back.dtype) == (hidden.shape, dtype)
    blocks, off = (each.float().unflatten(-1, (-1, BLOCK)) for each in (hidden, back - hidden))
    most = blocks.abs().amax(-1, keepdim=True)
    rounding = torch.finfo(dtype).eps if dtype != torch.float32 else 1e-5
    assert (off.abs() <= most * (LARGEST_STEP[form] / 2 + rounding)).all()


@pytest.mark.parametrize("form", CODECS)
def test_bits_are_those_planned(form: str) -> None:
    parts = CODECS[form].encode(hidden_like(8, 4 * BLOCK, torch.bfloat16))
    told = CODECS[form].parts(4 * BLOCK)
    assert [(part.shape[1], part.dtype) for part in parts] == list(told)
    assert sum(part.nbytes for part in parts) * 8 == 8 * 4 * BLOCK * BITS[form]


@pytest.mark.parametrize("form", CODECS)
def test_zeros_and_one_token_come_back(form: str) -> None:
    codec = CODECS[form]
    nothing_there = torch.zeros(3, BLOCK)
    assert torch.equal(codec.decode(codec.encode(nothing_there), torch.float32), nothing_there)
    hidden = hidden_like(5, 2 * BLOCK, torch.float32)
    whole, alone = codec.encode(hidden), codec.encode(hidden[2:3])
    for part, single in zip(whole, alone, strict=True):  # every token for itself, so that any chunk can be read
        assert torch.equal(part[2:3], single)


@pytest.mark.parametrize("form", CODECS)
@pytest.mark.parametrize("family", ["llama", "phi"])
def test_the_loss_is_exact_and_gradients_are_nearby(folders: dict[str, Path], family: str, form: str) -> None:
    assert family in CONFIGS
    batch = _batch(40, 31)
    exact_loss, exact = stepped(folders[family], batch, None, chunk=16, group=2)
    loss, gradients = stepped(folders[family], batch, CODECS[form], chunk=16, group=2)
    assert loss == exact_loss
    assert 0 < error(gradients, exact) < GRADIENTS[form]


def stepped(
    source: Path, batch: Batch, codec: Codec | None, *, chunk: int, group: int
) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of all adapters, in float64."""
    made, adapted = make_streamed_loss(
        source, batch, chunk=chunk, group=group, rows=64, codec=codec and InFloat32(codec)
    )
    loss = made(batch, torch.tensor(float(batch.trained)).double(), nothing)
    loss.backward()
    return float(loss.detach()), _gradients(adapted)


def error(found: dict[str, Tensor], reference: dict[str, Tensor]) -> float:
    """The norm of the difference of all gradients, as a share of their norm."""
    apart = sum(float((found[name] - each).square().sum()) for name, each in reference.items())
    return float((apart / sum(float(each.square().sum()) for each in reference.values())) ** 0.5)


def text(model: Path) -> Batch:
    """The first tokens of a source of the standard library."""
    import argparse

    assert argparse.__file__
    tokenizer = load_tokenizer(find_source(str(model)))
    ids = tokenizer(Path(argparse.__file__).read_text(encoding="utf-8")[:4000])["input_ids"][:193]
    return collate([Row(torch.tensor(ids), len(ids) - 1)])


def real(model: Path, form: str | None) -> tuple[float, dict[str, Tensor], list[Tensor]]:
    """Loss, gradients and the inputs of all layers of SmolLM2-135M."""
    codec = None if form is None else InFloat32(CODECS[form])
    made, adapted = make_streamed_loss(model, text(model), chunk=64, group=3, rows=64, codec=codec)
    inputs: list[Tensor] = []
    if form is None:
        made.after_layer = lambda layer: inputs.append(
            made.layers.checkpoints.decode(
                layer, made.layers.checkpoints.fetch(made.layers.transfers, layer, 0, len(made.layers.row))
            ).clone()
        )
    batch = text(model)
    loss = made(batch, torch.tensor(float(batch.trained)).double(), nothing)
    loss.backward()
    return float(loss.detach()), _gradients(adapted), inputs


@pytest.mark.slow
def test_errors_of_hidden_states_and_gradients_on_real_weights(real_model: Path) -> None:
    exact_loss, exact, inputs = real(real_model, None)
    assert len(inputs) == 30
    for form in CODECS:
        loss, gradients, _ = real(real_model, form)
        assert loss == exact_loss
        codec = InFloat32(CODECS[form])
        off = [float((codec.decode(codec.encode(x), x.dtype) - x).norm() / x.norm()) for x in inputs]
        assert max(off) < HIDDEN[form]
        assert 0 < error(gradients, exact) < GRADIENTS[form]
