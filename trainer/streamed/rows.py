"""Copies of several rows at once between host memory and the card.

Neighbouring heads of a block lie one behind the other in the host, and a whole sequence apart on the card. torch copies
such a thing row by row, or through memory of its own that it waits for; the CUDA runtime has a call for it, which
NVIDIA's Python bindings give. Every CUDA build of torch for Linux brings these; without them it goes row by row.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

LARGEST_PITCH = 2**31 - 1  # bytes between two rows; CU_DEVICE_ATTRIBUTE_MAX_PITCH


@cache
def bindings() -> Any:
    """The CUDA runtime's calls; None where they are not installed."""
    try:
        from cuda.bindings import runtime
    except ImportError:
        return None
    return runtime


def copy_rows(target: Tensor, source: Tensor) -> None:
    """Copy ``[rows, …]`` of one shape and dtype, on the current stream, without waiting for anything.

    What lies on the CPU is pinned where the other is on a card, and no row has gaps in its memory.

    Raises:
        RuntimeError: the driver refuses the copy.
    """
    if (target.is_contiguous() and source.is_contiguous()) or target.device == source.device:
        target.copy_(source, non_blocking=True)
    elif in_one_call(target, source) and bindings() is not None:
        _copy_in_one_call(target, source)
    else:
        for row, other in zip(target, source, strict=True):
            row.copy_(other, non_blocking=True)


def in_one_call(target: Tensor, source: Tensor) -> bool:
    """Whether rows lie as far apart as one call can reach."""
    both = (target, source)
    pitches = [each.stride(0) * each.element_size() for each in both]
    return (
        max(pitches) <= LARGEST_PITCH and min(pitches) >= target[0].nbytes and all(e[0].is_contiguous() for e in both)
    )


def _copy_in_one_call(target: Tensor, source: Tensor) -> None:
    runtime = bindings()
    kinds = runtime.cudaMemcpyKind
    to_device = target.is_cuda
    kind = kinds.cudaMemcpyHostToDevice if to_device else kinds.cudaMemcpyDeviceToHost
    stream = torch.cuda.current_stream(target.device if to_device else source.device).cuda_stream
    (code,) = runtime.cudaMemcpy2DAsync(
        target.data_ptr(), target.stride(0) * target.element_size(), source.data_ptr(),
        source.stride(0) * source.element_size(), target[0].nbytes, len(target), kind, stream,
    )  # fmt: skip
    if int(code) != 0:
        raise RuntimeError(f"copying {len(target)} rows of {target[0].nbytes:,} bytes: CUDA error {int(code)}")
