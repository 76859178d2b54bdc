"""One layer over a whole row, in three passes each way: before attention, attention, after attention.

Before and after go by chunks of tokens, attention by groups of heads. What lies between the passes is in arrays as long
as the row: query, key and value, which their gradients overwrite, the attended values and their gradient, the
log-sum-exp, and the stream, which is the gradient of what a layer gave, overwritten by that of what it took.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from trainer.step import Mark, nothing
from trainer.streamed.arrays import HeadArray
from trainer.streamed.between import Arrays, Sizes
from trainer.streamed.checkpoints import Checkpoints
from trainer.streamed.finite import Finite
from trainer.streamed.heads import Attention
from trainer.streamed.row import Row
from trainer.streamed.split import Split
from trainer.streamed.tiles import Span
from trainer.streamed.transfers import Transfers
from trainer.streamed.weights import Weights


class Layers:
    """Runs layers forward and backward over the row that `begin` was told of.

    Args:
        split: the decoder; ``attention``: its passes; ``checkpoints``: inputs of the layers.
        keep_outputs: attended values of every layer are kept, so that the backward pass need not compute them again.
        weights: told which layers come, and of each when it begins.

    Attributes:
        count: layers that there are; fewer, where only the first are run.
    """

    def __init__(
        self,
        split: Split,
        attention: Attention,
        transfers: Transfers,
        arrays: Arrays,
        checkpoints: Checkpoints,
        sizes: Sizes,
        *,
        keep_outputs: bool,
        weights: Weights | None = None,
    ) -> None:
        self.split, self.attention, self.transfers = split, attention, transfers
        self.arrays, self.checkpoints, self.sizes = arrays, checkpoints, sizes
        self.keep_outputs, self.weights = keep_outputs, weights or Weights()
        transfers.behind = self.weights.fetched
        self.count = checkpoints.layers
        chunks = -(-sizes.tokens // sizes.chunk)
        self.finite = Finite(checkpoints.layers, chunks, sizes.chunk, sizes.dtype, transfers.device)
        self._row: Row | None = None
        self._asked: dict[int, tuple[float, int | None]] = {}  # scale and window of each layer
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

    def end(self) -> None:
        """The row is done with; what was kept for its chunks goes."""
        self._tables = {}

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
        self.weights.enter(index, ("again" if again else "forward", len(self.row.chunks)))
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
        with self._heads_pass():
            self.attention.forward(self.row, self._place(index), window, scale)

    def _finish(self, index: int, *, again: bool) -> None:
        attended = self._attended(index)

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
        self.weights.enter(index, ("backward", len(self.row.chunks)))
        self.project(index, again=True)
        if not self.keep_outputs:
            self.attend(index)
        self._finish_backward(index, factor)
        self._attend_backward(index)
        self._project_backward(index)

    def _finish_backward(self, index: int, factor: Tensor | None) -> None:
        attended = self._attended(index)
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
        with self._heads_pass():
            self.attention.backward(self.row, self._place(index), window, scale)

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

    def _place(self, index: int) -> int:
        """Where a layer's attended values and their log-sum-exp are kept."""
        return index if self.keep_outputs else 0

    def _attended(self, index: int) -> HeadArray:
        return self.arrays.attended[self._place(index)]

    def _get(self, array: HeadArray, chunk: Span) -> Tensor:
        """All heads of a chunk, on the card."""
        return self.transfers.gather(array, 0, array.heads, *chunk)

    def _put(self, array: HeadArray, chunk: Span, value: Tensor) -> None:
        """Put ``[heads, C, E]`` away."""
        self.transfers.scatter(value.contiguous(), array, 0, array.heads, *chunk)
