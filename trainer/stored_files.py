"""Files that a run is stored in: whole or not at all, and streams that are as long as the sequence, piece by piece."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from planner.units import MIB
from trainer.streamed.arrays import TokenArray

_PIECE = 64 * MIB  # bytes of a stream that are written or read at once


def write_synced(final: Path, put: Callable[[Any], Any]) -> None:
    """A file that is there whole or not at all, also after the machine went down."""
    half = final.with_name(f".{final.name}.being-written")
    with half.open("wb") as file:
        put(file)
        file.flush()
        os.fsync(file.fileno())
    half.replace(final)
    place = os.open(final.parent, os.O_RDONLY)
    try:
        os.fsync(place)
    finally:
        os.close(place)


def put_state(state: dict[str, Any], file: Any) -> None:
    """Put tensors and plain data into a file.

    Raises:
        OSError: the disk is full.
    """
    try:
        torch.save(state, file)
    except RuntimeError as error:  # what torch makes of a full disk
        if "inline_container" not in str(error):
            raise
        raise OSError(f"{str(error).splitlines()[0]}") from error


def put_stream(file: Any, stream: TokenArray, tokens: int) -> None:
    """Put the first tokens of a stream into a file."""
    for start, stop in _pieces(stream, tokens):
        file.write(memoryview(stream.at(start, stop).cpu().view(torch.uint8).numpy()).cast("B"))


def read_stream(file: Path, stream: TokenArray) -> None:
    """Fill the front of a stream with what a file holds."""
    size = stream.at(0, 1).nbytes
    tokens = file.stat().st_size // size
    with file.open("rb") as source:
        for start, stop in _pieces(stream, tokens):
            place = stream.at(start, stop)
            piece = place if place.device.type == "cpu" else torch.empty_like(place, device="cpu")
            read = source.readinto(memoryview(piece.view(torch.uint8).numpy()).cast("B"))
            assert read == piece.nbytes, f"{file} is short"
            if piece is not place:
                place.copy_(piece)


def _pieces(stream: TokenArray, tokens: int) -> list[tuple[int, int]]:
    step = max(1, _PIECE // stream.at(0, 1).nbytes)
    return [(start, min(start + step, tokens)) for start in range(0, tokens, step)]
