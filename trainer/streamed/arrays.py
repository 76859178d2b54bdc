"""What is as long as the sequence, and where it lies: in host memory, pinned to its exact size, or on the card.

Two layouts. `TokenArray` is ``[tokens, …]``: a range of tokens is one piece. `HeadArray` is cut into blocks of tokens,
each ``[heads, tokens of the block, E]``: a block of all heads is one piece, for the passes by chunks of tokens, and so
is a block of neighbouring heads, for attention by head groups. Every copy between host and card is then of memory
without gaps, which the card's copy engine takes as it is.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence

import torch
from torch import Tensor

from planner.errors import PlanError
from planner.units import format_bytes

_pinned_now = 0


def pinned_now() -> int:
    """Bytes that all arenas of this process have pinned at this moment."""
    return _pinned_now


def _count_pinned(size: int) -> None:
    global _pinned_now
    _pinned_now += size


class Arena:
    """Memory for arrays of one place, taken when each is made and given back together.

    Args:
        place: where arrays lie: the card, or the CPU.
        away: whether that is elsewhere than where is computed, so that what is needed has to be copied.
        pinned: register what lies on the CPU with the driver, so that copies run beside the computation.
    """

    def __init__(self, place: torch.device, *, away: bool, pinned: bool) -> None:
        self.place, self.away, self.pinned = place, away, pinned
        self.bytes = 0
        self._registered: list[tuple[int, int]] = []
        self._held: list[Tensor] = []

    def take(self, elements: int, dtype: torch.dtype) -> Tensor:
        """A flat array of so many elements, in pages of its own where it is pinned; its content is undefined.

        torch's own pinned memory is rounded up to a power of two. Private pages: two arrays never share one, which
        could be registered only once.

        Raises:
            PlanError: the host cannot give or pin that much memory; what was taken before is still there.
        """
        size = elements * dtype.itemsize
        if self.place.type != "cpu" or not size:
            array = torch.empty(elements, dtype=dtype, device=self.place)
        else:
            asked = f"{format_bytes(size)} of host memory ({size:,} bytes), after {format_bytes(self.bytes)}"
            nearest = "A shorter context or more free host memory would do."
            try:
                pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            except (OSError, ValueError, OverflowError) as error:
                raise PlanError(asked, f"the system refused to map it ({error}).", nearest) from error
            array = torch.frombuffer(pages, dtype=dtype)  # holds the pages as long as it lives
            if self.pinned:
                code = int(torch.cuda.cudart().cudaHostRegister(array.data_ptr(), size, 0))
                if code != 0:
                    raise PlanError(asked, f"the driver refused to pin it (CUDA error {code}).", nearest)
                self._registered.append((array.data_ptr(), size))
                _count_pinned(size)
        self.bytes += size
        self._held.append(array)
        return array

    def close(self) -> None:
        """Give everything back; arrays are of no use afterwards."""
        if self._registered:
            torch.cuda.synchronize()
        for address, size in self._registered:
            code = int(torch.cuda.cudart().cudaHostUnregister(address))
            assert code == 0, f"cudaHostUnregister gave {code}"
            _count_pinned(-size)
        self._registered, self._held, self.bytes = [], [], 0


class TokenArray:
    """``[tokens, *shape]`` of one dtype."""

    def __init__(self, arena: Arena, tokens: int, shape: Sequence[int], dtype: torch.dtype) -> None:
        self.away = arena.away
        self._flat = arena.take(tokens * math.prod(shape), dtype)
        self._all = self._flat.view(tokens, *shape)

    def at(self, start: int, stop: int) -> Tensor:
        """The tokens of a range, in place."""
        return self._all[start:stop]


class HeadArray:
    """``[heads, tokens, E]`` in blocks of ``block`` tokens; the last block is as short as it has to be.

    A run of fewer tokens than there is room for uses the front of the memory: call `begin` with its number.
    """

    def __init__(self, arena: Arena, heads: int, tokens: int, size: int, block: int, dtype: torch.dtype) -> None:
        self.heads, self.size, self.block = heads, size, block
        self.away = arena.away
        self._room = self.tokens = tokens
        self._flat = arena.take(heads * tokens * size, dtype)

    def begin(self, tokens: int) -> None:
        """From now on the array is of so many tokens."""
        assert tokens <= self._room, f"{tokens} tokens in an array of {self._room}"
        self.tokens = tokens

    def pieces(self, first: int, last: int, start: int, stop: int) -> list[tuple[int, int, Tensor]]:
        """Heads ``first`` to ``last`` of a range of tokens, in place, block by block.

        Each piece is ``(from, to, [last − first, to − from, E])``, counted from ``start``. A whole block of
        neighbouring heads has no gaps in its memory.
        """
        found = []
        for begin in range(start - start % self.block, stop, self.block):
            end = min(begin + self.block, self.tokens)
            block = self._flat[begin * self.heads * self.size : end * self.heads * self.size]
            lower, upper = max(begin, start), min(end, stop)
            piece = block.view(self.heads, end - begin, self.size)[first:last, lower - begin : upper - begin]
            found.append((lower - start, upper - start, piece))
        return found
