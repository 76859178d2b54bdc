"""Layer inputs in pinned host memory between the forward and the backward pass.

On the card one layer input more than the running layer's own is alive in forward (the one being copied out),
and two in backward (the one in use and the one being copied in). Copies run on a stream of their own, beside
the computation.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from planner.errors import PlanError
from planner.units import format_bytes
from trainer.host_memory import Arena


class HostStore:
    """A `trainer.checkpointing.Store` with one exactly sized host buffer per layer, used again by every step.

    On the CPU (tests) nothing is pinned and copies are plain.

    Args:
        layers: layer inputs held at once.
        shape: the largest layer input, ``[B, S, D]``.
        dtype: its elements.
        device: where the layers run.

    Raises:
        PlanError: the host cannot give or pin that much memory.
    """

    def __init__(self, layers: int, shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> None:
        self._device, self._dtype = device, dtype
        self._size = math.prod(shape) * dtype.itemsize
        self.arena = Arena(torch.device("cpu"), away=True, pinned=device.type == "cuda")
        self._buffers: list[Tensor] = []
        self._depth = 0
        self._leaving: tuple[int, Tensor, Any] | None = None  # slot, tensor on the card, event of its copy
        self._coming: tuple[int, Tensor, Any] | None = None
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        for layer in range(layers):
            try:
                self._buffers.append(self.arena.take(math.prod(shape), dtype))
            except PlanError as error:
                self.close()
                size = layers * self._size
                asked = f"{format_bytes(size)} of pinned host memory ({size:,} bytes)"
                why = f"layer {layer + 1} of {layers} got none: {error.why}"
                raise PlanError(asked, why, "A shorter context or more free host memory would do.") from error

    @property
    def pinned_bytes(self) -> int:
        """Host bytes held, every one of them pinned where there is a card."""
        return self.arena.pinned_bytes

    def keep(self, hidden: Tensor) -> int:
        """Start copying a layer's input out; its memory on the card is free again after the next ``keep``."""
        slot = self._depth
        assert slot < len(self._buffers), f"more than {len(self._buffers)} layer inputs were kept"
        self._depth += 1
        self._let_go()
        with self._beside():
            self._on_host(slot, hidden.shape).copy_(hidden, non_blocking=True)
        self._leaving = (slot, hidden, self._event())
        return slot

    def fetch(self, ticket: int) -> Tensor:
        """Give the input of the last layer not yet fetched, and start copying the one before it in."""
        assert ticket == self._depth - 1, f"layer input {ticket} was fetched out of turn"
        self._depth = ticket
        if self._leaving and self._leaving[0] == ticket:
            hidden = self._leaving[1]  # the last one out never had to leave the card
            shape = hidden.shape
            self._let_go()
        else:
            assert self._coming and self._coming[0] == ticket
            hidden, event = self._coming[1:]
            shape = hidden.shape
            self._wait(event)
        self._coming = None
        if ticket > 0:
            # Taken from the compute stream's memory: the copy has to wait for what used that memory before.
            before = torch.empty(shape, dtype=self._dtype, device=self._device)
            with self._beside():
                before.copy_(self._on_host(ticket - 1, shape), non_blocking=True)
            self._coming = (ticket - 1, before, self._event())
        return hidden

    def close(self) -> None:
        """Give the host memory back; the store is of no use afterwards."""
        if self._stream is not None:
            self._stream.synchronize()
        self._leaving = self._coming = None
        self._buffers = []
        self.arena.close()

    def _on_host(self, slot: int, shape: torch.Size) -> Tensor:
        return self._buffers[slot][: shape.numel()].view(shape)

    def _beside(self) -> Any:
        """The side stream, once it has seen everything enqueued on the compute stream so far."""
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
        return torch.cuda.stream(self._stream)  # does nothing where there is no stream

    def _event(self) -> Any:
        return None if self._stream is None else self._stream.record_event()

    def _wait(self, event: Any) -> None:
        if event is not None:
            torch.cuda.current_stream(self._device).wait_event(event)

    def _let_go(self) -> None:
        """Let the compute stream wait for the copy out; only then may it use that memory again."""
        if self._leaving:
            self._wait(self._leaving[2])
            self._leaving = None
