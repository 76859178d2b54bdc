"""Measures what a machine reaches: products, attention, memory, link, pinning. What runs where is the device's.

A quantity is measured at a size that is found by doubling until one call takes long enough to be timed, after
warming up, as the median of several calls, within a time of its own.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

from planner.measured import DTYPES, Measured

Call = Callable[[], None]
Tell = Callable[[str], None]
HEAD_SIZES = (64, 80, 128)
LEAST_CALLS = 3


class Device(Protocol):
    """What is measured. Each method prepares one call, or gives None where the device has no such thing.

    A prepared call returns when its work is done.
    """

    kernels: tuple[str, ...]
    has_link: bool

    def matmul(self, dtype: str, size: int) -> Call | None:
        """One product of two square matrices."""
        ...

    def attention(self, kernel: str, dtype: str, head_size: int, tokens: int) -> tuple[Call, int] | None:
        """Causal attention forward and backward, and how many heads it is of."""
        ...

    def copy(self, size: int) -> Call | None:
        """Copy so many bytes within the device's memory."""
        ...

    def link(self, way: str, size: int) -> Call | None:
        """Copy so many bytes ``to_host``, ``to_device``, or ``both_ways`` at once, from and to pinned memory."""
        ...

    def pin(self, size: int) -> Call | None:
        """Take and pin so many bytes of host memory, and give them back."""
        ...


@dataclass(frozen=True)
class Effort:
    """How hard to try.

    Attributes:
        seconds: time for the calls of one quantity.
        enough: seconds of a call that is long enough; attention of short sequences is far below its rate at length.
        calls: calls at most, three at least; the median of them counts.
        matrix: sides of matrices to try, smallest first; likewise ``tokens`` of attention.
        copied: bytes of copies within the device's memory; far more than caches hold.
        linked: bytes of copies over the link; ``pinned`` of host memory to pin.
    """

    seconds: float
    enough: float
    calls: int
    matrix: tuple[int, ...]
    tokens: tuple[int, ...]
    copied: int
    linked: int
    pinned: int


MIB = 2**20
CPU = Effort(2.0, 0.3, 15, (256, 512, 1024, 2048, 4096), (256, 512, 1024, 2048, 4096), 512 * MIB, 0, 0)
CPU_QUICK = Effort(0.5, 0.1, 9, (256, 512, 1024, 2048), (256, 512, 1024, 2048), 256 * MIB, 0, 0)
GPU = Effort(1.5, 0.02, 25, (2048, 4096, 8192, 16384), (2048, 4096, 8192, 16384), 1024 * MIB, 512 * MIB, 2048 * MIB)
GPU_QUICK = Effort(0.3, 0.005, 15, (2048, 4096, 8192), (2048, 4096, 8192), 512 * MIB, 256 * MIB, 512 * MIB)


class TooLarge(Exception):
    """A size for which the device has no memory; the last one before it counts."""


def measure(device: Device, effort: Effort, source: str, machine: str, host_memory: int, tell: Tell) -> Measured:
    """Measure everything the device has; ``tell`` hears of each quantity before its turn."""
    matmul: dict[str, float] = {}
    for dtype in DTYPES:
        tell(f"products of matrices, {dtype}")
        rate = _largest(effort, effort.matrix, lambda n, dtype=dtype: _counted(device.matmul(dtype, n), 2 * n**3))
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

                rate = _largest(effort, effort.tokens, prepared)
                if rate is not None:
                    attention.setdefault(kernel, {}).setdefault(dtype, {})[head_size] = rate
    tell("copies in memory")
    found = {"memory": _largest(effort, (effort.copied,), lambda size: _counted(device.copy(size), 2 * size))}
    for way, ways in (("to_host", 1), ("to_device", 1), ("both_ways", 2)) if device.has_link else ():
        tell(f"copies of pinned memory, {way.replace('_', ' ')}")
        found[way] = _largest(
            effort, (effort.linked,), lambda size, way=way, ways=ways: _counted(device.link(way, size), ways * size)
        )
    if device.has_link:
        tell("pinning host memory")
        found["pinning"] = _largest(effort, (effort.pinned,), lambda size: _counted(device.pin(size), size))
    return Measured(
        source=source, machine=machine, matmul=matmul, attention=attention, host_memory=host_memory, **found
    )


def _counted(call: Call | None, amount: int) -> tuple[Call, int] | None:
    return None if call is None else (call, amount)


def _largest(effort: Effort, sizes: Iterable[int], prepare: Callable[[int], tuple[Call, int] | None]) -> float | None:
    """Work in a second, at the first size whose call takes long enough, or else the largest that there is room for."""
    best = None
    for size in sizes:
        try:
            made = prepare(size)
            if made is None:
                break
            call, amount = made
            call()  # warms up: kernels are chosen and caches filled
            seconds = _seconds(call)
        except TooLarge:
            break
        best = call, amount, seconds
        if seconds >= effort.enough:
            break
    if best is None:
        return None
    call, amount, seconds = best
    calls = max(LEAST_CALLS, min(effort.calls, int(effort.seconds / seconds)))
    return amount / statistics.median(_seconds(call) for _ in range(calls))


def _seconds(call: Call) -> float:
    began = time.perf_counter()
    call()
    return max(time.perf_counter() - began, 1e-9)
