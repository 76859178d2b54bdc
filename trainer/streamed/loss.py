"""The loss of a batch by the streamed executor, with a backward pass of its own behind it.

To whoever trains it is a loss like any other: a scalar that knows how to go backward. Behind it the row goes layer by
layer through host memory, and so does its gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from planner.ledger import Phase
from trainer.data import Batch
from trainer.step import Head, Mark
from trainer.streamed.arrays import TokenArray
from trainer.streamed.checkpoints import backward_order
from trainer.streamed.layer import Layers
from trainer.streamed.row import Row, overlap
from trainer.streamed.tiles import Span

Direction = Literal["forward", "backward", "evaluate"]
Tell = Callable[[Direction, int, int], None]
"""Told of each layer: the direction (``evaluate``: forward, and never back), how many are done, how many there are.

It hears of 0 layers where a direction begins.
"""


def tell_nobody(direction: Direction, done: int, count: int) -> None:
    """Nobody listens."""


AfterLayer = Callable[[int], None]
"""Told of each layer whose backward pass is done, by its number from 0: the stream is the gradient of its input."""


def after_layer_nothing(layer: int) -> None:
    """Nothing is to be done."""


@dataclass(frozen=True)
class Halfway:
    """A backward pass that was broken off between two layers.

    Attributes:
        layer: the next one to go back through.
        loss: what the forward pass gave.
        fill: puts the gradient of what that layer gives into the stream.
    """

    layer: int
    loss: Tensor
    fill: Callable[[TokenArray], None]


class _Whole(torch.autograd.Function):
    """A scalar whose backward pass is a function's."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, backward: Callable[[Tensor], None], anchor: Tensor) -> Tensor:
        ctx.run = backward
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, None, None]:
        ctx.run(gradients[0])
        return None, None, None


