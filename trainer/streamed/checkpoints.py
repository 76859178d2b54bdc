"""The inputs of the layers, from the forward to the backward pass: every one, or every k-th, as they are or coded.

With one input kept for k layers the inputs within such a span are computed again in the backward pass, into as many
arrays as the span has other layers; the forward pass uses the same arrays on its way. Kept inputs lie in host memory,
or all but two of them on a disk (``trainer/streamed/shelf.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from planner.streamed_disk import PLACES
from trainer.host_memory import Arena
from trainer.streamed.arrays import TokenArray
from trainer.streamed.disk_file import DiskFile
from trainer.streamed.shelf import Shelf
from trainer.streamed.transfers import Transfers

Shelve = Callable[[list[list[TokenArray]], int], Shelf | None]


class Codec(Protocol):
    """How a hidden state is written down. Every token for itself, so that chunks of any length can be read back."""

    def parts(self, width: int) -> Sequence[tuple[int, torch.dtype]]:
        """Elements of each part for one token of so many elements, and their dtype."""
        ...

    def encode(self, hidden: Tensor) -> tuple[Tensor, ...]:
        """``[C, D]`` to parts ``[C, elements]``."""
        ...

    def decode(self, parts: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """The parts to ``[C, D]`` of a dtype."""
        ...


@dataclass(frozen=True)
class Exact:
    """As they are."""

    dtype: torch.dtype

    def parts(self, width: int) -> Sequence[tuple[int, torch.dtype]]:
        """One."""
        return ((width, self.dtype),)

    def encode(self, hidden: Tensor) -> tuple[Tensor, ...]:
        """The hidden state itself."""
        return (hidden,)

    def decode(self, parts: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """The hidden state itself."""
        return parts[0]


BLOCK = 64
"""Elements of a token that share a scale. Hidden states have a few channels a hundred times as large as the others;
with one scale for a whole token these would leave nothing of the rest."""


class Int8:
    """Eight bits an element, a float32 scale for 64 of them: the largest of these becomes 127."""

    def parts(self, width: int) -> Sequence[tuple[int, torch.dtype]]:
        """Codes and scales."""
        return ((width, torch.int8), (width // BLOCK, torch.float32))

    def encode(self, hidden: Tensor) -> tuple[Tensor, ...]:
        """Round to the nearest of 255 steps."""
        blocks = hidden.unflatten(-1, (-1, BLOCK)).float()
        scale = blocks.abs().amax(-1) / 127
        codes = (blocks / scale.clamp_min(1e-30).unsqueeze(-1)).round_().to(torch.int8)
        return codes.flatten(-2), scale

    def decode(self, parts: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """Codes times scales."""
        codes, scale = parts
        return (codes.unflatten(-1, (-1, BLOCK)).float() * scale.unsqueeze(-1)).flatten(-2).to(dtype)


class Nf4:
    """Four bits an element, the levels of NormalFloat, a float32 scale for 64 of them (bitsandbytes' own kernels)."""

    def parts(self, width: int) -> Sequence[tuple[int, torch.dtype]]:
        """Codes, two in a byte, and scales."""
        return ((width // 2, torch.uint8), (width // BLOCK, torch.float32))

    def encode(self, hidden: Tensor) -> tuple[Tensor, ...]:
        """Round to the nearest of sixteen levels."""
        from bitsandbytes.functional import quantize_4bit

        codes, state = quantize_4bit(hidden.contiguous(), blocksize=BLOCK, quant_type="nf4")
        return codes.view(len(hidden), -1), state.absmax.view(len(hidden), -1)

    def decode(self, parts: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """Levels times scales."""
        from bitsandbytes.functional import QuantState, dequantize_4bit, get_4bit_type

        codes, scale = parts
        shape = torch.Size((codes.shape[0], codes.shape[1] * 2))
        levels = get_4bit_type("nf4", device=str(codes.device))
        state = QuantState(scale.reshape(-1), shape, code=levels, blocksize=BLOCK, quant_type="nf4", dtype=dtype)
        return dequantize_4bit(codes.reshape(-1, 1), state).view(shape)


class Checkpoints:
    """Inputs of all layers of one row.

    Args:
        arena: where those lie that are kept.
        layers, tokens, width: L, N and D.
        spacing: layers for which one input is kept.
        codec: how kept inputs are written down; those within a span are always as they are.
        shelve: makes a shelf of the places in host memory and the number of inputs, where others go to a disk.
    """

    def __init__(
        self,
        arena: Arena,
        layers: int,
        tokens: int,
        width: int,
        dtype: torch.dtype,
        *,
        spacing: int,
        codec: Codec,
        shelve: Shelve | None = None,
    ) -> None:
        self.layers, self.spacing, self._dtype = layers, spacing, dtype
        self._codec, self._exact = codec, Exact(dtype)
        self.coded = not isinstance(codec, Exact)
        kept = len(range(0, layers, spacing))
        places = min(kept, PLACES) if shelve is not None else kept
        self._kept = [self._arrays(arena, codec, tokens, width) for _ in range(places)]
        self._within = [self._arrays(arena, self._exact, tokens, width) for _ in range(1, min(spacing, layers))]
        self._shelf = shelve(self._kept, kept) if shelve is not None else None
        self._tokens = tokens

    @property
    def file(self) -> DiskFile | None:
        """What of a disk it uses, if any."""
        return self._shelf.file if self._shelf is not None else None

    @staticmethod
    def _arrays(arena: Arena, codec: Codec, tokens: int, width: int) -> list[TokenArray]:
        return [TokenArray(arena, tokens, (elements,), dtype) for elements, dtype in codec.parts(width)]

    def begin(self, tokens: int, *, keep: bool) -> None:
        """A row of so many tokens follows.

        Args:
            keep: a backward pass needs the inputs.
        """
        self._tokens = tokens
        if self._shelf is not None:
            self._shelf.begin(tokens, keep=keep)

    def _of(self, layer: int) -> tuple[Codec, list[TokenArray]]:
        span, place = divmod(layer, self.spacing)
        if place:
            return self._exact, self._within[place - 1]
        return self._codec, self._kept[span] if self._shelf is None else self._shelf.arrays(span)

    def _shelved(self, layer: int) -> Shelf | None:
        """The shelf, if the layer's input is one of those on it."""
        return None if layer % self.spacing else self._shelf

    def write(self, transfers: Transfers, layer: int, start: int, stop: int, hidden: Tensor) -> None:
        """Put away the input ``[C, D]`` of a layer for a range of tokens; ranges come in their order."""
        shelf, span = self._shelved(layer), layer // self.spacing
        if shelf is not None and start == 0:
            shelf.writing(span)
        codec, arrays = self._of(layer)
        for part, array in zip(codec.encode(hidden), arrays, strict=True):
            transfers.send(part, array, start, stop)
        if shelf is not None and stop == self._tokens:
            shelf.written(span)

    def fetch(self, transfers: Transfers, layer: int, start: int, stop: int) -> list[Tensor]:
        """Begin to bring it back, ranges in their order; `decode` makes the input of what arrives."""
        shelf = self._shelved(layer)
        if shelf is not None and start == 0:
            shelf.reading(layer // self.spacing)
        return [transfers.fetch(array, start, stop) for array in self._of(layer)[1]]

    def decode(self, layer: int, parts: Sequence[Tensor]) -> Tensor:
        """The input ``[C, D]``."""
        return self._of(layer)[0].decode(parts, self._dtype)


def backward_order(layers: int, spacing: int) -> list[tuple[int, bool]]:
    """The layers as the backward pass visits them, and whether a layer is only run forward once more."""
    found = []
    for first in reversed(range(0, layers, spacing)):
        span = range(first, min(first + spacing, layers))
        if span.stop < layers:  # what the forward pass left there is a later span's
            found += [(layer, True) for layer in span[:-1]]
        found += [(layer, False) for layer in reversed(span)]
    return found
