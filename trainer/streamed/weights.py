"""Weights of the layers in host memory, brought to the card one layer ahead of the computation.

A layer's matrices, and the constants of those in four bits, lie behind each other in one array of bytes in host memory,
every layer in the same order. The card has room for two layers: one that computes, and the one that comes next. Norms,
biases and adapters are small and stay on the card, and so do the embedding and the output head.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Hashable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from planner.errors import PlanError
from trainer.four_bit import Place, constants_of
from trainer.host_memory import Arena

PIECE = 1 << 23
"""Bytes of one copy. What an item fetches waits for no more of them than went behind the fetches before it."""


class Weights:
    """The layers' weights as they are: all on the card.

    Attributes:
        host: the host memory that holds them, if any.
    """

    host: Arena | None = None

    def ready(self) -> None:
        """The model is loaded."""

    def follow(self, order: Sequence[int]) -> None:
        """The layers are entered in this order from here on."""

    def enter(self, index: int, kind: Hashable = None) -> None:
        """A layer is computed from here on, until the next one is entered.

        Args:
            kind: visits of one layer and one kind have as many items each, or nearly.
        """

    def fetched(self, arrived: Any) -> None:
        """An item of the layer that is computed will have what it needs on the card by this event; None: on a CPU."""

    def need(self, parameter: Tensor) -> None:
        """A frozen parameter is read from here on, until another layer's is."""


@dataclass(frozen=True)
class _Piece:
    """Where a tensor lies among the bytes of a layer."""

    start: int
    dtype: torch.dtype
    shape: torch.Size

    def of(self, layer: Tensor) -> Tensor:
        """The tensor in a layer's bytes, in place."""
        stop = self.start + math.prod(self.shape) * self.dtype.itemsize
        return layer[self.start : stop].view(self.dtype).view(self.shape)


