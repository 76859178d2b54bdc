"""Measures what a machine reaches: products, attention, memory, link, pinning, disk. What runs where is the device's.

A quantity is measured at a size that is found by doubling until one call takes long enough to be timed, or until it is
as large as in a step; then so many calls follow each other as take long enough together. After warming up, the median
of several such turns counts, within a time of its own.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

from planner.measured import DTYPES, Measured

Call = Callable[[], None]
Tell = Callable[[str], None]
HEAD_SIZES = (64, 80, 128, 256)
LEAST_TURNS = 3
NORM_WIDTH = 4096
NORM_BYTES = 4 * NORM_WIDTH  # of one token's values in float32


class Device(Protocol):
    """What is measured. Each method prepares one call, or gives None where the device has no such thing.

    A prepared call may return before its work is done; ``wait`` returns after it.
    """

    kernels: tuple[str, ...]
    has_link: bool

    def matmul(self, dtype: str, size: int) -> Call | None:
        """One product of two square matrices."""
        ...

    def attention(self, kernel: str, dtype: str, head_size: int, tokens: int) -> tuple[Call, int] | None:
        """Causal attention forward and backward, and how many heads it is of."""
        ...

    def norm(self, tokens: int) -> tuple[Call, int] | None:
        """A norm of so many tokens, op by op as models compute it, and the bytes that its ops read and write."""
        ...

    def link(self, way: str, size: int) -> Call | None:
        """Copy so many bytes ``to_host``, ``to_device``, or ``both_ways`` at once, from and to pinned memory."""
        ...

    def pin(self, size: int) -> Call | None:
        """Take and pin so many bytes of host memory, and give them back."""
        ...

    def wait(self) -> None:
        """Return once everything that was called is done."""
        ...


@dataclass(frozen=True)
class Effort:
    """How hard to try.

    Attributes:
        seconds: time for the turns of one quantity.
        enough: seconds of a turn that is long enough; attention of short sequences is far below its rate at length.
        turns: turns at most, three at least; the median of them counts.
        matrix: sides of matrices to try, smallest first; likewise ``tokens`` of attention.
        normed: tokens of a norm, ``NORM_WIDTH`` values each: 256 MiB in float32 at full effort, 128 when quick.
        linked: bytes of copies over the link; ``pinned`` of host memory to pin.
    """

    seconds: float
    enough: float
    turns: int
    matrix: tuple[int, ...]
    tokens: tuple[int, ...]
    normed: int
    linked: int
    pinned: int


MIB = 2**20
CPU = Effort(2.0, 0.3, 15, (256, 512, 1024, 2048, 4096), (256, 512, 1024, 2048, 4096), 16384, 0, 0)
CPU_QUICK = Effort(0.5, 0.1, 9, (256, 512, 1024, 2048), (256, 512, 1024, 2048), 8192, 0, 0)
# A card's products are of 4,096 tokens and 4,096 wide, as those of a layer of a model of some billion parameters.
GPU = Effort(0.6, 0.05, 25, (2048, 4096), (2048, 4096, 8192, 16384), 16384, 512 * MIB, 2048 * MIB)
GPU_QUICK = Effort(0.3, 0.01, 15, (2048, 4096), (2048, 4096, 8192), 8192, 256 * MIB, 512 * MIB)


class TooLarge(Exception):
    """A size for which the device has no memory; the last one before it counts."""


def measure(device: Device, effort: Effort, source: str, machine: str, host_memory: int, tell: Tell) -> Measured:
    """Measure everything the device has; ``tell`` hears of each quantity before its turn."""
    matmul: dict[str, float] = {}
    for dtype in DTYPES:
        tell(f"products of matrices, {dtype}")
        rate = _largest(
            device, effort, effort.matrix, lambda n, dtype=dtype: _counted(device.matmul(dtype, n), 2 * n**3)
        )
        if rate is not None:
            matmul[dtype] = rate
    attention: dict[str, dict[str, dict[int, float]]] = {}
    for kernel in device.kernels:
        for dtype in ("fp32", "fp16", "bf16"):
            for head_size in HEAD_SIZES:
                tell(f"attention, {kernel}, {dtype}, head size {head_size}")

                def prepared(
                    tokens: int, kernel: str = kernel, dtype: str = dtype, head_size: int = head_size
                ) -> tuple[Call, int] | None:
                    made = device.attention(kernel, dtype, head_size, tokens)
                    # Two products forward, five backward, over every pair of a token with itself or one before it.
                    return made and (made[0], 7 * tokens * (tokens + 1) * made[1] * head_size)

                rate = _largest(device, effort, effort.tokens, prepared)
                if rate is not None:
                    attention.setdefault(kernel, {}).setdefault(dtype, {})[head_size] = rate
    tell("a norm, op by op")
    found = {"memory": _largest(device, effort, (effort.normed,), device.norm)}
    for way, ways in (("to_host", 1), ("to_device", 1), ("both_ways", 2)) if device.has_link else ():
        tell(f"copies of pinned memory, {way.replace('_', ' ')}")
        found[way] = _largest(
            device,
            effort,
            (effort.linked,),
            lambda size, way=way, ways=ways: _counted(device.link(way, size), ways * size),
        )
    if device.has_link:
        tell("pinning host memory")
        found["pinning"] = _largest(device, effort, (effort.pinned,), lambda size: _counted(device.pin(size), size))
    return Measured(
        source=source, machine=machine, matmul=matmul, attention=attention, host_memory=host_memory, **found
    )


def _counted(call: Call | None, amount: int) -> tuple[Call, int] | None:
    return None if call is None else (call, amount)


def _largest(
    device: Device, effort: Effort, sizes: Iterable[int], prepare: Callable[[int], tuple[Call, int] | None]
) -> float | None:
    """Work in a second, at the first size whose call takes long enough, or else the largest that there is room for."""
    best = None
    for size in sizes:
        try:
            made = prepare(size)
            if made is None:
                break
            call, amount = made
            _seconds(device, call, 1)  # warms up: kernels are chosen and caches filled
            seconds = _seconds(device, call, 1)
        except TooLarge:
            break
        best = call, amount, seconds
        if seconds >= effort.enough:
            break
    if best is None:
        return None
    call, amount, seconds = best
    calls = max(1, math.ceil(min(effort.enough, effort.seconds) / seconds))
    turns = max(LEAST_TURNS, min(effort.turns, int(effort.seconds / (seconds * calls))))
    return amount * calls / statistics.median(_seconds(device, call, calls) for _ in range(turns))


def _seconds(device: Device, call: Call, calls: int) -> float:
    """Of so many calls, one after the other."""
    began = time.perf_counter()
    for _ in range(calls):
        call()
    device.wait()
    return max(time.perf_counter() - began, 1e-9)
