"""Documents that share a row have the loss and the gradients that each has alone, and rows are packed as planned."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_trainer_parity import _adapted, _assert_same, _gradients, _grouped_products_of_any_type, _kernel, _wide_norms
from torch import Tensor
from trainer_tiny import CONFIGS, VOCAB, make_plan, save_model, write_sources

from planner.documents import Document, read_documents
from planner.packing import pack
from trainer.adapters import make_lean
from trainer.attention import register
from trainer.checkpointing import DeviceStore, Store, checkpoint_layers
from trainer.data import Batch, PackedRow, Row, collate, packed, prepare, synthetic_batch, tokenise_and_cut
from trainer.layers import layers_of
from trainer.loading import find_source, load_config, load_model
from trainer.run import execute
from trainer.step import make_loss, nothing

__all__ = ["_grouped_products_of_any_type"]  # a fixture of every test here
Step = tuple[Tensor, dict[str, Tensor]]
LENGTHS = ((7, 12, 1, 5), (9, 3))  # two rows, the second padded


def _pieces(*lengths: int) -> list[Row]:
    generator = torch.Generator().manual_seed(11)
    return [Row(torch.randint(VOCAB, (length + 1,), generator=generator), length) for length in lengths]


def _together() -> tuple[PackedRow, ...]:
    pieces = iter(_pieces(*(length for row in LENGTHS for length in row)))
    return tuple(PackedRow(tuple(next(pieces) for _ in row)) for row in LENGTHS)


class _Model:
    """One adapted model, whose steps are taken one after the other."""

    def __init__(self, folder: Path, attention: str, rows: int | None, store: Store | None) -> None:
        source, cpu = find_source(str(folder)), torch.device("cpu")
        model = load_model(
            source,
            load_config(source),
            dtype=torch.float64,
            attention=attention,
            device=cpu,
            four_bit=None,
            seed=0,
        )
        _wide_norms(model)
        self.adapted = _adapted(model)
        make_lean(self.adapted)
        if store is not None:
            checkpoint_layers(layers_of(model), store)
        self.loss = make_loss(model, rows)

    def step(self, batch: Batch, divisor: int) -> Step:
        self.adapted.zero_grad()
        loss = self.loss(batch, torch.tensor(float(divisor), dtype=torch.float64), nothing)
        loss.backward()
        return loss.detach(), {name: value.clone() for name, value in _gradients(self.adapted).items()}

    def both(self) -> tuple[Step, Step]:
        """The packed batch, and the sum over its documents one by one."""
        batch, pieces = collate(_together()), [piece for row in _together() for piece in row.pieces]
        alone = [self.step(collate([piece]), batch.trained) for piece in pieces]
        gradients = {name: torch.stack([step[1][name] for step in alone]).sum(0) for name in alone[0][1]}
        return self.step(batch, batch.trained), (torch.stack([step[0] for step in alone]).sum(), gradients)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("models")
    for family in CONFIGS:
        save_model(family, place / family, torch.float64)
    return {family: place / family for family in CONFIGS}


@pytest.mark.parametrize("family", CONFIGS)
def test_a_packed_step_is_that_of_its_documents_alone(folders: dict[str, Path], family: str) -> None:
    """An exact kernel for each document, layers recomputed, loss by slices."""
    assert collate(_together()).documents == ((7, 12, 1, 5), (9, 3, 13))
    _assert_same(*_Model(folders[family], register(_kernel(family)), 5, DeviceStore()).both())


@pytest.mark.parametrize("family", ["llama", "phi", "gemma3_text", "gpt_neox"])
@pytest.mark.parametrize(("attention", "rows"), [("cpu", None), ("sdpa", 5)])
def test_so_is_one_with_all_kept_or_with_a_mask(
    folders: dict[str, Path], family: str, attention: str, rows: int | None
) -> None:
    """Nothing recomputed and the stock loss; and the mask that transformers builds from the positions."""
    name = register("cpu") if attention == "cpu" else attention
    packed_step, alone = _Model(folders[family], name, rows, None).both()
    if rows is not None:  # transformers' own loss is float32
        _assert_same(packed_step, alone)
    for key, gradient in packed_step[1].items():
        assert (gradient - alone[1][key]).norm() <= 1e-5 * alone[1][key].norm(), key


@pytest.mark.parametrize("family", ["llama", "phi", "gemma3_text", "gpt_neox"])
def test_stored_scores_see_one_document(folders: dict[str, Path], family: str) -> None:
    """transformers' own attention, whose softmax is float32: it sees no other document, within what that rounds."""
    (loss, gradients), (wanted_loss, wanted) = _Model(folders[family], "eager", 5, None).both()
    assert abs(loss / wanted_loss - 1) < 1e-6
    for name, gradient in gradients.items():
        assert (gradient - wanted[name]).norm() <= 1e-5 * wanted[name].norm(), name


