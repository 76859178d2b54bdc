"""Copies between host memory and the card, beside the computation.

Two streams carry copies, one each way. Work goes through `run`: while one item is computed, the next one's copies to
the card are under way, and so are the last one's copies back. Nothing is ever waited for by the host. Where the arrays
lie on the card, a fetch gives the place itself and a send is a copy in order. What else goes to the card, and is waited
for later, goes `behind` what an item fetched, so that no item waits for all of it.

On the CPU nothing runs beside anything, but tensors live as long as they would on a card, so that they can be counted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor

from trainer.streamed.arrays import HeadArray, TokenArray
from trainer.streamed.rows import copy_rows

Item = TypeVar("Item")
Loaded = TypeVar("Loaded")


class Transfers:
    """The copies of one device.

    Attributes:
        behind: called after each item's fetches with the event of their arrival, None on a CPU; begins copies that come
            after it.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.behind: Callable[[Any], None] = lambda _: None
        cuda = device.type == "cuda"
        self._inward = torch.cuda.Stream(device) if cuda else None
        self._outward = torch.cuda.Stream(device) if cuda else None
        self._leaving: list[Tensor] = []  # what the computation gave since the last item was begun
        self._left: tuple[list[Tensor], Any] = ([], None)  # the same of the item before, and when it has arrived

    def fetch(self, array: TokenArray, start: int, stop: int) -> Tensor:
        """Some tokens of an array, on the card. Only within the ``load`` of `run`."""
        place = array.at(start, stop)
        if not array.away:
            return place
        # Taken from the compute stream's memory: `run` had the copies wait for what used it before.
        there = torch.empty_like(place, device=self.device)
        with self._on(self._inward):
            there.copy_(place, non_blocking=True)
        return there

    def gather(self, array: HeadArray, first: int, last: int, start: int, stop: int) -> Tensor:
        """Heads ``first`` to ``last`` of some tokens, ``[heads, tokens, E]``, on the card; as `fetch`."""
        pieces = array.pieces(first, last, start, stop)
        if not array.away and len(pieces) == 1:
            return pieces[0][2]
        kind = pieces[0][2]
        there = torch.empty(last - first, stop - start, array.size, dtype=kind.dtype, device=self.device)
        with self._on(self._inward):
            for begin, end, piece in pieces:
                copy_rows(there[:, begin:end], piece)
        return there

    def send(self, value: Tensor, array: TokenArray, start: int, stop: int) -> None:
        """Copy what was computed to some tokens of an array."""
        self._send([(value, array.at(start, stop))], value, array.away)

    def scatter(self, value: Tensor, array: HeadArray, first: int, last: int, start: int, stop: int) -> None:
        """Copy ``[heads, tokens, E]`` to heads ``first`` to ``last`` of some tokens."""
        pieces = array.pieces(first, last, start, stop)
        self._send([(value[:, begin:end], piece) for begin, end, piece in pieces], value, array.away)

    def _send(self, parts: Sequence[tuple[Tensor, Tensor]], held: Tensor, away: bool) -> None:
        if away and self._outward is not None:
            self._outward.wait_stream(torch.cuda.current_stream(self.device))
        with self._on(self._outward if away else None):
            for value, place in parts:
                copy_rows(place, value)
        if away:
            self._leaving.append(held)

    def run(self, items: Iterable[Item], load: Callable[[Item], Loaded], work: Callable[[Item, Loaded], None]) -> None:
        """``work`` on each item with what ``load`` fetched for it, the next one's copies under way meanwhile.

        What was sent before this call has arrived before anything is fetched. ``work`` must not keep what it is given.
        """
        self.arrive()
        coming: tuple[Item, Loaded, Any] | None = None
        for item in items:
            if self._inward is not None:
                # The copies may use memory that the computation enqueued so far still uses.
                self._inward.wait_stream(torch.cuda.current_stream(self.device))
            following = (item, load(item), self._inward and self._inward.record_event())
            self.behind(following[2])
            if coming is not None:
                self._work(coming, work)
            coming = following
            del following
        if coming is not None:
            self._work(coming, work)

    def _work(self, coming: tuple[Item, Loaded, Any], work: Callable[[Item, Loaded], None]) -> None:
        item, loaded, event = coming
        self._wait(event)
        # Memory of what left two items ago may be used again once it has arrived.
        self._wait(self._left[1])
        self._left = (self._leaving, self._outward and self._leaving and self._outward.record_event())
        self._leaving = []
        work(item, loaded)

    def arrive(self) -> None:
        """What was sent has arrived before anything that follows, so its memory may be used again."""
        if self._inward is not None and self._outward is not None:
            self._inward.wait_stream(self._outward)
            torch.cuda.current_stream(self.device).wait_stream(self._outward)
        self._left, self._leaving = ([], None), []

    def mark(self) -> Callable[[], None]:
        """Marks this moment; what it gives returns once all copies that were begun before are done."""
        # Of the kind that lets a thread sleep until it comes, not turn in a loop.
        streams = [stream for stream in (self._inward, self._outward) if stream is not None]
        events = [stream.record_event(torch.cuda.Event(blocking=True)) for stream in streams]

        def done() -> None:
            for event in events:
                event.synchronize()

        return done

    def _wait(self, event: Any) -> None:
        if event:
            torch.cuda.current_stream(self.device).wait_event(event)

    def _on(self, stream: Any) -> AbstractContextManager[Any]:
        return torch.cuda.stream(stream) if stream is not None else nullcontext()
