"""What is as long as the sequence, and where it lies: in host memory, pinned to its exact size, or on the card.

Two layouts. `TokenArray` is ``[tokens, …]``: a range of tokens is one piece. `HeadArray` is cut into blocks of tokens,
each ``[heads, tokens of the block, E]``: a block of all heads is one piece, for the passes by chunks of tokens, and so
is a block of neighbouring heads, for attention by head groups. Every copy between host and card is then of memory
without gaps, which the card's copy engine takes as it is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from trainer.host_memory import Arena


class TokenArray:
    """``[tokens, *shape]`` of one dtype."""

    def __init__(self, arena: Arena, tokens: int, shape: Sequence[int], dtype: torch.dtype) -> None:
        self.away = arena.away
        self._flat = arena.take(tokens * math.prod(shape), dtype)
        self._all = self._flat.view(tokens, *shape)

    @property
    def bytes(self) -> int:
        """Of all its tokens."""
        return self._flat.nbytes

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
        assert 0 <= first < last <= self.heads and 0 <= start < stop <= self.tokens
        found = []
        for begin in range(start - start % self.block, stop, self.block):
            end = min(begin + self.block, self.tokens)
            lower, upper = max(begin, start), min(end, stop)
            of_head = (end - begin) * self.size
            place = begin * self.heads * self.size + first * of_head + (lower - begin) * self.size
            # One view in place of four: there are thousands of pieces in a step, and the host waits for each.
            piece = self._flat.as_strided(
                (last - first, upper - lower, self.size), (of_head, self.size, 1), self._flat.storage_offset() + place
            )
            found.append((lower - start, upper - start, piece))
        return found
