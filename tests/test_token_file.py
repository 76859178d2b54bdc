"""Tokens in a mapped file: the rows are the same, nothing is left behind, and memory holds what is being read."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from run_folder import record
from safetensors.torch import load_file
from trainer_tiny import make_plan, save_model, write_sources

from planner.documents import Document, StoredDocument, read_documents
from planner.errors import PlanError
from planner.planning import Request
from planner.planning import make_plan as planned
from trainer.data import collate, prepare
from trainer.loading import tokenise_bytes
from trainer.run import execute
from trainer.token_file import TokenFile


def _texts(folder: Path) -> list[str]:
    return ["def add(a, b):\n    return a + b\n" * n for n in (1, 7, 40, 3, 200)] + ["ä€𝄞\r\nline", "x"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    data = tmp_path / "data"
    data.mkdir()
    for number, text in enumerate(_texts(tmp_path)):
        (data / f"file_{number}.py").write_bytes(text.encode())
    (data / "empty.py").write_text(" \n")
    (data / "picture.bin").write_bytes(b"\0\1")
    return data


@pytest.fixture
def rows_file(tmp_path: Path) -> Path:
    file = tmp_path / "rows.jsonl"
    lines = [json.dumps({"text": text, "n": n}, ensure_ascii=n % 2 == 0) for n, text in enumerate(_texts(tmp_path))]
    file.write_bytes("\n".join([lines[0], "", *lines[1:3]]).encode() + b"\r\n" + "\r".join(lines[3:]).encode())
    return file


@pytest.mark.parametrize("kind", ["folder", "rows_file", "text"])
def test_texts_that_are_not_kept_are_those_that_are(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    if kind == "text":
        place = tmp_path / "one.txt"
        place.write_bytes("some ä text\r\n".encode())
    else:
        place = request.getfixturevalue(kind)
    kept, stored = read_documents(place), read_documents(place, keep=False)
    assert all(isinstance(each, Document) for each in kept.documents)
    assert all(isinstance(each, StoredDocument) for each in stored.documents) and stored.documents
    assert [(each.name, each.text) for each in stored.documents] == [(each.name, each.text) for each in kept.documents]
    assert stored.skipped == kept.skipped


@pytest.mark.parametrize("line", ["{", '{"other": 1}', '{"text": 3}'])
def test_a_malformed_row_is_told_of_alike(tmp_path: Path, line: str) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"text": "good"}\n' + line)
    told = []
    for keep in (True, False):
        with pytest.raises(PlanError) as caught:
            read_documents(file, keep=keep)
        told.append(str(caught.value))
    assert told[0] == told[1] and "line 2" in told[0]


def test_a_text_that_is_gone_is_told_of(folder: Path, rows_file: Path) -> None:
    document, row = read_documents(folder, keep=False).documents[0], read_documents(rows_file, keep=False).documents[2]
    for content in (b'{"text": 1}', b'{"other": "x"}', b"no JSON", b"\xff\xff"):
        rows_file.write_bytes(content)
        with pytest.raises(PlanError, match="is not what it was when it was read first"):
            assert replace(row, start=0, size=len(content)).text
    rows_file.unlink()
    (folder / document.name).unlink()
    for gone in (document, row):
        with pytest.raises(PlanError, match="is not what it was when it was read first"):
            assert gone.text


@pytest.mark.parametrize("most", [1, 4])
@pytest.mark.parametrize("target", [None, 5])
def test_rows_are_the_same(folder: Path, tmp_path: Path, most: int, target: int | None) -> None:
    kept, stored = read_documents(folder), read_documents(folder, keep=False)
    given = {"length": 16, "target": target, "validation": 0.3, "seed": 3, "most_documents": most}
    plain = prepare(kept, tokenise_bytes, **given)  # type: ignore[arg-type]
    disk = tmp_path / "scratch"
    disk.mkdir()
    mapped = prepare(stored, tokenise_bytes, **given, store=lambda: TokenFile(disk))  # type: ignore[arg-type]
    assert not any(disk.iterdir()), "the file has no name any more"
    for one, other in ((plain.train, mapped.train), (plain.validation, mapped.validation)):
        assert (one.documents, one.tokens, one.lost, one.trained) == (
            other.documents,
            other.tokens,
            other.lost,
            other.trained,
        )
        assert len(one.rows) == len(other.rows) > 0
        for mine, theirs in zip(one.rows, other.rows, strict=True):
            assert mine.trained == theirs.trained
            pieces = zip(mine.pieces, theirs.pieces, strict=True)
            assert all(torch.equal(a.tokens, b.tokens) and a.trained == b.trained for a, b in pieces)
    batch = collate(mapped.train.rows[:2])
    assert torch.equal(batch.inputs, collate(plain.train.rows[:2]).inputs)


def test_documents_without_tokens_and_more_than_one_batch(tmp_path: Path) -> None:
    documents = [torch.arange(n % 5, dtype=torch.int32) for n in range(200)]
    found = list(TokenFile(tmp_path).mapped(iter(documents)))
    assert len(found) == 200 and all(torch.equal(one, other) for one, other in zip(found, documents, strict=True))
    assert list(TokenFile(tmp_path).mapped([])) == []


def test_what_a_document_fails_of_is_not_the_disk_s_fault(tmp_path: Path) -> None:
    def failing() -> Any:
        yield torch.zeros(3, dtype=torch.int32)
        raise FileNotFoundError("a text is gone")

    with pytest.raises(FileNotFoundError, match="a text is gone"):
        list(TokenFile(tmp_path).mapped(failing()))
    assert not any(tmp_path.iterdir())


def test_a_disk_that_takes_nothing_is_told_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tempfile.mkstemp", full)
    with pytest.raises(PlanError, match=r"does not take them: No space left.*train\.scratch"):
        list(TokenFile(tmp_path).mapped([torch.zeros(3, dtype=torch.int32)]))


HELD = """
import gc, sys
from pathlib import Path
from planner.documents import read_documents
from trainer.data import prepare
from trainer.loading import tokenise_bytes
from trainer.token_file import TokenFile

