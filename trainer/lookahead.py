"""Slow adapters that follow the fast ones every few steps, from which the fast ones begin again (Lookahead)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class Lookahead:
    """The slow copies of some tensors.

    Attributes:
        tensors: the slow copies, in the order of what they are copies of; they begin where those begin.
    """

    def __init__(self, trained: Sequence[Tensor], *, every: int, share: float, place: str) -> None:
        self._trained, self._every, self._share = list(trained), every, share
        self._host, self._since = place == "host", 0
        self.tensors = [
            value.detach().to("cpu" if self._host else value.device, copy=True, memory_format=torch.contiguous_format)
            for value in trained
        ]

    @property
    def elsewhere(self) -> bool:
        """Whether they lie in host memory, away from the adapters."""
        return self._host

    def update(self, step: int, steps: int) -> None:
        """After a step, of so many: every few of them the slow ones follow, and the fast ones go back to them."""
        self._since += 1
        if self._since == self._every:
            self._follow()

    def put(self) -> None:
        """Write the slow ones over the others, once they have followed the steps since the last time."""
        if self._since:
            self._follow()

    def show(self) -> None:
        """Write over the fast ones what `put` would, and change nothing else."""
        if self._since:
            with torch.no_grad():
                for slow, fast in zip(self.tensors, self._trained, strict=True):
                    fast.copy_(torch.lerp(slow, fast.detach().to(slow.device), self._share))

    def _follow(self) -> None:
        with torch.no_grad():
            for slow, fast in zip(self.tensors, self._trained, strict=True):
                slow.lerp_(fast.detach().to(slow.device), self._share)
                fast.copy_(slow)
        self._since = 0

    def state(self) -> dict[str, Any]:
        """What a run needs to go on with them."""
        return {"count": self._since, "tensors": self.tensors}

    def restore(self, state: dict[str, Any]) -> None:
        """As they were when `state` was taken."""
        self._since = state["count"]
        for slow, value in zip(self.tensors, state["tensors"], strict=True):
            slow.copy_(value)
