"""A GGUF file read once while a model is put together, not anew for tokenizer, config and weights.

The package gguf makes an array of each token of the vocabulary, which takes seconds, and transformers has it do so four
times before a model of that file is there.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def read_once() -> Iterator[None]:
    """Meanwhile whoever reads a GGUF file again is given what was read before; after it nothing is held."""
    try:
        import gguf
    except ImportError:  # no such file can be read then
        yield
        return
    own, known = gguf.GGUFReader, dict[tuple[str, str], Any]()

    def reader(path: Any, mode: Any = "r") -> Any:
        if (str(path), mode) not in known:
            known[str(path), mode] = own(path, mode)
        return known[str(path), mode]

    gguf.GGUFReader = reader
    try:
        yield
    finally:
        gguf.GGUFReader = own
        known.clear()
