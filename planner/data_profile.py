"""How much text there is to train on: documents, bytes and tokens, found in bounded time.

Which files count is the trainer's own rule (`planner.documents`). Up to ``READ`` bytes everything is read; of more, a
sample is, and what was not read is judged by its like. Tokens are exact where the model's tokenizer lies in its folder
and the text is short; else they are estimated from bytes, and ``basis`` says how.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from planner.calibration import Calibration
from planner.documents import JSONL, LARGEST_FILE, files_below, jsonl_documents, read_documents, text_of
from planner.errors import PlanError
from planner.plan_facts import RANDOM
from planner.units import format_bytes

READ = 32 * 2**20
"""Bytes that are read at most; less than a second."""
READ_FILES = 4_000
"""Files of a folder that are opened at most."""
TOKENISED = 2 * 2**20
"""Bytes that are cut into tokens at most: about a second."""

Tokenise = Callable[[Sequence[str]], list[int]]
"""Texts to how many tokens each of them is."""


@dataclass(frozen=True)
class DataProfile:
    """Attributes:
    sizes: UTF-8 bytes of each document, in the trainer's order.
    tokens: tokens of each document.
    exact: whether every document was read and cut into tokens.
    basis: one sentence on how tokens were counted.
    """

    sizes: tuple[int, ...]
    tokens: tuple[int, ...]
    exact: bool
    basis: str


@dataclass(frozen=True)
class _Found:
    """Bytes of every document, the texts that were read, and what to say of the rest (empty: all was read)."""

    sizes: Sequence[int]
    texts: Sequence[str]
    unread: str = ""


def profile_data(path: Path, source: str, constants: Calibration) -> DataProfile:
    """Profile a folder, a ``.jsonl`` file or a text file.

    Args:
        source: what the trainer loads the model from, as in the plan (`planner.plan.Model`).

    Raises:
        PlanError: there is no such path, a row that was read is malformed, or nothing in it is text.
    """
    found = _large_folder(path) if path.is_dir() else _large_file(path)
    if found is None:
        texts = [document.text for document in read_documents(path).documents]
        found = _Found([len(text.encode()) for text in texts], texts)
    sizes, tokenise, by = tuple(found.sizes), *_tokeniser(source)
    if tokenise is not None and not found.unread and sum(sizes) <= TOKENISED:
        return DataProfile(sizes, tuple(tokenise(found.texts)), True, f"exact: counted with {by}")
    if tokenise is None:
        constant = constants.document["bytes_per_token"]
        ratio, how = float(constant["value"]), f"{by}; {constant['basis']}: {constant['source']}"
    else:
        sample = _within(found.texts, TOKENISED)
        counted = sum(tokenise(sample))
        ratio = sum(len(text.encode()) for text in sample) / max(1, counted)
        how = f"in {counted:,} tokens counted with {by}"
    basis = f"estimated: {ratio:.3g} bytes a token ({how}){found.unread}"
    return DataProfile(sizes, tuple(max(1, round(size / ratio)) for size in sizes), False, basis)


def _within(texts: Sequence[str], most: int) -> list[str]:
    """Texts by chance, the same each time, cut where they are longer together than so many bytes; one at least."""
    chosen: list[str] = []
    for place in random.Random(0).sample(range(len(texts)), len(texts)):
        if most <= 0:
            break
        chosen.append(texts[place][:most])
        most -= len(chosen[-1].encode())
    return chosen


def _large_file(path: Path) -> _Found | None:
    """A file that is too large to read: its head stands for all of it. None where it is not."""
    size = path.stat().st_size if path.is_file() else 0
    if size <= READ:
        return None
    try:
        with path.open("rb") as file:
            head = file.read(READ)
    except OSError as error:
        raise PlanError(f"data {path}", f"cannot be read: {error.strerror}.") from error
    unread = f"; {format_bytes(size - READ)} of {format_bytes(size)} were not read and taken to be like the rest"
    if path.suffix not in JSONL:
        return _Found([size], [head[:TOKENISED].decode("utf-8", errors="ignore")], unread)
    whole = head[: head.rfind(b"\n") + 1]
    texts = [document.text for document in jsonl_documents(path, whole).documents]
    if not texts:
        raise PlanError(f"data {path}", f"holds no text in its first {format_bytes(READ)}.")
    sizes = [len(text.encode()) for text in texts]
    return _Found(list(islice(cycle(sizes), round(len(sizes) * size / len(whole)))), texts, unread)


def _large_folder(folder: Path) -> _Found | None:
    """A folder too large to read: of files by chance it is seen what is text. None where it is not too large.

    Approximate: a file that was not read is text if most of the read files of its suffix are, and one of a suffix of
    which none was read counts as text.
    """
    files = [(file, size) for file in files_below(folder) if (size := file.stat().st_size) <= LARGEST_FILE]
    total = sum(size for _, size in files)
    if total <= READ and len(files) <= READ_FILES:
        return None
    texts: dict[int, str] = {}
    kinds: dict[str, list[bool]] = defaultdict(list)
    opened: set[int] = set()
    read = 0
    for place in random.Random(0).sample(range(len(files)), min(len(files), READ_FILES)):
        file, size = files[place]
        if read + size > READ:
            break
        opened.add(place)
        reason, text = text_of(file)
        kinds[file.suffix].append(not reason)
        read += size
        if not reason:
            texts[place] = text
    if not texts:
        raise PlanError(f"data {folder}", f"holds no text in {format_bytes(read)} of files taken by chance.")
    unread = f"{len(files) - len(opened):,} of {len(files):,} files"
    rest = f"; {unread} were not read and taken to be like those of their suffix"
    sizes = [
        size
        for place, (file, size) in enumerate(files)
        if (place in texts if place in opened else size > 0 and _mostly(kinds[file.suffix]))
    ]
    return _Found(sizes, list(texts.values()), rest)


def _mostly(found: Sequence[bool]) -> bool:
    return 2 * sum(found) >= len(found)


def _tokeniser(source: str) -> tuple[Tokenise | None, str]:
    """Counts tokens as the trainer will; None where that cannot be done here, and why not."""
    bare = source.removeprefix(RANDOM)
    file = Path(bare).expanduser() / "tokenizer.json"
    if not file.is_file():
        if source.startswith(RANDOM) and not any(Path(bare).glob("tokenizer*")):
            return _bytes, "bytes for tokens, as random weights take them"
        return None, "no tokenizer.json lies in the model's folder"
    try:
        from tokenizers import Tokenizer
    except ImportError:
        return None, "the package tokenizers is not installed"
    try:
        tokenizer: Any = Tokenizer.from_file(str(file))
    except Exception as error:  # the package raises nothing more precise
        raise PlanError(f"model {bare}", f"its tokenizer.json cannot be read: {error}.") from error
    tokenizer.encode_special_tokens = True  # a text may not smuggle control tokens in: trainer.loading.tokenise_with
    tokenizer.no_truncation()
    tokenizer.no_padding()

    def count(texts: Sequence[str]) -> list[int]:
        return [len(each) for each in tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]

    return count, "the tokenizer in the model's folder"


def _bytes(texts: Sequence[str]) -> list[int]:
    return [len(text.encode()) for text in texts]
