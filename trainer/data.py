"""Training data: documents, split by document into training and validation, cut into rows of tokens.

A row of n inputs has n targets, each input's next token. Rows of one document follow each other without a
gap: the last target of one is the first input of the next. So every token of a document is a target once, but
for its first, and every token is an input once, but for its last. Documents share a row only where they are packed,
and even then none sees another.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count

import torch
from torch import Tensor

from planner.documents import AnyDocument, Reading, validation_places
from planner.errors import PlanError
from planner.packing import pack
from trainer.attention import Lengths
from trainer.token_file import TokenFile

GROUP = 64
"""Documents that are tokenised together."""
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

    @property
    def pieces(self) -> tuple[Row, ...]:
        """The row itself."""
        return (self,)


@dataclass(frozen=True)
class PackedRow:
    """Several rows in one, each seeing itself alone."""

    pieces: tuple[Row, ...]

    @property
    def inputs(self) -> int:
        """How many tokens the model reads."""
        return sum(piece.inputs for piece in self.pieces)

    @property
    def trained(self) -> int:
        """How many targets are trained."""
        return sum(piece.trained for piece in self.pieces)


AnyRow = Row | PackedRow
Cut = Callable[[int, Sequence[AnyRow]], Sequence[AnyRow]]


@dataclass(frozen=True)
class Rows:
    """The rows of some documents, and what became of their tokens.

    Attributes:
        documents: documents that gave at least one row.
        tokens: tokens of all documents.
        lost: tokens that are no target of any row: the first of each document.
        trained: targets that are trained.
    """

    rows: tuple[AnyRow, ...]
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
        return max((int(piece.tokens.max()) for row in self.rows for piece in row.pieces), default=-1)


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
        documents: where rows are packed, for each of them the inputs of its documents, padding counted as one.
        positions: ``[B, S]``, places of tokens in their documents, where rows are packed.
    """

    inputs: Tensor
    targets: Tensor
    spans: tuple[tuple[int, int], ...]
    tokens: int
    trained: int
    lengths: tuple[int, ...]
    documents: Lengths | None = None
    positions: Tensor | None = None

    def to(self, device: torch.device) -> Batch:
        """The same batch on a device."""
        positions = None if self.positions is None else self.positions.to(device)
        inputs, targets = self.inputs.to(device), self.targets.to(device)
        return replace(self, inputs=inputs, targets=targets, positions=positions)


def split_documents(
    documents: Sequence[AnyDocument], fraction: float, seed: int
) -> tuple[list[AnyDocument], list[AnyDocument]]:
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


def packed(rows: Sequence[Row], room: int, most: int) -> list[AnyRow]:
    """Rows put together (`planner.packing.pack`)."""
    together = pack([row.inputs for row in rows], room, most)
    return [rows[places[0]] if len(places) == 1 else PackedRow(tuple(rows[p] for p in places)) for places in together]


def tokenise_and_cut(
    documents: Sequence[AnyDocument],
    tokenise: Tokenise,
    length: int,
    target: int | None,
    most_documents: int = 1,
    store: TokenFile | None = None,
) -> Rows:
    """Tokenise documents, cut each into rows, and pack these where several documents may share one.

    Args:
        store: keeps the tokens away from memory.
    """
    rows: list[Row] = []
    with_rows = tokens = lost = 0
    # Groups bound the texts and the Python integers that are alive at once.
    groups = (
        tokenise([document.text for document in documents[start : start + GROUP]])
        for start in range(0, len(documents), GROUP)
    )
    of_documents = (torch.tensor(ids, dtype=torch.int32) for group in groups for ids in group)
    for ids in of_documents if store is None else store.mapped(of_documents):
        pieces = cut(ids, length, target)
        rows += pieces
        with_rows += bool(pieces)
        tokens += len(ids)
        lost += min(1, len(ids))
    trained = sum(row.trained for row in rows)
    together = rows if most_documents == 1 else packed(rows, target or length, most_documents)
    return Rows(tuple(together), with_rows, tokens, lost, trained)