def anonymous():
    gc.collect()
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("Anonymous:")).split()[1])

file, mapped = Path(sys.argv[1]), sys.argv[2] == "mapped"
store = (lambda: TokenFile(file.parent)) if mapped else None
held = []
for lines in (250, 3000):
    part = file.with_name(f"{lines}.jsonl")
    with file.open("rb") as whole, part.open("wb") as first:
        for line, _ in zip(whole, range(lines)):
            first.write(line)
    kept = prepare(read_documents(part, keep=not mapped), tokenise_bytes, length=4096, target=None, validation=0.1,
                   seed=0, store=store)
    held.append(anonymous())
print(held[1] - held[0], 4 * (kept.train.tokens + kept.validation.tokens))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="only Linux tells what is anonymous")
def test_memory_holds_what_is_being_read(tmp_path: Path) -> None:
    """Of twelve times the data: without it texts and tokens more; with it less than a quarter of the tokens.

    What is left is a place in the file for each document and row, a kilobyte or two.
    """
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"text": f"{number} " * 1600}) + "\n" for number in range(3000)))
    held = {}
    for how in ("mapped", "kept"):
        command = [sys.executable, "-c", HELD, str(file), how]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        held[how], size = map(int, done.stdout.split())
    assert size > 80 * 2**20
    assert held["kept"] > size and held["mapped"] < size / 4, held


def test_a_run_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own, mapped_parts, kept_texts = TokenFile.mapped, [], []

    def mapping(self: TokenFile, documents: Any) -> Any:
        mapped_parts.append(self)
        return own(self, documents)

    def reading(path: Path, *, keep: bool = True) -> Any:
        kept_texts.append(keep)
        return read_documents(path, keep=keep)

    monkeypatch.setattr(TokenFile, "mapped", mapping)
    monkeypatch.setattr("trainer.run.read_documents", reading)
    save_model("llama", tmp_path / "model")
    write_sources(tmp_path / "data")
    for name, more in (("plain", {}), ("mapped", {"mapped_tokens": {}})):
        choices = {"lora": {"rank": 4, "alpha": 8}, "sequence_packing": {"documents": 3}} | more
        given = {"steps": 4, "lr": 1e-2, "validation": 0.25, "evaluation_rows": 3, "out": str(tmp_path / name)}
        assert execute(make_plan(tmp_path / "model", data=str(tmp_path / "data"), choices=choices, **given)) == 0
    assert kept_texts == [True, False] and len(mapped_parts) == 2, "what is trained on and what is judged by"
    plain, mapped = (record(tmp_path / name) for name in ("plain", "mapped"))
    assert plain["losses"] == mapped["losses"] and plain["data"] == mapped["data"]
    one, other = (load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("plain", "mapped"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_plan_with_it_is_the_same_plan() -> None:
    plain, asked = planned(Request(tier=1)), planned(Request(tier=1, required=("mapped_tokens",)))
    assert asked.memory == plain.memory and asked.time == plain.time
