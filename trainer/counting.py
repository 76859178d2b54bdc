"""Counts the bytes of live tensors, op by op: what the allocator would be asked for, on any device.

Each storage counts once, from the op that makes it until its last reference dies. What a kernel takes inside
itself, and what the allocator rounds, is not seen.
"""

from __future__ import annotations

import sys
import weakref
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_HELD_ONCE = 2
"""References to a storage whose tensor nobody but autograd holds: the tensor's, and that of whoever asks."""


def _adds_gradients(caller: Any, first: Any, second: Any) -> bool:
    """Whether autograd itself asks, to add two gradients of one tensor of which the first is nobody else's.

    It then adds in place, which it never does under a dispatch mode: what is counted would be a tensor too many.
    """
    while caller.f_code.co_name in ("_fn", "inner", "__torch_dispatch__"):  # what torch and subclasses wrap modes in
        caller = caller.f_back
    return (
        caller.f_code.co_name == "_engine_run_backward"
        and not torch.is_grad_enabled()
        and isinstance(first, Tensor)
        and isinstance(second, Tensor)
        and (first.shape, first.dtype) == (second.shape, second.dtype)
        and torch._C._storage_Use_Count(first.untyped_storage()._cdata) <= _HELD_ONCE
    )


def device_of(tensor: Tensor) -> torch.device:
    """Where a tensor lies; of a fake one without a dispatch, of which there would be more than of all else."""
    return tensor.fake_device if isinstance(tensor, FakeTensor) else tensor.device


class TensorBytes(TorchDispatchMode):
    """While active, tracks live bytes and their peak; ``mark`` names the phase that peaks are booked under.

    Copies into fake tensors are not carried out: nothing is made by one, so a shape that does not fit, or a target that
    no op has made and that is not resident, goes unseen.

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
        if device_of(tensor).type == "meta":
            return  # a shape, which holds nothing
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        name = self._made(size)

        def gone(_: Any, key: int = key, size: int = size) -> None:
            self._known.pop(key, None)
            self._gone(name, size)

        self._known[key] = weakref.ref(storage, gone)
        self.peaks[self.phase] = max(self.peaks[self.phase], self.live)

    def _made(self, size: int) -> int:
        """Hears of so many bytes that are live from now on; what it gives names them."""
        self.live += size
        return 0

    def _gone(self, name: int, size: int) -> None:
        """Hears that bytes are live no more."""
        self.live -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default and isinstance(args[0], FakeTensor):
            return args[0].fake_device
        if func is torch.ops.aten.copy_.default and isinstance(args[0], FakeTensor):
            return args[0]  # nothing is made, and there is nothing to copy
        if func is torch.ops.aten.add.Tensor and not kwargs and _adds_gradients(sys._getframe(1), *args):
            return args[0].add_(args[1])
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._see(leaf)
        return result
