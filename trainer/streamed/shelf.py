"""Layer inputs on disk: two places in host memory for those that are worked on, and a file for the others.

In the forward pass one place holds what a layer reads, and the other takes what it gives; that goes to the disk as soon
as all of it has arrived. In the backward pass one place holds what a layer reads, and what the layer before it read
comes back into the other meanwhile. The last two inputs of a forward pass are still there for the backward pass.

Nothing is waited for but what is needed: before a place is written to, that what was in it is on the disk; before it is
read, that what should be in it has come.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from planner.streamed_disk import PAGE, PLACES
from trainer.streamed.arrays import TokenArray
from trainer.streamed.disk_file import DiskFile, UnderWay, finish

Mark = Callable[[], Callable[[], None]]
"""Marks this moment; what it gives returns once all copies that were begun before are done."""


def on_disk(inputs: int) -> int:
    """How many of so many inputs go to the disk."""
    return max(0, inputs - PLACES)


def stored_bytes(parts: Sequence[int]) -> int:
    """Bytes in the file of one input in parts of so many bytes (`planner.streamed_disk.stored_inputs`)."""
    return -(-sum(parts) // PAGE) * PAGE + PAGE * (len(parts) - 1)


@dataclass
class _Place:
    """One input's place in host memory.

    Attributes:
        holds: number of the input that is in it, or on its way into it; None: nothing of use.
        pieces: what is under way between it and the disk.
        coming: whether it comes from there.
    """

    arrays: list[TokenArray]
    holds: int | None = None
    pieces: UnderWay = ()
    coming: bool = False

    def settle(self) -> None:
        """Let what is under way end."""
        pieces, self.pieces = self.pieces, ()
        finish(pieces)


class Shelf:
    """The inputs of a model, by number.

    Args:
        places: arrays of `PLACES` inputs in host memory, or of as many as there are.
        inputs: how many there are.
        file: for all but the last `PLACES` of them.
        mark: see `Mark`.
    """

    def __init__(self, places: Sequence[list[TokenArray]], inputs: int, file: DiskFile, mark: Mark) -> None:
        self._places = [_Place(arrays) for arrays in places]
        self._on_disk, self._file, self._mark = on_disk(inputs), file, mark
        self._each = stored_bytes([array.bytes for array in places[0]])
        self._tokens, self._keep = 0, False
        self._stored: set[int] = set()

    @property
    def file(self) -> DiskFile:
        """What of the disk it uses."""
        return self._file

    def begin(self, tokens: int, *, keep: bool) -> None:
        """A forward pass over so many tokens begins.

        Args:
            keep: a backward pass follows; else nothing goes to the disk.
        """
        for place in self._places:
            place.settle()
            place.holds = None
        self._tokens, self._keep, self._stored = tokens, keep, set()

    def writing(self, number: int) -> None:
        """An input is about to be written to its place: what was there is on the disk by now."""
        place = self._of(number)
        place.settle()
        place.holds = number

    def written(self, number: int) -> None:
        """All of an input is on its way to its place; from there it goes to the disk, unless it is one of the last."""
        if self._keep and number < self._on_disk:
            self._of(number).coming = False
            self._move(number, self._file.write)
            self._stored.add(number)

    def reading(self, number: int) -> None:
        """An input is about to be read from its place: it is there by now, and the one before it begins to come."""
        self._fetch(number)
        if self._of(number).coming:
            self._of(number).settle()
        if number - 1 in self._stored:
            self._fetch(number - 1)

    def arrays(self, number: int) -> list[TokenArray]:
        """The place of an input."""
        return self._of(number).arrays

    def _fetch(self, number: int) -> None:
        place = self._of(number)
        if place.holds == number:
            return
        assert number in self._stored, f"input {number} is nowhere"
        place.settle()
        place.holds, place.coming = number, True
        self._move(number, self._file.read)

    def _move(self, number: int, move: Callable[[Tensor, int, Callable[[], None]], UnderWay]) -> None:
        place, at, after = self._of(number), number * self._each, self._mark()
        pieces: list[Future[None]] = []
        for array in place.arrays:
            pieces += move(array.at(0, self._tokens).view(-1), at, after)
            at += -(-array.bytes // PAGE) * PAGE
        place.pieces = pieces

    def _of(self, number: int) -> _Place:
        return self._places[number % len(self._places)]


def shelf_on(folder: Path, places: list[list[TokenArray]], inputs: int, *, mark: Mark) -> Shelf | None:
    """A shelf with a file on the disk of a folder; none where all inputs have places in the host.

    Raises:
        PlanError: that disk has not so much room.
    """
    size = on_disk(inputs) * stored_bytes([array.bytes for array in places[0]])
    if not size:
        return None
    return Shelf(places, inputs, DiskFile(folder, size), mark)
