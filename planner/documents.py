"""Documents from a folder of source code, a JSONL file or one text file, always in the same order."""

from __future__ import annotations

import io
import json
import os
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from planner.errors import PlanError

LARGEST_FILE = 10 * 10**6
"""Bytes of a file in a folder; a larger one is generated data far more often than source code."""

JSONL = (".jsonl", ".ndjson")


@dataclass(frozen=True)
class Document:
    """One text, and the name it is known by in messages."""

    name: str
    text: str


@dataclass(frozen=True)
class StoredDocument:
    """A text that stays where it is, and is read there each time it is asked for.

    Attributes:
        start, size: bytes of the file that hold it; a size of None is all of them.
        row: whether these are a row of a ``.jsonl`` file.
    """

    name: str
    file: Path
    start: int = 0
    size: int | None = None
    row: bool = False

    @property
    def text(self) -> str:
        """The text.

        Raises:
            PlanError: it is not there any more.
        """
        asked = f"data {self.file}" + (f", {self.name}" if self.row else "")
        try:
            with self.file.open("rb") as file:
                file.seek(self.start)
                content = file.read(-1 if self.size is None else self.size)
            return _field(json.loads(content), asked) if self.row else content.decode("utf-8")
        except (OSError, ValueError, PlanError) as error:  # what is not UTF-8, or no JSON, is a value, too
            raise PlanError(asked, "is not what it was when it was read first.", "Start the run again.") from error


AnyDocument = Document | StoredDocument


@dataclass(frozen=True)
class Reading:
    """What was read, and the names of what was left out, by reason."""

    documents: tuple[AnyDocument, ...]
    skipped: Mapping[str, tuple[str, ...]]


def read_documents(path: Path, *, keep: bool = True) -> Reading:
    """Read a folder (every text file in it), a ``.jsonl`` file (field ``text``) or one text file.

    Args:
        keep: whether texts are kept in memory; else each is looked at once, and read again where it is asked for.

    Raises:
        PlanError: there is no such path, it cannot be read, a row is malformed, or nothing in it is text.
    """
    if path.is_dir():
        reading = _folder(path, keep)
    elif not path.exists():
        raise PlanError(f"data {path}", "does not exist.", "Name a folder, a .jsonl file or a text file.")
    elif not path.is_file():  # a device or a pipe may have no end, and the trainer reads what the plan has read
        raise PlanError(f"data {path}", "is not an ordinary file.", "Name a folder, a .jsonl file or a text file.")
    else:
        try:
            if path.suffix in JSONL and not keep:
                with path.open("rb") as file:
                    reading = _rows(path, file, keep=False)
            else:
                content = path.read_bytes()
                reading = jsonl_documents(path, content) if path.suffix in JSONL else _text(path, content, keep)
        except OSError as error:
            raise PlanError(f"data {path}", f"cannot be read: {error.strerror}.") from error
    if not reading.documents:
        told = "; ".join(f"{len(names)} {reason}" for reason, names in reading.skipped.items())
        raise PlanError(f"data {path}", f"holds no text to train on{f' ({told})' if told else ''}.")
    return reading


def validation_places(count: int, fraction: float, seed: int) -> frozenset[int]:
    """Which of so many documents are kept for validation, dealt by chance; at least one, unless ``fraction`` is 0.

    Raises:
        PlanError: there are too few documents to have both kinds.
    """
    if fraction == 0:
        return frozenset()
    if count < 2:
        raise PlanError(
            f"train.validation {fraction:g}",
            f"needs two documents at least, one to train on and one to judge by; there is {count}.",
            "Split the data into several files, or judge by nothing: --set train.validation=0.",
        )
    wanted = min(max(1, round(fraction * count)), count - 1)
    return frozenset(random.Random(seed).sample(range(count), wanted))


def _folder(folder: Path, keep: bool) -> Reading:
    documents: list[AnyDocument] = []
    skipped: dict[str, list[str]] = {}
    for file in files_below(folder):
        name = file.relative_to(folder).as_posix()
        reason, text = text_of(file)
        if reason:
            skipped.setdefault(reason, []).append(name)
        else:
            documents.append(Document(name, text) if keep else StoredDocument(name, file))
    return Reading(tuple(documents), {reason: tuple(names) for reason, names in sorted(skipped.items())})


def files_below(folder: Path) -> Iterator[Path]:
    """Files below the folder that are not hidden, sorted; links are not followed, so none comes twice."""
    found = []
    for place, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(place, name) for name in files if not name.startswith(".")]
    yield from sorted((file for file in found if file.is_file() and not file.is_symlink()), key=Path.as_posix)


def text_of(file: Path) -> tuple[str, str]:
    """The reason to leave a file out (empty: none), and its text."""
    try:
        if file.stat().st_size > LARGEST_FILE:
            return f"larger than {LARGEST_FILE // 10**6} MB", ""
        content = file.read_bytes()
    except OSError as error:
        return f"unreadable ({error.strerror})", ""
    if b"\0" in content:
        return "binary", ""
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError:
        return "not UTF-8", ""
    return ("", text) if text.strip() else ("empty", "")


def _text(path: Path, content: bytes, keep: bool) -> Reading:
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        why = f"is not UTF-8 text (byte {error.start})."
        raise PlanError(f"data {path}", why, "Name a folder, a .jsonl file or a text file.") from error
    document = Document(path.name, text) if keep else StoredDocument(path.name, path)
    return Reading((document,) if text.strip() else (), {})


def jsonl_documents(path: Path, content: bytes) -> Reading:
    """The rows of a ``.jsonl`` file, or of whole lines from its head."""
    return _rows(path, io.BytesIO(content), keep=True)


def _rows(path: Path, file: BinaryIO, *, keep: bool) -> Reading:
    documents: list[AnyDocument] = []
    empty = []
    for number, (start, line) in enumerate(_lines(file), start=1):
        if not line.strip():
            continue
        asked = f"data {path}, line {number}"
        try:
            row = json.loads(line)
        except UnicodeDecodeError as error:
            raise PlanError(asked, f"is not UTF-8 text (byte {error.start}).") from error
        except json.JSONDecodeError as error:
            raise PlanError(asked, f"is not JSON: {error.msg} at column {error.colno}.") from error
        except (RecursionError, ValueError) as error:
            raise PlanError(asked, f"is not JSON that can be read: {error}.") from error
        text = _field(row, asked)
        name = f"line {number}"
        if not text.strip():
            empty.append(name)
        elif keep:
            documents.append(Document(name, text))
        else:
            documents.append(StoredDocument(name, path, start, len(line), row=True))
    return Reading(tuple(documents), {"empty": tuple(empty)} if empty else {})


def _lines(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """Lines without their ends, and where each begins; a carriage return ends one, too."""
    start = 0
    for several in file:
        for line in several.splitlines(keepends=True):
            yield start, line.rstrip(b"\r\n")
            start += len(line)


def _field(row: object, asked: str) -> str:
    if not isinstance(row, dict):
        raise PlanError(asked, f"holds {type(row).__name__}, not an object with a text field.")
    if "text" not in row:
        there = ", ".join(list(map(str, row))[:8]) or "nothing"
        raise PlanError(asked, f"has no field text; it has {there}.", 'A row is {"text": "…"}.')
    text = row["text"]
    if not isinstance(text, str):
        raise PlanError(asked, f"has a field text that is {type(text).__name__}, not a string.")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise PlanError(asked, f"has text that is no Unicode: half a surrogate pair at {error.start}.") from error
    return text
