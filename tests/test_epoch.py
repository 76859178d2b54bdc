"""An epoch as planned against the rows that the trainer cuts, bounded reading of large data, and cost."""

from __future__ import annotations

import json
import math
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from trainer_tiny import save_model, save_tokenizer, write_sources

from planner import data_profile
from planner.calibration import calibration
from planner.data_profile import profile_data
from planner.documents import read_documents
from planner.epoch import packed_rows, row_lengths
from planner.plan import Plan
from planner.planning import Request, make_plan
from trainer.data import cut, epochs, prepare
from trainer.loading import find_source, load_tokenizer, tokenise_with
from trainer.training import planned_steps


def planned(data: Path, model: str = "smollm2-135m", gpu: str = "rtx2060s", **train: Any) -> Plan:
    total, target, excluded = train.pop("total", 64), train.pop("target", None), train.pop("excluded", ())
    settings = {"data": str(data), **train}
    return make_plan(
        Request(gpu=gpu, model=model, total_tokens=total, target=target, excluded=excluded, train=settings)
    )


@pytest.mark.parametrize("train", [{}, {"accumulation": 3}, {"validation": 0.3, "seed": 5}, {"validation": 0.0}])
def test_an_epoch_is_what_the_trainer_makes_of_the_data(tmp_path: Path, train: dict[str, Any]) -> None:
    save_model("llama", tmp_path / "model")
    sources = write_sources(tmp_path / "data", 9)
    (sources / "picture.bin").write_bytes(b"\0\1\2")
    (sources / ".hidden").write_text("no")
    (sources / "empty.py").write_text("  ")
    plan = planned(sources, str(tmp_path / "model"), **train)
    told = plan.time.epoch
    assert told is not None and told.tokens_basis == "exact"
    tokenise = tokenise_with(load_tokenizer(find_source(plan.model.source)))
    settings = plan.train
    reading = read_documents(sources)
    data = prepare(reading, tokenise, length=64, target=None, validation=settings.validation, seed=settings.seed)
    assert told.documents == len(reading.documents) == 9
    assert told.bytes == sum(len(document.text.encode()) for document in reading.documents)
    assert told.tokens == data.train.tokens + data.validation.tokens
    assert told.validation_documents == data.validation.documents
    assert told.rows == len(data.train.rows)
    assert told.steps == planned_steps(settings, len(data.train.rows))


def test_hours_are_those_of_rows_of_their_own_length(tmp_path: Path) -> None:
    save_tokenizer(tmp_path)
    text, tokenizer = "x = 1\n" * 400, Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    (tmp_path / "data").mkdir()
    for index in range(4):
        (tmp_path / "data" / f"{index}.py").write_text(text)
    save_model("llama", tmp_path / "model")
    inputs = len(tokenizer.encode(text).ids) - 1
    assert inputs > 128

    def hours(total: int, batch: int = 1) -> float:
        # Longer rows are faster in 16 bits; all of these are computed alike.
        alike: dict[str, Any] = {"validation": 0.0, "excluded": ("mixed_precision",)}
        plan = planned(tmp_path / "data", str(tmp_path / "model"), total=total, batch=batch, **alike)
        assert plan.time.epoch is not None and plan.time.epoch.hours is not None
        return plan.time.epoch.hours

    def step(total: int, batch: int = 1) -> float:
        return planned(tmp_path / "data", str(tmp_path / "model"), total=total, batch=batch).time.step_seconds.estimate

    # A row as long as the document, in a plan for exactly that and in a plan for far more.
    assert hours(inputs) == pytest.approx(4 * step(inputs) / 3600, rel=1e-3)
    assert hours(inputs, 2) == pytest.approx(2 * step(inputs, 2) / 3600, rel=1e-3)
    assert hours(4 * inputs) < 1.05 * hours(inputs)
    half = (inputs + 1) // 2
    assert hours(half) == pytest.approx(8 * step(half) / 3600, rel=0.1)


