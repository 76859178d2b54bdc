"""Memory of a run's long arrays: host memory pinned to its exact size, or the card's.

torch's own pinned memory is rounded up to a power of two. Here it is mapped as ordinary memory and then registered with
the driver.
"""

from __future__ import annotations

import mmap

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

    Attributes:
        bytes: taken so far; ``held``: the arrays.
    """

    def __init__(self, place: torch.device, *, away: bool, pinned: bool) -> None:
        self.place, self.away, self.pinned = place, away, pinned
        self.bytes = 0
        self._registered: list[tuple[int, int]] = []
        self.held: list[Tensor] = []

    def take(self, elements: int, dtype: torch.dtype) -> Tensor:
        """A flat array of so many elements, in pages of its own where it is pinned; its content is undefined.

        Two arrays never share a page, which could be registered only once.

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
                _count_pinned(size)  # before, for the driver makes the pages resident while it pins them
                code = int(torch.cuda.cudart().cudaHostRegister(array.data_ptr(), size, 0))
                if code != 0:
                    _count_pinned(-size)
                    raise PlanError(asked, f"the driver refused to pin it (CUDA error {code}).", nearest)
                self._registered.append((array.data_ptr(), size))
        self.bytes += size
        self.held.append(array)
        return array

    @property
    def pinned_bytes(self) -> int:
        """Bytes of host memory held, every one of them pinned where there is a card."""
        return self.bytes if self.place.type == "cpu" else 0

    def close(self) -> None:
        """Give everything back; arrays are of no use afterwards."""
        if self._registered:
            torch.cuda.synchronize()
        for address, size in self._registered:
            code = int(torch.cuda.cudart().cudaHostUnregister(address))
            assert code == 0, f"cudaHostUnregister gave {code}"
            _count_pinned(-size)
        self._registered, self.held, self.bytes = [], [], 0
