"""Counts the bytes of live tensors, op by op: what the allocator would be asked for, on any device.

Each storage counts once, from the op that makes it until its last reference dies. What a kernel takes inside
itself, and what the allocator rounds, is not seen.
"""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class TensorBytes(TorchDispatchMode):
    """While active, tracks live bytes and their peak; ``mark`` names the phase that peaks are booked under.

    Args:
        resident: tensors that exist already and count from the start (weights, optimiser state).
    """

    def __init__(self, resident: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.live = 0
        self.peaks: dict[str, int] = defaultdict(int)
        self.phase = "start"
        self._known: dict[int, weakref.ref[Any]] = {}
        for tensor in resident:
            self._see(tensor)

    def mark(self, phase: str) -> None:
        """Book peaks under this phase from now on."""
        self.phase = phase
        self.peaks[phase] = max(self.peaks[phase], self.live)

    @property
    def peak(self) -> int:
        """The largest number of live bytes over all phases."""
        return max(self.peaks.values(), default=self.live)

    def _see(self, tensor: Tensor) -> None:
        if tensor.device.type == "meta":
            return  # a shape, which holds nothing
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self.live += size

        def gone(_: Any, key: int = key, size: int = size) -> None:
            self._known.pop(key, None)
            self.live -= size

        self._known[key] = weakref.ref(storage, gone)
        self.peaks[self.phase] = max(self.peaks[self.phase], self.live)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._see(leaf)
        return result