class StreamedWeights(Weights):
    """Weights that `put_away` took off the card.

    Args:
        device: where layers are computed.

    Attributes:
        copied: layers brought to the card so far.
    """

    def __init__(self, device: torch.device) -> None:
        self.host: Arena = Arena(torch.device("cpu"), away=True, pinned=device.type == "cuda")
        self._device = device
        self._layers: list[tuple[list[Place], Tensor]] = []
        self._layer_of: dict[int, int] = {}  # by the identity of a parameter
        self._layout: list[_Piece] = []
        self._slots: list[Tensor] = []
        self._views: list[list[Tensor]] = []
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._held: list[int | None] = []  # which layer is in each slot, or on its way there
        self._arrived: list[Any] = []
        self._coming: deque[int] = deque()
        self._pending: deque[tuple[Tensor, Tensor]] = deque()  # pieces of the next layer: where to, and from where
        self._pieces, self._to = 0, 0  # how many these were, and their slot
        self._visit: tuple[int, Hashable] = (-1, None)  # the layer that is computed, and the kind of visit
        self._items = 0  # of this visit so far
        self._usual: dict[tuple[int, Hashable], int] = {}  # items that there were by the end of the last such visit
        self._now = -1  # slot of the layer that is computed
        self.copied = 0

    def put_away(self, layer: nn.Module) -> None:
        """Copy a layer's matrices to host memory and let go of them; layers come in the order in which they run.

        Raises:
            PlanError: the layer has other matrices than the first, or the host has not the memory.
        """
        # Every tensor begins at a multiple of the largest power of two in its size, and nothing lies between two.
        places = sorted(_places(layer), key=lambda place: -_power_of_two(getattr(*place)))
        layout, size = [], 0
        for owner, name in places:
            tensor = getattr(owner, name)
            layout.append(_Piece(size, tensor.dtype, tensor.shape))
            size += tensor.nbytes
        self._layout = self._layout or layout
        if layout != self._layout:
            why = f"layer {len(self._layers)} has matrices of other shapes than the first, so they cannot share memory."
            raise PlanError(f"streaming the weights of {type(layer).__name__}", why, "Plan without streamed weights.")
        away = self.host.take(size, torch.uint8)
        for (owner, name), piece in zip(places, layout, strict=True):
            piece.of(away).copy_(getattr(owner, name))
            setattr(owner, name, torch.empty(0, dtype=piece.dtype, device=self._device))
            self._layer_of[id(owner)] = len(self._layers)
        self._layers.append((places, away))

    def ready(self) -> None:
        """See `Weights`. Makes room on the card; tensors have their shapes from here on."""
        for index in range(min(2, len(self._layers))):
            self._slots.append(torch.empty(len(self._layers[0][1]), dtype=torch.uint8, device=self._device))
            self._views.append([piece.of(self._slots[index]) for piece in self._layout])
        self._held, self._arrived = [None] * len(self._slots), [None] * len(self._slots)
        for index in range(len(self._layers)):
            self._bind(index, index % len(self._slots))

    def follow(self, order: Sequence[int]) -> None:
        """See `Weights`; the first of them is on its way already when this returns."""
        self._coming = deque(order)
        if self._coming:
            self._bring(self._coming[0])
            self._begin(len(self._pending))

    def enter(self, index: int, kind: Hashable = None) -> None:
        """See `Weights`; what has not begun yet of the layer begins now."""
        expected = self._coming.popleft()
        assert expected == index, f"layer {index} is entered, and {expected} was to come"
        self._use(index)
        if self._coming:
            self._bring(self._coming[0])
        self._usual[self._visit] = self._items
        self._visit, self._items = (index, kind), 0

    def fetched(self, arrived: Any) -> None:
        """See `Weights`; the next layer comes in equal parts, each behind what an item fetches.

        On the first visit of a kind it comes behind the first item, since nobody knows how many there are.
        """
        self._items += 1
        if self._pending:
            if self._stream is not None:
                self._stream.wait_event(arrived)
            expected = max(self._items, self._usual.get(self._visit, 0))
            due = -(-self._pieces * self._items // expected)
            self._begin(due - self._pieces + len(self._pending))

    def need(self, parameter: Tensor) -> None:
        """See `Weights`."""
        if id(parameter) in self._layer_of:
            self._use(self._layer_of[id(parameter)])

    def _use(self, index: int) -> None:
        """A layer is on the card for whatever follows, and its tensors are where it is."""
        slot = self._bring(index)
        self._begin(len(self._pending))
        if self._arrived[slot] is not None:
            torch.cuda.current_stream(self._device).wait_event(self._arrived[slot])
        self._bind(index, slot)
        self._now = slot

    def _bring(self, index: int) -> int:
        """A layer is to come to the slot that is not computed in, unless it is on the card; returns its slot."""
        if index in self._held:
            return self._held.index(index)
        slot = (self._now + 1) % len(self._slots)
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
        self._pending = deque(zip(self._slots[slot].split(PIECE), self._layers[index][1].split(PIECE), strict=True))
        self._pieces, self._to = len(self._pending), slot
        self._held[slot] = index
        self.copied += 1
        return slot

    def _begin(self, count: int) -> None:
        """Begin to copy so many pieces of what is to come."""
        if not count:
            return
        with torch.cuda.stream(self._stream) if self._stream is not None else nullcontext():
            for _ in range(count):
                there, here = self._pending.popleft()
                there.copy_(here, non_blocking=True)
        if not self._pending:
            self._arrived[self._to] = self._stream and self._stream.record_event()

    def _bind(self, index: int, slot: int) -> None:
        for (owner, name), view in zip(self._layers[index][0], self._views[slot], strict=True):
            setattr(owner, name, view)


def _places(layer: nn.Module) -> list[Place]:
    """What of a layer goes to the host: its matrices, and the constants of those in four bits."""
    matrices = [parameter for parameter in layer.parameters() if parameter.dim() > 1]
    return [place for matrix in matrices for place in ((matrix, "data"), *constants_of(matrix))]


def _power_of_two(tensor: Tensor) -> int:
    """The largest power of two in a tensor's bytes."""
    return tensor.nbytes & -tensor.nbytes
