"""Weights in host memory: the same step as with all of them on the card, each layer copied as seldom as can be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from streamed_step import CPU, make_streamed
from test_memory_on_fake_tensors import CLOSE, planned, shortened
from test_trainer_parity import _adapted, _assert_same, _batch, _stock, folders
from torch import nn
from trainer_tiny import VOCAB, make_plan, save_model
from transformers import LlamaConfig

from planner.errors import PlanError
from planner.streamed_weights import copies_backward, copies_forward
from planner.symbols import Letters
from trainer import session
from trainer.data import synthetic_batch
from trainer.fake_step import counted, predicted
from trainer.four_bit import FourBit
from trainer.loading import find_source, load_config, load_model
from trainer.measure import exact_terms
from trainer.merging import merge
from trainer.streamed.checkpoints import backward_order
from trainer.streamed.split import register
from trainer.streamed.weights import StreamedWeights

__all__ = ["folders"]
needs_card = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a card")


@pytest.mark.parametrize("family", ["phi", "llama", "qwen3", "gemma3_text", "gpt_neox"])
@pytest.mark.parametrize("spacing", [1, 2, 3])
def test_step_equals_stock_step(folders: dict[str, Path], family: str, spacing: int) -> None:
    weights, batch = StreamedWeights(CPU), _batch(23, 9, trained=5)
    ours = make_streamed(folders[family], batch, chunk=9, group=2, spacing=spacing, weights=weights)
    _assert_same(ours, _stock(folders[family], 23, 9, trained=5))


class Layer(nn.Module):
    """One matrix, all of it the same number."""

    def __init__(self, number: int, *more: int) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.full((3, 5), float(number)), requires_grad=False)
        self.norm = nn.Parameter(torch.full((5, *more), float(number)), requires_grad=False)


def put_away(count: int) -> tuple[StreamedWeights, list[Layer]]:
    weights, layers = StreamedWeights(CPU), [Layer(number) for number in range(count)]
    for layer in layers:
        weights.put_away(layer)
    weights.ready()
    return weights, layers


def step(weights: StreamedWeights, layers: list[Layer], spacing: int) -> tuple[int, int]:
    """Visits every layer as a step does; gives the copies of the forward and the backward pass."""
    copies = []
    for order in (range(len(layers)), [index for index, _ in backward_order(len(layers), spacing)]):
        before = weights.copied
        weights.follow(order)
        for index in order:
            weights.enter(index)
            assert (layers[index].matrix == index).all()
        copies.append(weights.copied - before)
    return copies[0], copies[1]


@pytest.mark.parametrize("spacing", range(1, 7))
@pytest.mark.parametrize("count", range(1, 12))
def test_each_layer_is_there_when_it_is_entered_and_two_are_on_the_card(count: int, spacing: int) -> None:
    weights, layers = put_away(count)
    letters = Letters(L=count, L_s=spacing)
    step(weights, layers, spacing)
    for _ in range(2):  # once there was a step, every one begins where another ended
        assert step(weights, layers, spacing) == (copies_forward(letters), copies_backward(letters))
    on_card = {layer.matrix.untyped_storage().data_ptr() for layer in layers}
    assert len(on_card) == min(2, count)
    assert weights.host.bytes == count * 15 * 4
    assert all((layer.norm == number).all() for number, layer in enumerate(layers)), "norms stay where they are"


def test_the_next_layer_is_on_its_way_while_one_computes() -> None:
    weights, layers = put_away(5)
    weights.follow([0, 1, 2])
    assert weights.copied == 1
    weights.enter(0)
    assert weights.copied == 2
    weights.enter(1)
    assert weights.copied == 3
    weights.enter(2)
    assert weights.copied == 3
    assert (layers[2].matrix == 2).all()
    weights.need(layers[4].matrix)
    assert (layers[4].matrix == 4).all()


def test_the_next_layer_comes_in_equal_parts_behind_what_items_fetch(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many items as the last such visit had; of a kind that is new nobody knows, and all comes with the first."""
    monkeypatch.setattr("trainer.streamed.weights.PIECE", 4)  # a piece for each of a layer's 15 numbers
    weights, layers = put_away(4)
    places = [layer.matrix.data for layer in layers[:2]]

    def visits(kind: str, *items: int) -> list[list[int]]:
        """How many numbers of the next layer are there after each item of each layer."""
        came = []
        weights.follow(range(4))
        for index, count in enumerate(items):
            weights.enter(index, kind)
            assert (layers[index].matrix == index).all()
            there = []
            for _ in range(count):
                weights.fetched(None)
                there.append(sum(int((place == index + 1).sum()) for place in places))
            came.append(there)
        return came

    at_once = [[15] * 5, [15] * 4, [15] * 20, [0]]
    twenty = [-(-15 * item // 20) for item in range(1, 21)]
    assert visits("long", 5, 4, 20, 1) == at_once
    assert visits("long", 5, 4, 20, 1) == [[3, 6, 9, 12, 15], [4, 8, 12, 15], twenty, [0]]
    assert visits("short", 2, 2, 2, 1) == [[15] * 2] * 3 + [[0]], "another kind's items are not these"
    assert visits("long", 5, 1, 21, 1) == [[3, 6, 9, 12, 15], [4], [*twenty, 15], [0]]
    assert visits("long", 5, 1, 21, 1)[1] == [15], "of one kind it is the last visit that counts"


def test_an_order_that_was_not_told_is_an_error_of_ours() -> None:
    weights, _ = put_away(3)
    weights.follow([0, 1, 2])
    with pytest.raises(AssertionError, match="layer 1 is entered, and 0 was to come"):
        weights.enter(1)


def test_layers_of_different_shapes_are_refused() -> None:
    weights = StreamedWeights(CPU)
    weights.put_away(Layer(0))
    with pytest.raises(PlanError, match="layer 1 has matrices of other shapes"):
        weights.put_away(Layer(1, 2))


CHOICES = {
    "lora": {"rank": 4, "alpha": 8},
    "nf4_weights": {},
    "chunked_loss": {"rows": 16},
    "streamed": {"chunk": 16, "heads": 2, "staging": "host", "kernel": "cpu"},
}


@pytest.mark.parametrize("family", ["llama", "phi", "qwen3"])
@pytest.mark.parametrize("random", [False, True])
def test_four_bits_give_what_they_give_on_the_card(tmp_path: Path, family: str, random: bool) -> None:
    """Quantised layer by layer and brought back, weights and constants are bit for bit what they were."""
    save_model(family, tmp_path / family)
    source = f"{'random:' if random else ''}{tmp_path / family}"
    found, on_card = [], []
    for more in ({}, {"streamed_nf4_weights": {}}):
        built = session.build(make_plan(source, family=family, choices=CHOICES | more))
        generator = torch.Generator().manual_seed(3)
        for parameter in built.trained:
            parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
        loss = built.loss(
            synthetic_batch(1, 32, 32, built.base.config.vocab_size, 0), torch.tensor(32.0), lambda _: None
        )
        loss.backward()
        found.append((loss.detach(), [parameter.grad.clone() for parameter in built.trained]))
        assert bool(built.weights.host) == bool(more)
        on_card.append(exact_terms(built)["weights"])
        if more:
            assert on_card[0] - on_card[1] == built.weights.host.bytes // 3, "two layers of three are on the card"
        built.close()
    assert torch.equal(found[0][0], found[1][0])
    assert all(grad.norm() > 0 for grad in found[0][1])
    assert all(torch.equal(one, other) for one, other in zip(found[0][1], found[1][1], strict=True))


@pytest.mark.parametrize("place", ["cpu", pytest.param("cuda", marks=needs_card)])
@pytest.mark.parametrize("more", [{"streamed_weights": {}}, {"nf4_weights": {}, "streamed_nf4_weights": {}}], ids=len)
def test_steps_one_after_the_other_lose_no_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, more: dict[str, dict[str, Any]]
) -> None:
    """On a card copies run beside the computation: a layer that came late or went early would change the loss."""
    monkeypatch.setattr(session, "take_device", lambda _: torch.device(place))
    width, heads = (4096, 64) if place == "cuda" else (64, 4)
    sizes = {"hidden_size": width, "intermediate_size": 2 * width, "num_attention_heads": heads}
    LlamaConfig(**sizes, num_hidden_layers=5, num_key_value_heads=2, vocab_size=VOCAB).save_pretrained(tmp_path)
    streaming = {
        "chunk": 64,
        "heads": heads // 2,
        "staging": "host",
        "kernel": "efficient" if place == "cuda" else "cpu",
    }
    common = {
        "lora": {"rank": 4, "alpha": 8},
        "chunked_loss": {"rows": 64},
        "mixed_precision": {"dtype": "bfloat16"},
        "streamed": streaming,
        "checkpoint_spacing": {"every": 2},
    }
    losses = []
    for choices in ({name: knobs for name, knobs in more.items() if name == "nf4_weights"}, more):
        plan = make_plan(f"random:{tmp_path}", choices=common | choices, total_tokens=256)
        plan = plan.model_copy(update={"model": plan.model.model_copy(update={"layers": 5})})
        built = session.build(plan)
        batch = synthetic_batch(1, 256, 256, VOCAB, 0).to(built.device)
        one = []
        for _ in range(3):
            loss = built.loss(batch, torch.tensor(256.0, device=built.device), lambda _: None)
            loss.backward()
            one.append(float(loss))
        losses.append(one)
        built.close()
    assert losses[1] == losses[0]
    assert len({*losses[0]}) == 1, "nothing was updated"


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("four_bit", [None, FourBit(double_quantization=True)])
def test_a_checkpoint_is_loaded_as_it_is_without(tmp_path: Path, stored: torch.dtype, four_bit: FourBit | None) -> None:
    """Whatever dtype the files have."""
    save_model("llama", tmp_path, stored)
    source, weights = find_source(str(tmp_path)), StreamedWeights(CPU)
    whole, parted = (
        load_model(
            source,
            load_config(source),
            dtype=torch.float16,
            attention=register(),
            device=CPU,
            four_bit=four_bit,
            seed=0,
            put_away=each,
        )
        for each in (None, weights.put_away)
    )
    weights.ready()
    parts = dict(parted.named_parameters())
    for name, parameter in whole.named_parameters():
        weights.need(parts[name])
        assert parts[name].dtype == parameter.dtype, name
        assert torch.equal(parts[name], parameter), name
    buffers = dict(parted.named_buffers())
    assert all(torch.equal(buffers[name], buffer) for name, buffer in whole.named_buffers())


def test_merged_weights_are_the_same(tmp_path: Path) -> None:
    save_model("llama", tmp_path / "model", torch.float64)
    source, files = find_source(str(tmp_path / "model")), []
    for weights in (None, StreamedWeights(CPU)):
        model = load_model(
            source,
            load_config(source),
            dtype=torch.float64,
            attention=register(),
            device=CPU,
            four_bit=None,
            seed=0,
            put_away=weights and weights.put_away,
        )
        if weights is not None:
            weights.ready()
        final = merge(_adapted(model), source, None, tmp_path / f"merged{len(files)}", torch.float64, weights)
        files.append((final / "model.safetensors").read_bytes())
    assert files[0] == files[1]


ROOM = ("buffers/weights", "buffers/staging_on_card", "buffers/log_sum_exp_on_card")


@pytest.mark.parametrize(
    ("model", "more"),
    [("llama-3.2-1b", {"streamed_weights"}), ("phi-2", {"nf4_weights", "streamed_nf4_weights"})],
)
def test_bytes_on_the_card_and_in_the_host_are_those_planned(tmp_path: Path, model: str, more: set[str]) -> None:
    """Four layers, two of them on the card."""
    on = {"lora", "mixed_precision", "chunked_loss", "streamed", *more}
    plan = planned(str(shortened(model, 4, tmp_path / model)), "h200-sxm", on, 4096)
    found, said = counted(plan), predicted(plan)
    peak = max(found.phases.values())
    assert max(said[phase] for phase in found.phases if phase in said) == pytest.approx(peak, rel=CLOSE), (found, said)
    static = sum(
        size
        for name, size in plan.memory.gpu.phases["forward"].items()
        if name.partition("/")[0] in ("weights", "adapters", "gradients", "optimizer") or name in ROOM
    )
    assert found.resident == pytest.approx(static, rel=CLOSE)
    host = plan.memory.host.terms
    assert host["weights/linear"] + host.get("weights/constants", 0) == pytest.approx(found.weights, rel=1e-6)
