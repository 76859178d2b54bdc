"""Attention of a layer by blocks of the sequence, for where one head of the whole row is more than the card holds.

Forward, a block of queries sees the blocks of keys up to its own, one after the other; what each gives is merged by its
log-sum-exp, in float32. Backward, a block of keys is seen by the blocks of queries from its own on, for each of which
a kernel gives its part of the gradients from the log-sum-exp over all keys. The gradients of the keys add up on the
card; those of the queries wait in an array between one block of keys and the next. A layer with a window is computed
stretch by stretch, each with the keys before it that it sees. So memory of the card does not grow with the row, and
the result is exact.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from trainer.streamed.arrays import HeadArray
from trainer.streamed.between import Arrays, Sizes
from trainer.streamed.heads import Attention
from trainer.streamed.kernels import Kernel
from trainer.streamed.row import Group, Row, head_groups
from trainer.streamed.tiles import Span
from trainer.streamed.transfers import Transfers
from trainer.streamed.windows import stretch_backward, stretch_forward, stretches


@dataclass(frozen=True)
class Pair:
    """A block of queries of some heads, and a block of keys that they see.

    Attributes:
        opens: the first pair of this block of queries; ``closes``: the last one.
    """

    group: Group
    queries: Span
    keys: Span
    opens: bool
    closes: bool

    @property
    def diagonal(self) -> bool:
        """A block sees itself causally, and all of an earlier one."""
        return self.queries == self.keys


@dataclass(frozen=True)
class Stretch:
    """Queries of some heads in a layer with a window, and the keys that they see: their own, and those just before."""

    group: Group
    queries: Span
    keys: Span


def blocks_of(document: Span, block: int) -> list[Span]:
    """Cut a document into blocks of so many tokens; the last is as short as it has to be."""
    start, stop = document
    return [(begin, min(begin + block, stop)) for begin in range(start, stop, block)]


@dataclass
class Merged:
    """Outputs over one block of keys after the other, as one over all of them, in float32 at least."""

    total: Tensor | None = None
    sums: Tensor = field(default_factory=lambda: torch.empty(0))

    def add(self, output: Tensor, sums: Tensor) -> None:
        """``[1, G, b, E]`` and its log-sum-exp ``[1, G, b]``."""
        if self.total is None:
            self.total, self.sums = output.to(torch.promote_types(output.dtype, torch.float32)), sums
            return
        both = torch.logaddexp(self.sums, sums)
        self.total.mul_(torch.exp(self.sums - both).unsqueeze(-1))
        self.total.addcmul_(output, torch.exp(sums - both).unsqueeze(-1))
        self.sums = both


class ByBlocks(Attention):
    """No more of a head on the card than a few blocks of it."""

    def __init__(self, kernel: Kernel, transfers: Transfers, arrays: Arrays, sizes: Sizes) -> None:
        assert sizes.block and arrays.query_gradient is not None
        self.kernel, self.transfers, self.arrays, self.block = kernel, transfers, arrays, sizes.block
        self.dtype = sizes.dtype
        self.wide = torch.promote_types(sizes.dtype, torch.float32)
        self.groups = head_groups(sizes.heads, sizes.key_heads, sizes.group)
        self._waiting: HeadArray = arrays.query_gradient

    def forward(self, row: Row, place: int, window: int | None, scale: float) -> None:
        """See `Attention`."""
        attended, sums = self.arrays.attended[place], self.arrays.log_sum_exp[place]
        near, far = _by_window(row.documents, window)
        self._pairs_forward(near, attended, sums, scale)
        if far:
            self._stretches_forward(far, attended, sums, window or 0, scale)

    def backward(self, row: Row, place: int, window: int | None, scale: float) -> None:
        """See `Attention`."""
        attended, sums = self.arrays.attended[place], self.arrays.log_sum_exp[place]
        near, far = _by_window(row.documents, window)
        for shared in _sharing(self.groups):
            for document in near:
                self._pairs_backward(shared, document, attended, sums, scale)
        if far:
            self._stretches_backward(far, attended, sums, window or 0, scale)

    def _pairs_forward(self, documents: Sequence[Span], attended: HeadArray, sums: HeadArray, scale: float) -> None:
        merged, query = Merged(), torch.empty(0)

        def load(pair: Pair) -> tuple[Tensor, ...]:
            keys = (self._keys_of(array, pair.group, pair.keys) for array in (self.arrays.key, self.arrays.value))
            mine = (self._queries_of(self.arrays.query, pair.group, pair.queries),) if pair.opens else ()
            return (*keys, *mine)

        def work(pair: Pair, loaded: tuple[Tensor, ...]) -> None:
            nonlocal merged, query
            key, value, *mine = loaded
            if pair.opens:
                merged, query = Merged(), mine[0]
            merged.add(*self.kernel.forward(query[None], key[None], value[None], pair.diagonal, scale))
            if pair.closes:
                assert merged.total is not None
                self._put(attended, pair.group, pair.queries, merged.total[0].to(self.dtype))
                self._put(sums, pair.group, pair.queries, merged.sums[0].unsqueeze(-1))
                merged, query = Merged(), torch.empty(0)  # not beside what comes next

        self.transfers.run(self._pairs(documents), load, work)

    def _pairs(self, documents: Sequence[Span]) -> Iterator[Pair]:
        for group in self.groups:
            for document in documents:
                blocks = blocks_of(document, self.block)
                for last, queries in enumerate(blocks):
                    for index, keys in enumerate(blocks[: last + 1]):
                        yield Pair(group, queries, keys, index == 0, index == last)

    def _pairs_backward(
        self, shared: Sequence[Group], document: Span, attended: HeadArray, sums: HeadArray, scale: float
    ) -> None:
        """Of the groups that read the same key heads, within one document: one block of keys after the other.

        A call of `Transfers.run` for each, before which the queries' gradients of the one before have arrived.
        """
        blocks = blocks_of(document, self.block)
        for index, keys in enumerate(blocks):
            gradients = self._pair_gradients(shared, blocks[index:], keys, index == 0, attended, sums, scale)
            self._put_keys(self.arrays.value, shared[0], keys, gradients.pop().to(self.dtype))
            self._put_keys(self.arrays.key, shared[0], keys, gradients.pop().to(self.dtype))

    def _pair_gradients(
        self,
        shared: Sequence[Group],
        queries: Sequence[Span],
        keys: Span,
        opens: bool,
        attended: HeadArray,
        sums: HeadArray,
        scale: float,
    ) -> list[Tensor]:
        """Gradients of a block of keys and values, in float32; those of the queries' part wait, or are whole."""
        base = shared[0].first
        held: list[Tensor] = []
        gradients: list[Tensor] = []

        def load(pair: Pair) -> tuple[Tensor, ...]:
            arrays = (self.arrays.query, self.arrays.attended_gradient, attended, sums)
            mine = [self._queries_of(array, pair.group, pair.queries) for array in arrays]
            if not pair.opens:
                first, last = pair.group.first - base, pair.group.last - base
                mine.append(self.transfers.gather(self._waiting, first, last, *pair.queries))
            if not held:
                held.extend(self._keys_of(array, shared[0], keys) for array in (self.arrays.key, self.arrays.value))
            return tuple(mine)

        def work(pair: Pair, loaded: tuple[Tensor, ...]) -> None:
            query, gradient, output, log_sum_exp, *before = (each[None] for each in loaded)
            key, value = (each[None] for each in held)
            made = self.kernel.backward(
                gradient, query, key, value, output, log_sum_exp.squeeze(-1), pair.diagonal, scale
            )
            dq = made[0]
            if before:
                dq = before[0].add_(dq)
            if pair.closes:
                self._put(self.arrays.query, pair.group, pair.queries, dq[0].to(self.dtype))
            else:
                first, last = pair.group.first - base, pair.group.last - base
                self.transfers.scatter(dq[0].to(self.wide), self._waiting, first, last, *pair.queries)
            if not gradients:
                gradients.extend(each[0].to(self.wide) for each in made[1:])
            else:
                for whole, part in zip(gradients, made[1:], strict=True):
                    whole += part[0]

        # A block of keys comes last to the queries of its own, whose gradient is whole then.
        pairs = (Pair(group, span, keys, opens, span == keys) for group in shared for span in queries)
        self.transfers.run(pairs, load, work)
        return gradients

    def _stretches_forward(
        self, documents: Sequence[Span], attended: HeadArray, sums: HeadArray, window: int, scale: float
    ) -> None:
        def load(stretch: Stretch) -> tuple[Tensor, ...]:
            return self._inputs_of(stretch)

        def work(stretch: Stretch, loaded: tuple[Tensor, ...]) -> None:
            query, key, value = (each[None] for each in loaded)
            output, log_sum_exp = stretch_forward(self.kernel, query, key, value, window, scale)
            self._put(attended, stretch.group, stretch.queries, output[0])
            self._put(sums, stretch.group, stretch.queries, log_sum_exp[0].unsqueeze(-1))

        self.transfers.run(
            (
                Stretch(group, queries, keys)
                for group in self.groups
                for document in documents
                for queries, keys in stretches_of(document, window)
            ),
            load,
            work,
        )

    def _stretches_backward(
        self, documents: Sequence[Span], attended: HeadArray, sums: HeadArray, window: int, scale: float
    ) -> None:
        """The last stretch first: what it gives to the keys before it is handed to the stretch that these belong to.

        Gradients overwrite query, key and value of their own stretch, which no earlier stretch reads.
        """
        gradients: list[Tensor] = []  # of the keys of a stretch and of those before it, from all groups so far
        handed: list[Tensor] = []  # to the keys at the end of the next stretch

        def load(stretch: Stretch) -> tuple[Tensor, ...]:
            arrays = (self.arrays.attended_gradient, attended, sums)
            return (
                *self._inputs_of(stretch),
                *(self._queries_of(each, stretch.group, stretch.queries) for each in arrays),
            )

        def work(stretch: Stretch, loaded: tuple[Tensor, ...]) -> None:
            query, key, value, gradient, output, log_sum_exp = (each[None] for each in loaded)
            rows = [gradient, query, output, log_sum_exp.squeeze(-1)]
            made = stretch_backward(self.kernel, rows, key, value, window, scale)
            group, before = stretch.group, stretch.queries[0] - stretch.keys[0]
            self._put(self.arrays.query, group, stretch.queries, made[0][0])
            if group.opens:
                gradients[:] = [each[0].to(self.wide) for each in made[1:]]
            else:
                for whole, part in zip(gradients, made[1:], strict=True):
                    whole += part[0]
            if not group.closes:
                return
            for whole, part in zip(gradients, handed, strict=False):
                whole[:, whole.shape[1] - part.shape[1] :] += part
            handed[:] = [whole[:, :before].clone() for whole in gradients] if before else []
            for array, whole in zip((self.arrays.key, self.arrays.value), gradients, strict=True):
                self._put_keys(array, group, stretch.queries, whole[:, before:].to(self.dtype))
            gradients.clear()

        self.transfers.run(
            (
                Stretch(group, queries, keys)
                for shared in _sharing(self.groups)
                for document in documents
                for queries, keys in reversed(stretches_of(document, window))
                for group in shared
            ),
            load,
            work,
        )

    def _inputs_of(self, stretch: Stretch) -> tuple[Tensor, Tensor, Tensor]:
        return (
            self._queries_of(self.arrays.query, stretch.group, stretch.queries),
            self._keys_of(self.arrays.key, stretch.group, stretch.keys),
            self._keys_of(self.arrays.value, stretch.group, stretch.keys),
        )

    def _queries_of(self, array: HeadArray, group: Group, span: Span) -> Tensor:
        return self.transfers.gather(array, group.first, group.last, *span)

    def _keys_of(self, array: HeadArray, group: Group, span: Span) -> Tensor:
        return self.transfers.gather(array, group.key_first, group.key_last, *span)

    def _put(self, array: HeadArray, group: Group, span: Span, value: Tensor) -> None:
        self.transfers.scatter(value, array, group.first, group.last, *span)

    def _put_keys(self, array: HeadArray, group: Group, span: Span, value: Tensor) -> None:
        self.transfers.scatter(value, array, group.key_first, group.key_last, *span)


def stretches_of(document: Span, window: int) -> list[tuple[Span, Span]]:
    """Queries of each stretch of a document, and the keys that they see."""
    start, stop = document
    return [
        ((start + begin, start + end), (start + before, start + end))
        for begin, end, before in stretches(stop - start, window)
    ]


def _by_window(documents: Sequence[Span], window: int | None) -> tuple[list[Span], list[Span]]:
    """Documents whose tokens all see each other, and those that are longer than the window."""
    longer = [window is not None and stop - start > window for start, stop in documents]
    return (
        [document for document, far in zip(documents, longer, strict=True) if not far],
        [document for document, far in zip(documents, longer, strict=True) if far],
    )


def _sharing(groups: Sequence[Group]) -> list[list[Group]]:
    """Groups that read the same key heads, together."""
    found: list[list[Group]] = []
    for group in groups:
        if group.opens:
            found.append([])
        found[-1].append(group)
    return found
