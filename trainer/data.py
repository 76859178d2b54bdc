"""Training data: documents, split by document into training and validation, cut into rows of tokens.

A row of n inputs has n targets, each input's next token. Rows of one document follow each other without a
gap: the last target of one is the first input of the next. So every token of a document is a target once, but
for its first, and every token is an input once, but for its last. Documents are never joined.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count

import torch
from torch import Tensor

from planner.documents import Document, Reading, validation_places
from planner.errors import PlanError

NOT_TRAINED = -100
"""The target of a position that is not trained: padding, and context before the trained tokens."""

Tokenise = Callable[[Sequence[str]], list[list[int]]]


@dataclass(frozen=True)
class Row:
    """``tokens`` is ``[n + 1]``: n inputs and their next tokens; the last ``trained`` targets are trained."""

    tokens: Tensor
    trained: int

    @property
    def inputs(self) -> int:
        """How many tokens the model reads."""
        return len(self.tokens) - 1


@dataclass(frozen=True)
class Rows:
    """The rows of some documents, and what became of their tokens.

    Attributes:
        documents: documents that gave at least one row.
        tokens: tokens of all documents.
        lost: tokens that are no target of any row: the first of each document.
        trained: targets that are trained.
    """

    rows: tuple[Row, ...]
    documents: int
    tokens: int
    lost: int
    trained: int

    @property
    def longest(self) -> int:
        """Inputs of the longest row; 0 without rows."""
        return max((row.inputs for row in self.rows), default=0)

    @property
    def largest_token(self) -> int:
        """The largest token id; -1 without rows."""
        return max((int(row.tokens.max()) for row in self.rows), default=-1)


@dataclass(frozen=True)
class Data:
    """Everything a run reads: rows to train on, rows to judge by, and what was left out with the reason."""

    train: Rows
    validation: Rows
    reading: Reading


@dataclass(frozen=True)
class Batch:
    """Rows padded on the right to the longest of them.

    Attributes:
        inputs: ``[B, S]`` token ids.
        targets: ``[B, S]``, ``NOT_TRAINED`` where nothing is trained.
        spans: trained positions as half-open ranges of the flattened rows, in order, none touching the next.
        tokens: inputs that are no padding.
        trained: trained targets.
        lengths: inputs of each row without its padding.
    """

    inputs: Tensor
    targets: Tensor
    spans: tuple[tuple[int, int], ...]
    tokens: int
    trained: int
    lengths: tuple[int, ...]

    def to(self, device: torch.device) -> Batch:
        """The same batch on a device."""
        return replace(self, inputs=self.inputs.to(device), targets=self.targets.to(device))


def split_documents(documents: Sequence[Document], fraction: float, seed: int) -> tuple[list[Document], list[Document]]:
    """Deal documents into training and validation, whole and by chance, each in the order they came.

    Args:
        fraction: the share of documents for validation; 0 takes none, anything more at least one.

    Raises:
        PlanError: there are too few documents to have both.
    """
    chosen = validation_places(len(documents), fraction, seed)
    train = [document for index, document in enumerate(documents) if index not in chosen]
    return train, [documents[index] for index in sorted(chosen)]


def cut(tokens: Tensor, length: int, target: int | None) -> list[Row]:
    """Cut one document's tokens ``[N]`` into rows of at most ``length`` inputs.

    Args:
        target: train the last so many targets of a row; None trains every one.
    """
    rows = []
    for start in range(0, len(tokens) - 1, length):
        piece = tokens[start : start + length + 1]
        inputs = len(piece) - 1
        rows.append(Row(piece, inputs if target is None else min(inputs, target)))
    return rows


def tokenise_and_cut(documents: Sequence[Document], tokenise: Tokenise, length: int, target: int | None) -> Rows:
    """Tokenise documents and cut each into rows."""
    rows: list[Row] = []
    with_rows = tokens = lost = 0
    for start in range(0, len(documents), 64):  # bounds the Python integers that are alive at once
        for ids in tokenise([document.text for document in documents[start : start + 64]]):
            pieces = cut(torch.tensor(ids, dtype=torch.int32), length, target)
            rows += pieces
            with_rows += bool(pieces)
            tokens += len(ids)
            lost += min(1, len(ids))
    return Rows(tuple(rows), with_rows, tokens, lost, sum(row.trained for row in rows))


def prepare(
    reading: Reading, tokenise: Tokenise, *, length: int, target: int | None, validation: float, seed: int
) -> Data:
    """Split, tokenise and cut what was read.

    Args:
        tokenise: texts to token ids, nothing added.
        length: inputs of a row at most.
        target: see `cut`.
        validation: the share of documents to judge by.

    Raises:
        PlanError: there is too little of it.
    """
    parts = split_documents(reading.documents, validation, seed)
    train, judged = (tokenise_and_cut(part, tokenise, length, target) for part in parts)
    for purpose, rows, wanted in (("train on", train, True), ("judge by", judged, validation > 0)):
        if wanted and not rows.rows:
            raise PlanError("the data", f"leaves nothing to {purpose}: no document has two tokens or more.")
    return Data(train, judged, reading)


def collate(rows: Sequence[Row]) -> Batch:
    """Put rows into one batch, padded on the right; a padded position is seen by no real one."""
    width = max(row.inputs for row in rows)
    inputs = torch.zeros(len(rows), width, dtype=torch.int64)
    targets = torch.full((len(rows), width), NOT_TRAINED, dtype=torch.int64)
    spans: list[tuple[int, int]] = []
    for index, row in enumerate(rows):
        first = row.inputs - row.trained
        inputs[index, : row.inputs] = row.tokens[:-1]
        targets[index, first : row.inputs] = row.tokens[first + 1 :]
        start, stop = index * width + first, index * width + row.inputs
        if spans and spans[-1][1] == start:
            start = spans.pop()[0]
        spans.append((start, stop))
    trained = sum(row.trained for row in rows)
    lengths = tuple(row.inputs for row in rows)
    return Batch(inputs, targets, tuple(spans), sum(lengths), trained, lengths)


def epochs(rows: Sequence[Row], size: int, seed: int) -> Iterator[Batch]:
    """Batches of ``size`` rows without end: every epoch has each row once, in an order of its own.

    The last batch of an epoch holds what is left.
    """
    for epoch in count():
        order = list(rows)
        random.Random(f"{seed}/{epoch}").shuffle(order)
        for start in range(0, len(order), size):
            yield collate(order[start : start + size])


def evaluation_batches(rows: Rows, most: int, size: int, seed: int) -> list[Batch]:
    """The same rows for every evaluation of a run: ``most`` of them at most, chosen by chance."""
    chosen = sorted(random.Random(seed).sample(range(len(rows.rows)), min(most, len(rows.rows))))
    picked = [rows.rows[index] for index in chosen]
    return [collate(picked[start : start + size]) for start in range(0, len(picked), size)]


def synthetic_batch(size: int, length: int, target: int, vocab: int, seed: int) -> Batch:
    """The largest batch of a plan, random tokens: ``size`` rows of ``length`` inputs, ``target`` trained."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(vocab, (size, length + 1), generator=generator)
    return collate([Row(row, target) for row in tokens])