@given(
    inputs=st.lists(st.integers(1, 30), max_size=40),
    room=st.integers(1, 24),
    most=st.integers(2, 6),
)
def test_each_piece_is_in_one_row_and_no_row_is_too_full(inputs: list[int], room: int, most: int) -> None:
    rows = pack(inputs, room, most)
    assert sorted(piece for row in rows for piece in row) == list(range(len(inputs)))
    for row in rows:
        assert row and len(row) <= most
        assert len(row) == 1 or sum(inputs[piece] for piece in row) <= room
    assert rows == pack(inputs, room, most) == sorted(rows)
    # Of two rows that hold less than the most, the shorter would have gone into the other, had there been room.
    loose = sorted(sum(inputs[piece] for piece in row) for row in rows if len(row) < most)
    assert len(loose) < 2 or loose[0] + loose[1] > room


@given(
    sizes=st.lists(st.integers(0, 30), min_size=1, max_size=12),
    length=st.integers(2, 12),
    target=st.none() | st.integers(1, 12),
)
def test_packing_loses_no_token_and_keeps_to_the_plan(sizes: list[int], length: int, target: int | None) -> None:
    target = None if target is None or target >= length else target
    documents = [Document(str(index), chr(65 + index) * size) for index, size in enumerate(sizes)]

    def tokens(most: int) -> tuple[list[list[int]], object]:
        rows = tokenise_and_cut(documents, lambda texts: [[*map(ord, text)] for text in texts], length, target, most)
        for row in rows.rows:
            assert row.inputs <= length and row.trained <= (target or length) and len(row.pieces) <= most
        pieces = sorted([*map(int, piece.tokens), piece.trained] for row in rows.rows for piece in row.pieces)
        return pieces, (rows.documents, rows.tokens, rows.lost, rows.trained)

    assert tokens(1) == tokens(4)


def test_a_batch_says_where_documents_begin() -> None:
    batch = collate(_together())
    assert batch.positions is not None
    assert batch.positions[0].tolist() == [*range(7), *range(12), 0, *range(5)]
    assert batch.positions[1].tolist() == [*range(9), *range(3), *range(13)]
    plain = collate(packed(_pieces(4, 20), 20, 8))
    assert plain.documents is None and plain.positions is None  # each alone in its row


def test_the_largest_batch_has_as_many_documents_as_a_row_may() -> None:
    batch = synthetic_batch(2, 50, 50, VOCAB, 0, 8)
    assert batch.documents == ((7, 7, 6, 6, 6, 6, 6, 6),) * 2 and batch.trained == 100
    assert batch.spans == ((0, 100),)
    assert synthetic_batch(1, 3, 3, VOCAB, 0, 8).documents == ((1, 1, 1),)
    assert synthetic_batch(1, 50, 20, VOCAB, 0, 8).documents is None


def test_a_packed_run_judges_as_the_plain_one_does(tmp_path: Path) -> None:
    """The same documents are held out, and before training their loss is the same, whatever shares a row."""
    save_model("llama", tmp_path / "model")
    write_sources(tmp_path / "data", 12)
    records = []
    for packing in ({}, {"sequence_packing": {"documents": 16}}):
        choices = {"lora": {"rank": 4, "alpha": 8}, "exact_attention": {"kernel": "cpu"}, **packing}
        out = tmp_path / f"run-{len(packing)}"
        given = {"data": str(tmp_path / "data"), "out": str(out), "lr": 1e-2, "validation": 0.25}
        assert execute(make_plan(tmp_path / "model", choices=choices, total_tokens=240, **given)) == 0
        records.append(json.loads((out / "measurement.json").read_text()))
    plain, together = records
    assert together["data"]["train"]["rows"] < plain["data"]["train"]["rows"]
    assert len(together["losses"]) < len(plain["losses"])
    for key in ("documents", "tokens", "lost"):
        assert together["data"]["train"][key] == plain["data"]["train"][key]
    before = [record["evaluation"]["before"] for record in records]
    assert before[0]["tokens"] == before[1]["tokens"]
    assert before[0]["loss"] == pytest.approx(before[1]["loss"], rel=1e-5)
    assert together["evaluation"]["after"]["loss"] < before[1]["loss"]


def test_rows_of_a_real_folder_are_full(tmp_path: Path) -> None:
    write_sources(tmp_path / "data", 24)
    options = {"length": 512, "target": None, "validation": 0.0, "seed": 0}
    reading = read_documents(tmp_path / "data")
    plain, together = (
        prepare(reading, lambda texts: [[*text.encode()] for text in texts], **options, most_documents=most).train
        for most in (1, 64)
    )
    assert together.trained == plain.trained
    assert len(together.rows) < len(plain.rows)
    assert together.trained / (512 * len(together.rows)) > 0.9
