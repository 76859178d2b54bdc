"""The tokens of one micro-batch as one row of documents, cut into chunks; and heads cut into groups.

Whether documents had a row each or shared one makes no difference here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor

from trainer.data import Batch
from trainer.streamed.tiles import Span


@dataclass(frozen=True)
class Row:
    """All documents of a batch behind each other, padding left out.

    Attributes:
        tokens, targets, positions: ``[N]``; positions begin anew with each document.
        documents: the range of each.
        trained: ranges of tokens whose targets are trained.
        chunk: tokens of a chunk.
    """

    tokens: Tensor
    targets: Tensor
    positions: Tensor
    documents: tuple[Span, ...]
    trained: tuple[Span, ...]
    chunk: int

    @staticmethod
    def of(batch: Batch, chunk: int) -> Row:
        """The batch's rows without their padding, on the batch's device."""
        lengths = batch.lengths
        device, width = batch.inputs.device, batch.inputs.shape[1]
        padded = ((index * width, *row) for index, row in enumerate(_behind_each_other(lengths)))
        pieces = [length for row in _pieces(batch) for length in row]
        trained = tuple(
            (start + part[0] - first, start + part[1] - first)
            for first, start, stop in padded
            for span in batch.spans
            if (part := overlap(span, (first, first + stop - start)))
        )
        return Row(
            tokens=torch.cat([batch.inputs[index, :length] for index, length in enumerate(lengths)]),
            targets=torch.cat([batch.targets[index, :length] for index, length in enumerate(lengths)]),
            positions=torch.cat([torch.arange(length, device=device) for length in pieces]),
            documents=tuple(_behind_each_other(pieces)),
            trained=trained,
            chunk=chunk,
        )

    def __len__(self) -> int:
        return len(self.tokens)

    @cached_property
    def chunks(self) -> list[Span]:
        """Ranges of at most ``chunk`` tokens, without regard to documents."""
        return [(start, min(start + self.chunk, len(self))) for start in range(0, len(self), self.chunk)]

    @property
    def longest(self) -> int:
        """Tokens of the longest document."""
        return max(stop - start for start, stop in self.documents)

    def document_of(self, place: int) -> int:
        """Which document a token is of."""
        return next(index for index, (_, stop) in enumerate(self.documents) if place < stop)


def _behind_each_other(lengths: Sequence[int]) -> list[Span]:
    ends = accumulate(lengths)
    return [(end - length, end) for end, length in zip(ends, lengths, strict=True)]


def _pieces(batch: Batch) -> Iterator[tuple[int, ...]]:
    """For each row the inputs of its documents, without its padding, which a packed batch counts as one at its end."""
    if batch.documents is None:
        yield from ((length,) for length in batch.lengths)
        return
    for documents, length in zip(batch.documents, batch.lengths, strict=True):
        pieces = documents if sum(documents) == length else documents[:-1]
        assert sum(pieces) == length
        yield pieces


def overlap(one: Span, other: Span) -> Span | None:
    """The tokens that two ranges share."""
    start, stop = max(one[0], other[0]), min(one[1], other[1])
    return (start, stop) if start < stop else None


@dataclass(frozen=True)
class Group:
    """Query heads ``first`` to ``last`` and the key and value heads that they read.

    Where a key head is read by more query heads than a group holds, several groups share it: ``opens`` and ``closes``
    say whether this is the first and the last of them.
    """

    first: int
    last: int
    key_first: int
    key_last: int
    opens: bool = True
    closes: bool = True


def head_groups(heads: int, key_heads: int, at_most: int) -> list[Group]:
    """Cut heads into groups of at most so many query heads; a group reads whole key heads, or a part of one."""
    shared = heads // key_heads
    if at_most >= shared:
        whole = at_most // shared
        return [
            Group(first * shared, min(first + whole, key_heads) * shared, first, min(first + whole, key_heads))
            for first in range(0, key_heads, whole)
        ]
    return [
        Group(
            key * shared + first,
            key * shared + min(first + at_most, shared),
            key,
            key + 1,
            first == 0,
            first + at_most >= shared,
        )
        for key in range(key_heads)
        for first in range(0, shared, at_most)
    ]