class StreamedLoss:
    """A `trainer.step.Loss`: a batch, the divisor and a mark to the loss.

    Args:
        rows: rows of logits computed at a time.
        scaled: a loss scale is there to be lowered where gradients overflow.
        tell: hears of every layer that is done.

    Attributes:
        after_layer: is called between two layers of the backward pass.
    """

    def __init__(
        self, layers: Layers, head: Head, rows: int, *, scaled: bool = False, tell: Tell = tell_nobody
    ) -> None:
        self.layers, self.head, self.rows, self.scaled, self.tell = layers, head, rows, scaled, tell
        self.after_layer: AfterLayer = after_layer_nothing
        self._halfway: Halfway | None = None
        self._anchor = torch.empty(0, requires_grad=True)

    @contextmanager
    def first_layers(self, count: int) -> Iterator[None]:
        """Meanwhile the model has its first layers alone: each takes what every layer takes, in less time."""
        whole, self.layers.count = self.layers.count, min(count, self.layers.count)
        try:
            yield
        finally:
            self.layers.count = whole

    def go_on(self, halfway: Halfway) -> None:
        """The next batch is one whose backward pass was broken off, and goes on from there."""
        self._halfway = halfway

    def __call__(self, batch: Batch, divisor: Tensor, mark: Mark) -> Tensor:
        """Forward through all layers, and the loss; the gradient of the last layer's output is ready then.

        Where a backward pass goes on, forward through the layers below the one it goes on with.

        Raises:
            PlanError: what a layer gives is not finite; its backward pass raises it of gradients.
        """
        layers, count = self.layers, self.layers.count
        halfway, self._halfway = self._halfway, None
        backward = torch.is_grad_enabled()
        layers.begin(Row.of(batch, layers.sizes.chunk), keep=backward)
        layers.phases(mark, Phase.FORWARD if backward else Phase.EVALUATE, Phase.ATTENTION)
        self._forward(count if halfway is None else halfway.layer, "forward" if backward else "evaluate")
        if halfway is not None:
            return self._going_on(halfway, mark)
        mark(Phase.LOSS if backward else Phase.EVALUATE_LOSS)
        total = self._loss(backward)
        layers.finite.check_outputs(layers.row)
        if not backward:
            layers.end()
            return total / divisor

        def go_back(gradient: Tensor) -> None:
            # What is kept is the gradient of the summed loss; loss scale and divisor come in here, in a wide type.
            self._backward(mark, count - 1, gradient.to(total.dtype) / divisor.to(total.dtype))

        return _Whole.apply(total / divisor, go_back, self._anchor)

    def _forward(self, upto: int, direction: Direction) -> None:
        """The inputs of all layers up to this one; where it is past the last layer, what that gives is the stream."""
        layers, count = self.layers, self.layers.count
        layers.weights.follow(range(upto))
        self.tell(direction, 0, count)
        with torch.no_grad():
            layers.embed()
            for index in range(upto):
                layers.forward(index, again=False)
                self.tell(direction, index + 1, count)

    def _going_on(self, halfway: Halfway, mark: Mark) -> Tensor:
        layers = self.layers
        if layers.keep_outputs:  # which the backward pass takes from the forward pass
            layers.weights.follow([halfway.layer])
            layers.weights.enter(halfway.layer)
            layers.project(halfway.layer, again=False)
            layers.attend(halfway.layer)
        layers.finite.check_outputs(layers.row)
        halfway.fill(layers.arrays.stream)

        def go_back(_: Tensor) -> None:
            self._backward(mark, halfway.layer, None)  # loss scale and divisor are in the stream already

        return _Whole.apply(halfway.loss, go_back, self._anchor)

    def _loss(self, backward: bool) -> Tensor:
        """The summed loss; where a backward pass follows, the stream becomes its gradient."""
        layers, row = self.layers, self.layers.row
        stream, transfers = layers.arrays.stream, layers.transfers
        wide = torch.promote_types(layers.sizes.dtype, torch.float32)
        total, one = (make((), dtype=wide, device=row.tokens.device) for make in (torch.zeros, torch.ones))

        def load(chunk: Span) -> Tensor:
            return transfers.fetch(stream, *chunk)

        def work(chunk: Span, hidden: Tensor) -> None:
            gradient = torch.zeros_like(hidden) if backward else None
            for start, stop in self._slices(chunk):
                here = slice(start - chunk[0], stop - chunk[0])
                taken = hidden[here].detach().requires_grad_(backward)
                with torch.set_grad_enabled(backward):
                    loss = self.head.loss(
                        self.head.scaled(layers.split.final(taken)), row.targets[start:stop], self.rows, one
                    )
                total.add_(loss.detach())
                if gradient is not None:
                    loss.backward()
                    assert taken.grad is not None
                    gradient[here] = taken.grad
                del taken, loss  # the next slice's stand in their place, not beside them
            if gradient is not None:
                transfers.send(gradient, stream, *chunk)

        transfers.run(row.chunks, load, work)
        return total

    def _slices(self, chunk: Span) -> Iterator[Span]:
        """The trained tokens of a chunk, so many at a time that the final norm takes no more room than the logits."""
        for span in self.layers.row.trained:
            if part := overlap(span, chunk):
                for start in range(*part, self.rows):
                    yield start, min(start + self.rows, part[1])

    def _backward(self, mark: Mark, first: int, factor: Tensor | None) -> None:
        """Back from this layer to the first; ``factor``: see `Layers.backward`."""
        layers, count = self.layers, self.layers.count
        layers.phases(mark, Phase.BACKWARD, Phase.ATTENTION_BACKWARD)
        # Run forward once more, a layer gives the next one's input; above the layer that comes first nobody needs it.
        order = [visit for visit in backward_order(count, layers.checkpoints.spacing) if sum(visit) <= first]
        layers.weights.follow([index for index, _ in order])
        self.tell("backward", 0, count)
        for index, again in order:
            if again:
                layers.forward(index, again=True)
                continue
            layers.backward(index, factor if index == first else None)
            self.tell("backward", count - index, count)
            self.after_layer(index)
        layers.end()
        if not self.scaled:
            layers.finite.check_gradients(layers.row)