@pytest.mark.parametrize(("batch", "target"), [(1, None), (3, None), (1, 40)])
def test_packed_rows_are_those_of_the_trainer(tmp_path: Path, batch: int, target: int | None) -> None:
    data = write_sources(tmp_path / "data", 40)

    def told(packing: bool) -> tuple[Plan, Any]:
        request = Request(
            gpu="rtx4090",
            model="random:smollm2-135m",
            total_tokens=2048,
            target=target and 1024,
            required=("sequence_packing",) if packing else (),
            knobs={"sequence_packing": {"documents": 5}} if packing else {},
            train={"data": str(data), "batch": batch},
        )
        plan = make_plan(request)
        assert plan.time.epoch is not None
        return plan, plan.time.epoch

    (plain, alone), (plan, together) = told(False), told(True)
    rows = prepare(
        read_documents(data),
        lambda texts: [list(text.encode()) for text in texts],
        length=2048,
        target=None if plan.target == plan.total_tokens else plan.target,
        validation=0.1,
        seed=0,
        most_documents=5,
    ).train.rows
    assert together.rows == len(rows) < alone.rows
    assert together.steps == math.ceil(len(rows) / batch) and together.hours < alone.hours
    hints = [[w for w in each.warnings if "sequence_packing" in w] for each in (plain, plan)]
    assert len(hints[0]) == 1 and not hints[1]


def test_attention_of_a_packed_row_is_that_of_its_documents() -> None:
    pieces = np.array([100, 30, 60, 7, 3])
    rows = packed_rows(pieces, 100, 3)
    assert sorted(rows.lengths.tolist()) == [3, 97, 100] and rows.lengths.sum() == pieces.sum()
    assert rows.pairs.sum() == sum(size * (size + 1) for size in pieces.tolist())
    alone = packed_rows(pieces, 100, 1)
    assert alone.lengths.tolist() == pieces.tolist() and alone.pairs.sum() == rows.pairs.sum()
    assert not len(packed_rows(pieces[:0], 100, 3).lengths)


@given(tokens=st.lists(st.integers(0, 60), min_size=1, max_size=8), length=st.integers(1, 20))
def test_rows_are_cut_as_the_trainer_cuts_them(tokens: list[int], length: int) -> None:
    import torch

    expected = sorted(row.inputs for count in tokens for row in cut(torch.arange(count), length, None))
    assert sorted(row_lengths(np.array(tokens), length).tolist()) == expected
    assert sum(expected) == sum(max(0, count - 1) for count in tokens)


def test_steps_of_an_epoch_are_all_its_batches(tmp_path: Path) -> None:
    plan = planned(write_sources(tmp_path / "data", 7), "random:smollm2-135m", batch=3, accumulation=2)
    told = plan.time.epoch
    assert told is not None and told.tokens_basis == "exact", "random weights take bytes for tokens"
    assert told.tokens == told.bytes
    rows = prepare(
        read_documents(tmp_path / "data"),
        lambda texts: [list(text.encode()) for text in texts],
        length=64,
        target=None,
        validation=0.1,
        seed=0,
    ).train.rows
    batches = list(islice(epochs(rows, 3, 0), math.ceil(len(rows) / 3)))
    assert sum(len(batch.inputs) for batch in batches) == told.rows
    assert told.steps == math.ceil(len(batches) / 2)


def test_without_a_tokenizer_tokens_are_estimated_and_the_plan_says_so(tmp_path: Path) -> None:
    told = planned(write_sources(tmp_path / "data")).time.epoch
    assert told is not None and told.tokens_basis == "estimated"
    assert told.tokens == pytest.approx(told.bytes / calibration().document["bytes_per_token"]["value"], rel=0.01)
    assert "no tokenizer.json" in told.basis and "SmolLM2" in told.basis


