"""Copies between host memory and the card, beside the computation.

Two streams carry copies, one each way. Work goes through `run`: while one item is computed, the next one's copies to
the card are under way, and so are the last one's copies back. Nothing is ever waited for by the host.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

Item = TypeVar("Item")
Loaded = TypeVar("Loaded")


class Transfers:
    """The copies of one device; on the CPU, or between places on the card, they are done at once, in order."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        cuda = device.type == "cuda"
        self._inward = torch.cuda.Stream(device) if cuda else None
        self._outward = torch.cuda.Stream(device) if cuda else None
        self._leaving: list[Tensor] = []  # what the computation gave since the last item was begun
        self._left: tuple[list[Tensor], Any] | None = None  # the same of the item before, and when it has arrived

    def fetch(self, source: Tensor) -> Tensor:
        """What lies at a place, on the card. Only within the ``load`` of `run`; where it lies there, it is itself."""
        if source.device == self.device:
            return source
        assert self._inward is not None
        # Taken from the compute stream's memory: `run` had the copies wait for what used it before.
        there = torch.empty_like(source, device=self.device)
        with torch.cuda.stream(self._inward):
            there.copy_(source, non_blocking=True)
        return there

    def gather(self, pieces: Iterable[tuple[int, int, Tensor]], tokens: int) -> Tensor:
        """Pieces of `HeadArray.blocks` as one tensor ``[heads, tokens, E]`` on the card; a lone piece there is itself."""
        pieces = list(pieces)
        first = pieces[0][2]
        if len(pieces) == 1 and first.device == self.device:
            return first
        there = torch.empty(first.shape[0], tokens, first.shape[2], dtype=first.dtype, device=self.device)
        with torch.cuda.stream(self._inward):  # does nothing where there is no stream
            for part, piece in _without_gaps(there, pieces):
                part.copy_(piece, non_blocking=True)
        return there

    def send(self, value: Tensor, place: Tensor) -> None:
        """Copy what was computed to its place."""
        self._send([(value, place)], value)

    def scatter(self, value: Tensor, pieces: Iterable[tuple[int, int, Tensor]]) -> None:
        """Copy ``[heads, tokens, E]`` to the pieces of `HeadArray.blocks`."""
        self._send(_without_gaps(value, pieces), value)

    def _send(self, parts: Sequence[tuple[Tensor, Tensor]], held: Tensor) -> None:
        if parts[0][1].device == self.device:
            for value, place in parts:
                place.copy_(value)
            return
        assert self._outward is not None
        self._outward.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._outward):
            for value, place in parts:
                place.copy_(value, non_blocking=True)
        self._leaving.append(held)

    def run(self, items: Iterable[Item], load: Callable[[Item], Loaded], work: Callable[[Item, Loaded], None]) -> None:
        """``work`` on each item with what ``load`` fetched for it, the next one's copies under way meanwhile.

        What was sent before this call has arrived before anything is fetched. ``work`` must not keep what it is given.
        """
        if self._inward is None:
            for item in items:
                work(item, load(item))
            return
        assert self._outward is not None
        self._inward.wait_stream(self._outward)
        compute = torch.cuda.current_stream(self.device)
        coming: tuple[Item, Loaded, Any] | None = None
        for item in items:
            # The copies may use memory that the computation enqueued so far still uses.
            self._inward.wait_stream(compute)
            following = (item, load(item), self._inward.record_event())
            if coming is not None:
                self._work(coming, work)
            coming = following
            del following
        if coming is not None:
            self._work(coming, work)

    def _work(self, coming: tuple[Item, Loaded, Any], work: Callable[[Item, Loaded], None]) -> None:
        item, loaded, event = coming
        compute = torch.cuda.current_stream(self.device)
        compute.wait_event(event)
        # Memory of what left two items ago may be used again once it has arrived.
        if self._left is not None:
            compute.wait_event(self._left[1])
        assert self._outward is not None
        self._left = (self._leaving, self._outward.record_event()) if self._leaving else None
        self._leaving = []
        work(item, loaded)


def _without_gaps(whole: Tensor, pieces: Iterable[tuple[int, int, Tensor]]) -> list[tuple[Tensor, Tensor]]:
    """Ranges of ``[heads, tokens, E]`` beside their pieces; head by head where either of the two has gaps."""
    found: list[tuple[Tensor, Tensor]] = []
    for start, stop, piece in pieces:
        part = whole[:, start:stop]
        if part.is_contiguous() and piece.is_contiguous():
            found.append((part, piece))
        else:
            found += zip(part, piece, strict=True)
    return found
