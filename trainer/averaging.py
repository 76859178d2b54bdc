"""Averages of the adapters over the steps of a run, by torch's own averaging functions (``torch.optim.swa_utils``).

``AveragedModel`` copies a whole model, four-bit weights included; here the adapters alone are copied.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn, get_swa_multi_avg_fn

Average = Callable[[Sequence[Tensor], Sequence[Tensor], int], None]
"""Moves averages towards present values; the number says how many values are in the averages already."""

SWA_SHARE = 0.75
"""Share of the steps before the mean of ``swa`` begins, as in the paper (arXiv 1803.05407)."""


def moving_average(decay: float) -> Average:
    """Exponential moving average. The n-th step keeps no more than n / (n + 9), so the start is soon forgotten."""

    def average(averages: Sequence[Tensor], values: Sequence[Tensor], count: int) -> None:
        get_ema_multi_avg_fn(min(decay, (1 + count) / (10 + count)))(averages, values, count)

    return average


@dataclass(frozen=True)
class Averaging:
    """How to average: which function, from which share of the steps on, on which device (None: the adapters' own)."""

    average: Average
    begins: float
    device: torch.device | None

    @classmethod
    def of(cls, kind: str, decay: float, place: str) -> Averaging:
        """From the knobs of ``weight_averaging``."""
        device = torch.device("cpu") if place == "host" else None
        if kind == "ema":
            return cls(moving_average(decay), 0.0, device)
        return cls(get_swa_multi_avg_fn(), SWA_SHARE, device)


class Averages:
    """The averages of some tensors.

    Attributes:
        tensors: the averages, in the order of what they are averages of; copies of it before the first step.
    """

    def __init__(self, trained: Sequence[Tensor], how: Averaging) -> None:
        self._trained, self._how, self._count = list(trained), how, 0
        self.tensors = [
            value.detach().to(how.device or value.device, copy=True, memory_format=torch.contiguous_format)
            for value in trained
        ]

    @property
    def elsewhere(self) -> bool:
        """Whether they lie in host memory, away from the adapters."""
        return self._how.device is not None

    def update(self, step: int, steps: int) -> None:
        """Take in the values after a step, of so many."""
        if step <= self._how.begins * steps:
            return
        values: list[Any] = [value.detach() for value in self._trained]
        if self._how.device is None:
            self._how.average(self.tensors, values, self._count)
        else:  # one by one, so that no second copy of all of them is made there
            for average, value in zip(self.tensors, values, strict=True):
                self._how.average([average], [value.to(average.device)], self._count)
        self._count += 1

    def put(self) -> None:
        """Write the averages over what they are averages of, where any step was taken in."""
        if self._count:
            with torch.no_grad():
                for average, value in zip(self.tensors, self._trained, strict=True):
                    value.copy_(average)

    def show(self) -> None:
        """Write over the adapters what `put` would, and change nothing else."""
        self.put()

    def state(self) -> dict[str, Any]:
        """What a run needs to go on with them."""
        return {"count": self._count, "tensors": self.tensors}

    def restore(self, state: dict[str, Any]) -> None:
        """As they were when `state` was taken."""
        self._count = state["count"]
        for average, value in zip(self.tensors, state["tensors"], strict=True):
            average.copy_(value)
