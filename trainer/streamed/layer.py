"""One layer over a whole row, in three passes each way: before attention, attention, after attention.

Before and after go by chunks of tokens, attention by groups of heads. What lies between the passes is in arrays as long
as the row: query, key and value, which their gradients overwrite, the attended values and their gradient, the
log-sum-exp, and the stream, which is the gradient of what a layer gave, overwritten by that of what it took.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from trainer.host_memory import Arena
from trainer.step import Mark, nothing
from trainer.streamed.arrays import HeadArray, TokenArray
from trainer.streamed.checkpoints import Checkpoints
from trainer.streamed.finite import Finite
from trainer.streamed.kernels import Kernel
from trainer.streamed.row import Group, Row, head_groups
from trainer.streamed.split import Split
from trainer.streamed.tiles import Span, attend, attend_backward
from trainer.streamed.transfers import Transfers
from trainer.streamed.weights import Weights


@dataclass(frozen=True)
class Sizes:
    """What the arrays are made for.

    Attributes:
        tokens: of the longest row; ``chunk``: of a chunk.
        heads, key_heads, head_size, width: H, K, E and D.
        group: query heads of a group.
        dtype: of everything but the log-sum-exp.
    """

    tokens: int
    chunk: int
    heads: int
    key_heads: int
    head_size: int
    width: int
    group: int
    dtype: torch.dtype


class Arrays:
    """What lies between the passes of a layer; every layer uses it again.

    On the card one block holds the whole row, so that heads are views of it; in host memory a block is a chunk.
    """

    def __init__(self, arena: Arena, sizes: Sizes, *, kept_outputs: int) -> None:
        self.away = arena.away
        block = sizes.chunk if arena.away else sizes.tokens
        heads = partial(HeadArray, arena, tokens=sizes.tokens, size=sizes.head_size, block=block, dtype=sizes.dtype)
        sums = torch.promote_types(sizes.dtype, torch.float32)
        self.query, self.key, self.value = heads(sizes.heads), heads(sizes.key_heads), heads(sizes.key_heads)
        self.attended_gradient = heads(sizes.heads)
        self.attended = [heads(sizes.heads) for _ in range(max(1, kept_outputs))]
        self.log_sum_exp = [
            HeadArray(arena, sizes.heads, sizes.tokens, 1, sizes.tokens, sums) for _ in range(max(1, kept_outputs))
        ]
        self.stream = TokenArray(arena, sizes.tokens, (sizes.width,), sizes.dtype)

    def begin(self, tokens: int) -> None:
        """A row of so many tokens follows."""
        for array in (
            self.query, self.key, self.value, self.attended_gradient, *self.attended, *self.log_sum_exp
        ):  # fmt: skip
            array.begin(tokens)


class Layers:
    """Runs layers forward and backward over the row that `begin` was told of.

    Args:
        split: the decoder; ``kernel``: for attention; ``checkpoints``: inputs of the layers.
        keep_outputs: attended values of every layer are kept, so that the backward pass need not compute them again.
        weights: told which layers come, and of each when it begins.

    Attributes:
        count: layers that there are; fewer, where only the first are run.
    """

    def __init__(
        self,
        split: Split,
        kernel: Kernel,
        transfers: Transfers,
        arrays: Arrays,
        checkpoints: Checkpoints,
        sizes: Sizes,
        *,
        keep_outputs: bool,
        weights: Weights | None = None,
    ) -> None:
        self.split, self.kernel, self.transfers = split, kernel, transfers
        self.arrays, self.checkpoints, self.sizes = arrays, checkpoints, sizes
        self.keep_outputs, self.weights = keep_outputs, weights or Weights()
        self.count = checkpoints.layers
        chunks = -(-sizes.tokens // sizes.chunk)
        self.finite = Finite(checkpoints.layers, chunks, sizes.chunk, sizes.dtype, transfers.device)
        self._groups = head_groups(sizes.heads, sizes.key_heads, sizes.group)
        self._row: Row | None = None
        self._asked: dict[int, tuple[float, int | None]] = {}  # scale and window of each layer
        self._partial: list[Tensor] = []
        self._tables: dict[Span, list[dict[str, Any]]] = {}
        self._mark: Mark = nothing
        self._by_chunks = self._by_heads = ""

    def phases(self, mark: Mark, by_chunks: str, by_heads: str) -> None:
        """From now on tell ``mark`` when passes by chunks and by heads begin, under these names."""
        self._mark, self._by_chunks, self._by_heads = mark, by_chunks, by_heads
        mark(by_chunks)

    @contextmanager
    def _heads_pass(self) -> Iterator[None]:
        self.transfers.arrive()
        self._mark(self._by_heads)
        yield
        self.transfers.arrive()
        self._mark(self._by_chunks)

    @property
    def row(self) -> Row:
        """The row that is computed now."""
        assert self._row is not None, "no row was begun"
        return self._row

    def begin(self, row: Row, *, keep: bool) -> None:
        """Take up a row.

        Args:
            keep: a backward pass follows.
        """
        self._row, self._tables = row, {}
        self.arrays.begin(len(row))
        self.checkpoints.begin(len(row), keep=keep)
        self.finite.begin()

    def embed(self) -> None:
        """Input of the first layer."""
        row = self.row

        def work(chunk: Span, loaded: None) -> None:
            part = slice(*chunk)
            self._pass_on(0, chunk, self.split.embed(row.tokens[part], row.positions[part], row.longest)[0])

        self.transfers.run(row.chunks, lambda _: None, work)

    @torch.no_grad()
    def forward(self, index: int, *, again: bool) -> None:
        """From the layer's input to the next one's, or the first time from the last layer's into the stream.

        Args:
            again: in the backward pass, from the inputs that were kept. Where these are coded, the first time goes by
                the inputs as they are, which the stream hands on.
        """
        self.weights.enter(index)
        self.project(index, again=again)
        if not (again and self.keep_outputs):
            self.attend(index)
        self._finish(index, again=again)

    @torch.no_grad()
    def project(self, index: int, *, again: bool) -> None:
        """Query, key and value of a layer, from its input."""

        def load(chunk: Span) -> list[Tensor]:
            return self._fetch_input(index, chunk, again)

        def work(chunk: Span, parts: list[Tensor]) -> None:
            made = self.split.before(index, self._input(index, parts, again), self._given(index, chunk))
            self._asked[index] = (made.scale, made.window)
            for array, value in zip(self._inputs, (made.query, made.key, made.value), strict=True):
                self._put(array, chunk, value.transpose(0, 1))

        self.transfers.run(self.row.chunks, load, work)

    def _fetch_input(self, index: int, chunk: Span, again: bool) -> list[Tensor]:
        if self.checkpoints.coded and not again:
            return [self.transfers.fetch(self.arrays.stream, *chunk)]
        return self.checkpoints.fetch(self.transfers, index, *chunk)

    def _input(self, index: int, parts: list[Tensor], again: bool) -> Tensor:
        return parts[0] if self.checkpoints.coded and not again else self.checkpoints.decode(index, parts)

    def _pass_on(self, index: int, chunk: Span, hidden: Tensor, again: bool = False) -> None:
        """Put the input of a layer away; of the one that there is none of, into the stream."""
        self.finite.output(index - 1, chunk, hidden)
        last = index == self.count
        if not last:
            self.checkpoints.write(self.transfers, index, *chunk, hidden)
        if last or (self.checkpoints.coded and not again):
            self.transfers.send(hidden, self.arrays.stream, *chunk)

    @torch.no_grad()
    def attend(self, index: int) -> None:
        """Attended values of a layer and their log-sum-exp, from query, key and value."""
        scale, window = self._asked[index]
        attended, sums = self._attended(index)

        def work(group: Group, loaded: tuple[Tensor, ...]) -> None:
            output, log_sum_exp = attend(self.kernel, *loaded, self.row.documents, window, scale)
            self._put_heads(attended, group.first, group.last, output)
            self._put_heads(sums, group.first, group.last, log_sum_exp.unsqueeze(-1))

        with self._heads_pass():
            self.transfers.run(self._groups, self._heads_of, work)

    def _finish(self, index: int, *, again: bool) -> None:
        attended, _ = self._attended(index)

        def load(chunk: Span) -> tuple[list[Tensor], Tensor]:
            return self._fetch_input(index, chunk, again), self._get(attended, chunk)

        def work(chunk: Span, loaded: tuple[list[Tensor], Tensor]) -> None:
            hidden = self._input(index, loaded[0], again)
            result = self.split.after(index, hidden, loaded[1].transpose(0, 1), self._nothing)
            self._pass_on(index + 1, chunk, result, again)

        self.transfers.run(self.row.chunks, load, work)

    def backward(self, index: int, factor: Tensor | None) -> None:
        """From the gradient in the stream of what the layer gave to that of what it took; adapters add up theirs.

        The layer's input has to be there.

        Args:
            factor: what the stream is multiplied with first; None: it is the gradient already.
        """
        self.weights.enter(index)
        self.project(index, again=True)
        if not self.keep_outputs:
            self.attend(index)
        self._finish_backward(index, factor)
        self._attend_backward(index)
        self._project_backward(index)

    def _finish_backward(self, index: int, factor: Tensor | None) -> None:
        attended, _ = self._attended(index)
        stream = self.arrays.stream

        def load(chunk: Span) -> tuple[list[Tensor], Tensor, Tensor]:
            parts = self.checkpoints.fetch(self.transfers, index, *chunk)
            return parts, self._get(attended, chunk), self.transfers.fetch(stream, *chunk)

        def work(chunk: Span, loaded: tuple[list[Tensor], Tensor, Tensor]) -> None:
            parts, values, gradient = loaded
            hidden = self.checkpoints.decode(index, parts).detach().requires_grad_(index > 0)
            values = values.detach().requires_grad_()
            if factor is not None:  # in the factor's wider type, and rounded once
                gradient.copy_(gradient.to(factor.dtype) * factor)
            with torch.enable_grad():
                result = self.split.after(index, hidden, values.transpose(0, 1), self._nothing)
            torch.autograd.backward(result, gradient)
            assert values.grad is not None
            self._put(self.arrays.attended_gradient, chunk, values.grad)
            if hidden.grad is not None:
                self.transfers.send(hidden.grad, stream, *chunk)

        self.transfers.run(self.row.chunks, load, work)

    @torch.no_grad()
    def _attend_backward(self, index: int) -> None:
        scale, window = self._asked[index]
        attended, sums = self._attended(index)

        def load(group: Group) -> tuple[Tensor, ...]:
            others = (self.arrays.attended_gradient, attended, sums)
            mine = (self._get_heads(each, group.first, group.last) for each in others)
            return (*self._heads_of(group), *mine)

        def work(group: Group, loaded: tuple[Tensor, ...]) -> None:
            query, key, value, gradient, output, log_sum_exp = loaded
            made = attend_backward(
                self.kernel, gradient, query, key, value, output, log_sum_exp.squeeze(-1), self.row.documents, window,
                scale,
            )  # fmt: skip
            self._put_heads(self.arrays.query, group.first, group.last, made[0])
            for array, gradient in zip(
                (self.arrays.key, self.arrays.value), self._summed(group, made[1:]), strict=False
            ):
                self._put_heads(array, group.key_first, group.key_last, gradient)

        with self._heads_pass():
            self.transfers.run(self._groups, load, work)

    def _summed(self, group: Group, parts: tuple[Tensor, ...]) -> list[Tensor]:
        """Gradients of a key and a value head that several groups read, in float32; none before the last of them."""
        if group.opens and group.closes:
            return list(parts)
        if group.opens:
            self._partial = [part.to(torch.promote_types(part.dtype, torch.float32)) for part in parts]
            return []
        for whole, part in zip(self._partial, parts, strict=True):
            whole += part
        if not group.closes:
            return []
        done = [whole.to(part.dtype) for whole, part in zip(self._partial, parts, strict=True)]
        self._partial = []
        return done

    def _project_backward(self, index: int) -> None:
        stream = self.arrays.stream

        def load(chunk: Span) -> tuple[list[Tensor], Tensor | None, list[Tensor]]:
            parts = self.checkpoints.fetch(self.transfers, index, *chunk)
            passed = self.transfers.fetch(stream, *chunk) if index else None
            return parts, passed, [self._get(array, chunk) for array in self._inputs]

        def work(chunk: Span, loaded: tuple[list[Tensor], Tensor | None, list[Tensor]]) -> None:
            parts, passed, gradients = loaded
            hidden = self.checkpoints.decode(index, parts).detach().requires_grad_(index > 0)
            with torch.enable_grad():
                made = self.split.before(index, hidden, self._given(index, chunk))
            torch.autograd.backward(
                (made.query, made.key, made.value), tuple(each.transpose(0, 1) for each in gradients)
            )
            if passed is not None:
                assert hidden.grad is not None
                taken = hidden.grad + passed
                self.finite.gradient(index, chunk, taken)
                self.transfers.send(taken, stream, *chunk)

        self.transfers.run(self.row.chunks, load, work)

    @property
    def _inputs(self) -> tuple[HeadArray, HeadArray, HeadArray]:
        return self.arrays.query, self.arrays.key, self.arrays.value

    @property
    def _nothing(self) -> dict[str, Any]:
        """What a layer is handed beside its hidden states where its attention is stood in for."""
        return {"attention_mask": None, "position_ids": None, "past_key_values": None, "position_embeddings": None}

    def _given(self, index: int, chunk: Span) -> dict[str, Any]:
        """What a layer is handed for a chunk. Kept where the arrays are on the card; else made each time it is used."""
        known = self._tables.get(chunk)
        if known is None:
            row, part = self.row, slice(*chunk)
            known = self.split.embed(row.tokens[part], row.positions[part], row.longest)[1]
            if not self.arrays.away:
                self._tables[chunk] = known
        return known[index]

    def _attended(self, index: int) -> tuple[HeadArray, HeadArray]:
        place = index if self.keep_outputs else 0
        return self.arrays.attended[place], self.arrays.log_sum_exp[place]

    def _heads_of(self, group: Group) -> tuple[Tensor, Tensor, Tensor]:
        return (
            self._get_heads(self.arrays.query, group.first, group.last),
            self._get_heads(self.arrays.key, group.key_first, group.key_last),
            self._get_heads(self.arrays.value, group.key_first, group.key_last),
        )

    def _get_heads(self, array: HeadArray, first: int, last: int) -> Tensor:
        """Some heads of the whole row, on the card."""
        return self.transfers.gather(array, first, last, 0, len(self.row))

    def _put_heads(self, array: HeadArray, first: int, last: int, value: Tensor) -> None:
        """Put ``[heads, N, E]`` away."""
        self.transfers.scatter(value, array, first, last, 0, len(self.row))

    def _get(self, array: HeadArray, chunk: Span) -> Tensor:
        """All heads of a chunk, on the card."""
        return self.transfers.gather(array, 0, array.heads, *chunk)

    def _put(self, array: HeadArray, chunk: Span, value: Tensor) -> None:
        """Put ``[heads, C, E]`` away."""
        self.transfers.scatter(value.contiguous(), array, 0, array.heads, *chunk)