def test_a_large_folder_is_read_in_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for index in range(60):
        (tmp_path / f"{index}.py").write_text("value = 1\n" * 50)
        (tmp_path / f"{index}.bin").write_bytes(b"\0" * 500)
    whole = profile_data(tmp_path, "nobody/nothing", calibration())
    assert len(whole.sizes) == 60 and "were not read" not in whole.basis
    opened: list[Path] = []
    real = data_profile.text_of
    monkeypatch.setattr(data_profile, "text_of", lambda file: (opened.append(file), real(file))[1])
    monkeypatch.setattr(data_profile, "READ", 20_000)
    part = profile_data(tmp_path, "nobody/nothing", calibration())
    assert part.sizes == whole.sizes and part == profile_data(tmp_path, "nobody/nothing", calibration())
    assert 20 <= len(opened) / 2 <= 40 and f"{120 - len(opened) // 2} of 120 files were not read" in part.basis


def test_a_large_file_is_read_in_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": "word " * 20}) + "\n" for _ in range(1000)))
    text = tmp_path / "text.txt"
    text.write_text("é" * 50_000)
    monkeypatch.setattr(data_profile, "READ", 10_001)
    monkeypatch.setattr(data_profile, "TOKENISED", 999)
    found = profile_data(rows, "nobody/nothing", calibration())
    assert len(found.sizes) == 1000 and set(found.sizes) == {100} and "were not read" in found.basis
    assert profile_data(text, "nobody/nothing", calibration()).sizes == (100_000,)
    save_tokenizer(tmp_path / "model")
    sampled = profile_data(text, str(tmp_path / "model"), calibration())
    assert not sampled.exact and "bytes a token" in sampled.basis


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("nowhere", None, "nowhere: does not exist."),
        ("rows.jsonl", '{"txt": 1}\n', "line 1: has no field text"),
        ("one.txt", "one document", "needs two documents"),
        ("blank.txt", " ", "holds no text to train on"),
    ],
)
def test_data_that_nothing_can_be_said_of_is_a_warning(
    tmp_path: Path, name: str, content: str | None, told: str
) -> None:
    place = tmp_path / name
    if content is not None:
        place.write_text(content)
    plan = planned(place)
    assert plan.time.epoch is None and plan.verdict == "fits"
    assert told in next(warning for warning in plan.warnings if "epoch" in warning)


def test_one_document_is_enough_where_nothing_is_judged(tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("one document")
    plan = planned(tmp_path / "one.txt", validation=0.0)
    assert plan.time.epoch is not None and plan.time.epoch.documents == 1


def test_cost_follows_from_time_price_and_power() -> None:
    def costs(gpu: str, price: float | None, power: float | None) -> Any:
        request = Request(gpu=gpu, total_tokens=4096, price_per_hour=price, power_price_per_kwh=power)
        return make_plan(request).time

    time = costs("rtx2060s", 0.36, 0.30)
    step = time.cost.step
    hours = time.step_seconds.estimate / 3600
    assert step.card_cost == pytest.approx(0.36 * hours, rel=1e-4)
    assert step.kwh_at_most == pytest.approx(0.175 * hours, rel=1e-4)
    assert step.power_cost_at_most == pytest.approx(0.30 * 0.175 * hours, rel=1e-4)
    assert time.cost.epoch is None and "175 W" in time.cost.basis
    rented = costs("rtx2060s", 0.36, None).cost.step
    assert rented.card_cost == step.card_cost and rented.power_cost_at_most is None
    assert costs("rtx2060s", None, None).cost is None
    cpu = costs("cpu", 1.0, 1.0).cost
    assert cpu.step.card_cost is None and "unknown" in cpu.basis


def test_a_card_without_a_known_power_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    from planner import planning
    from planner.hardware import Sourced, load_profile

    card = replace(load_profile("rtx2060s"), tdp_w=Sourced(None, "", "nobody wrote it down"))
    monkeypatch.setattr(planning, "load_profile", lambda _: card)
    cost = make_plan(Request(total_tokens=4096, price_per_hour=1.0, power_price_per_kwh=1.0)).time.cost
    assert cost is not None and cost.step.kwh_at_most is None and cost.step.power_cost_at_most is None
    assert cost.step.card_cost is not None and "nobody wrote it down" in cost.basis
