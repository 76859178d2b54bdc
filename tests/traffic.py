"""Counts what the kernels of a step move and how many there are, op by op, on the trainer's own step on fake tensors.

Nothing is fused where a model runs op by op, so each op that is no view reads what it is given and writes what it
gives, in a kernel of its own. Products and attention go by FLOPs; copies between host and card by the link.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from planner.plan import Plan
from trainer import session
from trainer.counting import device_of
from trainer.data import synthetic_batch
from trainer.fake_step import nothing_real
from trainer.streamed.layer import Layers

PRODUCTS = frozenset({"mm", "addmm", "addmm_", "bmm", "_grouped_mm"})
NARROW = 64
"""Products with no more rows, columns or terms than this take as long as their operands are moved."""
WRITTEN_ONLY = frozenset({"copy_", "fill_", "zero_"})
PICKED = frozenset({"embedding", "index_select", "gather", "index"})
PLACED = frozenset({"scatter_add_"})
"""What reads as many elements as it gives, of however many there are; and what changes as many as it is given."""
NO_KERNEL = frozenset({"_unsafe_view", "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"})
KERNELS = {"slice_backward": 2, "native_layer_norm_backward": 1, "gemm_4bit": 4, "dequantize_4bit": 1}
"""Kernels of an op that has more than one: zeros and a copy; scales, their offset, the weight and the product."""


class Traffic(TorchDispatchMode):
    """While active, counts bytes and kernels by phase; ``mark`` names the phase.

    Attributes:
        bytes: moved through the card's memory, by phase and kind: ``between`` products, or ``dequantise``.
        kernels: launched, by phase; copies over the link are among them.
        ops: bytes by phase and op, to look at.
    """

    def __init__(self, away: Iterable[Tensor]) -> None:
        super().__init__()
        self._away = {array.untyped_storage()._cdata for array in away}
        self.phase, self.within = "start", ""
        self.bytes: dict[tuple[str, str], int] = defaultdict(int)
        self.kernels: dict[str, int] = defaultdict(int)
        self.ops: Counter[tuple[str, str]] = Counter()

    def mark(self, phase: str) -> None:
        """Count under this phase from now on."""
        self.phase = str(phase)

    @property
    def place(self) -> str:
        """The phase, and the pass within it where layers run in passes."""
        return f"{self.phase} {self.within}".strip()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default:
            return device_of(args[0])
        # Of a copy nothing is made, and there is nothing to copy.
        result = args[0] if func is torch.ops.aten.copy_.default else func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in NO_KERNEL or _is_view(func):
            return result
        given = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        made = [each for each in tree_leaves(result) if isinstance(each, Tensor)]
        self.kernels[self.place] += KERNELS.get(name, 1)
        if "attention" in name or self._over_link(given):
            return result
        if name == "gemm_4bit":
            # The weight is written out and read by a product of its own.
            packed = next(each for each in given if each.dtype == torch.uint8)
            moved = packed.numel() + 4 * packed.numel() * made[0].dtype.itemsize
            self._book("dequantise", name, moved)
            return result
        if name in PRODUCTS and min(*(min(each.shape[-2:]) for each in given if each.dim() > 1), NARROW + 1) > NARROW:
            return result
        read = given[1:] if name in WRITTEN_ONLY else made if name in PICKED else given
        if name in PLACED:
            read, made = given[1:], given[1:]
        moved = sum(map(_bytes, read)) + sum(map(_bytes, made)) + (_bytes(given[0]) if name == "slice_backward" else 0)
        if name == "dequantize_4bit":
            moved += _bytes(made[0])  # by the product that reads it
        self._book("dequantise" if func.namespace == "bitsandbytes" else "between", name, moved)
        return result

    def _book(self, kind: str, name: str, moved: int) -> None:
        self.bytes[self.place, kind] += moved
        self.ops[self.place, name] += moved

    def _over_link(self, tensors: Iterable[Tensor]) -> bool:
        return any(each.untyped_storage()._cdata in self._away for each in tensors if device_of(each).type != "meta")


def _is_view(func: Any) -> bool:
    aliases = [each.alias_info for each in func._schema.returns]
    return any(alias is not None and not alias.is_write for alias in aliases)


def _bytes(tensor: Tensor) -> int:
    """Bytes that are there to be read: what is shown several times counts once."""
    sizes = zip(tensor.shape, tensor.stride(), strict=True)
    return math.prod(size for size, stride in sizes if stride) * tensor.dtype.itemsize if tensor.numel() else 0


PASSES = ("project", "attend", "_finish", "_finish_backward", "_attend_backward", "_project_backward")


@contextmanager
def passes_told(traffic: Traffic) -> Iterator[None]:
    """Meanwhile what the streamed executor does in a pass over a layer is counted under that pass."""

    def telling(name: str, own: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(own)
        def told(*args: Any, **kwargs: Any) -> Any:
            traffic.within = name.strip("_")
            try:
                return own(*args, **kwargs)
            finally:
                traffic.within = ""

        return told

    patches = [patch.object(Layers, name, telling(name, getattr(Layers, name))) for name in PASSES]
    for each in patches:
        each.start()
    try:
        yield
    finally:
        for each in patches:
            each.stop()


def counted(plan: Plan) -> Traffic:
    """Forward, loss and backward of a plan's largest batch."""
    with nothing_real():
        built = session.build(plan)
        vocab = built.base.config.vocab_size
        batch = synthetic_batch(plan.train.batch, plan.total_tokens, plan.target, vocab, 0, built.most_documents)
        away = [array for arena in built.arenas if arena.away for array in arena.held]
        with Traffic(away) as traffic, passes_told(traffic):
            traffic.mark("forward")
            built.loss(batch, torch.tensor(float(batch.trained)), traffic.mark).backward()
    return traffic
