"""What lies between the passes of a layer: arrays as long as the row, in host memory or on the card."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch

from trainer.host_memory import Arena
from trainer.streamed.arrays import HeadArray, TokenArray


@dataclass(frozen=True)
class Sizes:
    """What the arrays are made for.

    Attributes:
        tokens: of the longest row; ``chunk``: of a chunk.
        heads, key_heads, head_size, width: H, K, E and D.
        group: query heads of a group.
        dtype: of everything but the log-sum-exp.
        block: tokens of a block where attention goes by blocks of the row, 0 where by all of it.
    """

    tokens: int
    chunk: int
    heads: int
    key_heads: int
    head_size: int
    width: int
    group: int
    dtype: torch.dtype
    block: int = 0


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
        # Of the queries of all heads that read one group of key heads, between two blocks of keys.
        waiting = max(sizes.group, sizes.heads // sizes.key_heads)
        self.query_gradient = (
            HeadArray(arena, waiting, sizes.tokens, sizes.head_size, block, sums) if sizes.block else None
        )
        self.stream = TokenArray(arena, sizes.tokens, (sizes.width,), sizes.dtype)

    def begin(self, tokens: int) -> None:
        """A row of so many tokens follows."""
        if self.query_gradient is not None:
            self.query_gradient.begin(tokens)
        for array in (
            self.query, self.key, self.value, self.attended_gradient, *self.attended, *self.log_sum_exp
        ):  # fmt: skip
            array.begin(tokens)
