"""Documents, their split, and rows: no token lost in silence, none trained twice, no documents joined."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.documents import Document, Reading, read_documents
from planner.errors import PlanError
from trainer.data import (
    NOT_TRAINED,
    Row,
    collate,
    cut,
    epochs,
    evaluation_batches,
    prepare,
    split_documents,
    synthetic_batch,
    tokenise_and_cut,
)

DOCUMENTS = [Document(f"d{index}", "x" * index) for index in range(12)]


def _letters(texts: object) -> list[list[int]]:
    return [[ord(letter) for letter in text] for text in texts]  # type: ignore[attr-defined]


@given(tokens=st.integers(0, 200), length=st.integers(1, 60), target=st.none() | st.integers(1, 60))
def test_every_token_but_the_first_is_a_target_once(tokens: int, length: int, target: int | None) -> None:
    document = torch.arange(tokens, dtype=torch.int32)
    rows = cut(document, length, target)
    assert all(1 <= row.inputs <= length for row in rows)
    read = [token for row in rows for token in row.tokens[:-1].tolist()]
    predicted = [token for row in rows for token in row.tokens[1:].tolist()]
    assert read == list(range(tokens - 1)) and predicted == list(range(1, tokens))
    assert all(row.trained == min(row.inputs, target or length) for row in rows)


@given(lengths=st.lists(st.integers(0, 30), min_size=1, max_size=8), length=st.integers(1, 9))
def test_counts_add_up(lengths: list[int], length: int) -> None:
    documents = [Document(str(index), "a" * size) for index, size in enumerate(lengths)]
    rows = tokenise_and_cut(documents, _letters, length, None)
    assert rows.tokens == sum(lengths)
    assert rows.lost == sum(size > 0 for size in lengths)
    assert rows.trained == rows.tokens - rows.lost == sum(row.inputs for row in rows.rows)
    assert rows.documents == sum(size > 1 for size in lengths)
    assert rows.longest == max((min(size - 1, length) for size in lengths if size > 1), default=0)


@given(
    sizes=st.lists(st.tuples(st.integers(1, 12), st.integers(1, 12)), min_size=1, max_size=5),
)
def test_batch_says_what_is_trained_in_two_ways_that_agree(sizes: list[tuple[int, int]]) -> None:
    rows = [Row(torch.arange(1, inputs + 2), min(inputs, trained)) for inputs, trained in sizes]
    batch = collate(rows)
    flat = batch.targets.flatten()
    places = [place for start, stop in batch.spans for place in range(start, stop)]
    assert places == (flat != NOT_TRAINED).nonzero().flatten().tolist()
    assert batch.trained == len(places) and batch.tokens == sum(row.inputs for row in rows)
    assert all(stop < start for (_, stop), (start, _) in zip(batch.spans, batch.spans[1:], strict=False))
    # A trained position's target is the token after it.
    assert (flat[places] == batch.inputs.flatten()[places] + 1).all()


def test_full_rows_are_one_span() -> None:
    batch = synthetic_batch(3, 8, 8, 50, seed=1)
    assert batch.spans == ((0, 24),) and batch.inputs.shape == (3, 8)
    assert synthetic_batch(1, 8, 3, 50, seed=1).spans == ((5, 8),)


@given(count=st.integers(2, 40), share=st.floats(0.01, 0.99), seed=st.integers(0, 5))
def test_split_is_by_document_and_repeats(count: int, share: float, seed: int) -> None:
    documents = [Document(str(index), "text") for index in range(count)]
    train, judged = split_documents(documents, share, seed)
    assert train and judged and len(train) + len(judged) == count
    assert sorted(train + judged, key=lambda d: int(d.name)) == documents
    assert split_documents(documents, share, seed) == (train, judged)


def test_split_needs_two_documents() -> None:
    assert split_documents(DOCUMENTS[:1], 0.0, 0) == (DOCUMENTS[:1], [])
    with pytest.raises(PlanError, match=r"train\.validation=0"):
        split_documents(DOCUMENTS[:1], 0.1, 0)


def test_too_short_documents_are_refused() -> None:
    with pytest.raises(PlanError, match="nothing to train on"):
        prepare(
            Reading((Document("a", "x"), Document("b", "y")), {}),
            _letters,
            length=8,
            target=None,
            validation=0.5,
            seed=0,
        )


def test_epochs_hold_every_row_once_in_a_new_order() -> None:
    rows = [Row(torch.tensor([index, index]), 1) for index in range(10)]
    stream = epochs(rows, 4, seed=3)
    seen = [[int(token) for _ in range(3) for token in next(stream).inputs.flatten()] for _ in range(2)]
    assert [sorted(epoch) for epoch in seen] == [list(range(10))] * 2
    assert seen[0] != seen[1]
    again = epochs(rows, 4, seed=3)
    assert [int(token) for _ in range(3) for token in next(again).inputs.flatten()] == seen[0]


def test_evaluation_takes_the_same_rows_every_time() -> None:
    rows = tokenise_and_cut([Document("a", "abcdefghijklmnopq")], _letters, 2, None)
    first, second = (evaluation_batches(rows, 3, 2, seed=1) for _ in range(2))
    assert [len(batch.inputs) for batch in first] == [2, 1]
    assert all(torch.equal(a.inputs, b.inputs) for a, b in zip(first, second, strict=True))


def test_folder_skips_and_says_what(tmp_path: Path) -> None:
    (tmp_path / "pkg").mkdir()
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "config").write_text("hidden")
    (tmp_path / "pkg" / "b.py").write_text("b = 1\n")
    (tmp_path / "a.py").write_text("a = 1\n")
    (tmp_path / ".hidden").write_text("hidden")
    (tmp_path / "blob.bin").write_bytes(b"\0\1\2")
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    (tmp_path / "empty.py").write_text(" \n")
    (tmp_path / "huge.txt").write_bytes(b"a" * 10_000_001)
    (tmp_path / "link.py").symlink_to(tmp_path / "a.py")
    reading = read_documents(tmp_path)
    assert [document.name for document in reading.documents] == ["a.py", "pkg/b.py"]
    assert dict(reading.skipped) == {
        "binary": ("blob.bin",),
        "empty": ("empty.py",),
        "larger than 10 MB": ("huge.txt",),
        "not UTF-8": ("latin.txt",),
    }


def test_jsonl_rows_are_documents(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"text": "one", "id": 3}\n\n{"text": ""}\n{"text": "zwei \\u00e9"}\n', encoding="utf-8")
    reading = read_documents(path)
    assert [(d.name, d.text) for d in reading.documents] == [("line 1", "one"), ("line 4", "zwei é")]
    assert dict(reading.skipped) == {"empty": ("line 3",)}


@pytest.mark.parametrize(("line", "why"), [
    (b"{not json", r"line 2.*is not JSON: .* at column 2"),
    (b'["a"]', r"line 2.*holds list"),
    (b'{"content": "a"}', r"line 2.*no field text; it has content"),
    (b'{"text": 3}', r"line 2.*is int, not a string"),
    (b'{"text": "\\ud800"}', r"line 2.*surrogate"),
    (b'{"text": "\xff"}', r"line 2.*not UTF-8"),
])  # fmt: skip
def test_malformed_jsonl_row_is_named(tmp_path: Path, line: bytes, why: str) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'{"text": "fine"}\n' + line + b"\n")
    with pytest.raises(PlanError, match=why):
        read_documents(path)


def test_text_file_and_what_is_none(tmp_path: Path) -> None:
    path = tmp_path / "notes.md"
    path.write_text("# Notes\n")
    assert read_documents(path).documents == (Document("notes.md", "# Notes\n"),)
    with pytest.raises(PlanError, match="is not an ordinary file"):  # and has no end
        read_documents(Path("/dev/zero"))
    with pytest.raises(PlanError, match="does not exist"):
        read_documents(tmp_path / "nothing")
    (tmp_path / "blob").write_bytes(b"\xff\xfe")
    with pytest.raises(PlanError, match="not UTF-8"):
        read_documents(tmp_path / "blob")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "x.bin").write_bytes(b"\0")
    with pytest.raises(PlanError, match="1 binary"):
        read_documents(tmp_path / "folder")


@given(texts=st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=40), min_size=1, max_size=5))
@settings(deadline=None)
def test_jsonl_round_trip(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> None:
    path = tmp_path_factory.mktemp("jsonl") / "data.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    kept = [text for text in texts if text.strip()]
    if kept:
        assert [document.text for document in read_documents(path).documents] == kept
    else:
        with pytest.raises(PlanError, match="no text"):
            read_documents(path)