def prepare(
    reading: Reading,
    tokenise: Tokenise,
    *,
    length: int,
    target: int | None,
    validation: float,
    seed: int,
    most_documents: int = 1,
    store: Callable[[], TokenFile] | None = None,
) -> Data:
    """Split, tokenise and cut what was read.

    Args:
        tokenise: texts to token ids, nothing added.
        length: inputs of a row at most.
        target: see `cut`.
        validation: the share of documents to judge by.
        most_documents: that may share one row.
        store: gives a place for the tokens of each part; without one they are in memory.

    Raises:
        PlanError: there is too little of it.
    """
    parts = split_documents(reading.documents, validation, seed)
    train, judged = (
        tokenise_and_cut(part, tokenise, length, target, most_documents, store() if store else None) for part in parts
    )
    for purpose, rows, wanted in (("train on", train, True), ("judge by", judged, validation > 0)):
        if wanted and not rows.rows:
            raise PlanError("the data", f"leaves nothing to {purpose}: no document has two tokens or more.")
    return Data(train, judged, reading)


def collate(rows: Sequence[AnyRow]) -> Batch:
    """Put rows into one batch, padded on the right; a padded position is seen by no real one."""
    width = max(row.inputs for row in rows)
    inputs = torch.zeros(len(rows), width, dtype=torch.int64)
    targets = torch.full((len(rows), width), NOT_TRAINED, dtype=torch.int64)
    spans: list[tuple[int, int]] = []
    for index, row in enumerate(rows):
        begins = 0
        for piece in row.pieces:
            first, ends = begins + piece.inputs - piece.trained, begins + piece.inputs
            inputs[index, begins:ends] = piece.tokens[:-1]
            targets[index, first:ends] = piece.tokens[piece.inputs - piece.trained + 1 :]
            start, stop = index * width + first, index * width + ends
            if spans and spans[-1][1] == start:
                start = spans.pop()[0]
            spans.append((start, stop))
            begins = ends
    lengths = tuple(row.inputs for row in rows)
    batch = Batch(inputs, targets, tuple(spans), sum(lengths), sum(row.trained for row in rows), lengths)
    return batch if all(len(row.pieces) == 1 for row in rows) else _with_documents(batch, rows)


def _with_documents(batch: Batch, rows: Sequence[AnyRow]) -> Batch:
    """The batch with what says where its documents begin."""
    width = batch.inputs.shape[1]
    lengths = []
    for row in rows:
        padding = width - row.inputs
        lengths.append((*(piece.inputs for piece in row.pieces), *([padding] if padding else [])))
    positions = torch.stack([torch.cat([torch.arange(length) for length in row]) for row in lengths])
    return replace(batch, documents=tuple(lengths), positions=positions)


def epochs(rows: Sequence[AnyRow], size: int, seed: int, cut: Cut | None = None) -> Iterator[Batch]:
    """Batches of ``size`` rows without end: every epoch has each row once, in an order of its own.

    The last batch of an epoch holds what is left.

    Args:
        cut: makes other rows of those of a batch, by its number from 0.
    """
    numbers = count()
    for epoch in count():
        order = list(rows)
        random.Random(f"{seed}/{epoch}").shuffle(order)
        for start in range(0, len(order), size):
            batch, number = order[start : start + size], next(numbers)
            yield collate(batch if cut is None else cut(number, batch))


def evaluation_batches(rows: Rows, most: int, size: int, seed: int) -> list[Batch]:
    """The same rows for every evaluation of a run: ``most`` of them at most, chosen by chance."""
    chosen = sorted(random.Random(seed).sample(range(len(rows.rows)), min(most, len(rows.rows))))
    picked = [rows.rows[index] for index in chosen]
    return [collate(picked[start : start + size]) for start in range(0, len(picked), size)]


def synthetic_batch(size: int, length: int, target: int, vocab: int, seed: int, most_documents: int = 1) -> Batch:
    """The largest batch of a plan, random tokens: ``size`` rows of ``length`` inputs, ``target`` trained.

    Where every token is trained and documents may share a row, each row has as many of them as it may.
    """
    generator = torch.Generator().manual_seed(seed)
    many = min(most_documents, length) if target == length else 1
    sizes = [length // many + (place < length % many) for place in range(many)]

    if many == 1:
        tokens = torch.randint(vocab, (size, length + 1), generator=generator)
        return collate([Row(row, target) for row in tokens])

    def pieces() -> Iterator[Row]:
        for inputs in sizes:
            yield Row(torch.randint(vocab, (inputs + 1,), generator=generator), inputs)

    return collate([PackedRow(tuple(pieces())) for _ in range(size)])
