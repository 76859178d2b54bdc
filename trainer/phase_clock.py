"""How long each phase of a step took.

On a card an event is put into the stream where a phase begins, and read once the step is over: nothing waits for
anything. Elsewhere the clock on the wall does.
"""

from __future__ import annotations

import statistics
import time
from itertools import pairwise
from typing import Any

import torch


class PhaseClock:
    """Seconds by phase of one step after the other.

    Attributes:
        steps: of each step that was timed whole, seconds by phase; phases that come again and again are added up.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._marks: list[tuple[str, Any]] | None = None
        self.steps: list[dict[str, float]] = []

    def begin(self) -> None:
        """A step begins; what is marked before belongs to none."""
        self._marks = []

    def mark(self, phase: str) -> None:
        """A phase begins, and the one before it ends."""
        if self._marks is not None:
            self._marks.append((phase, self._now()))

    def end(self) -> None:
        """The step is over, and its last phase with it; the device has done all of it."""
        marks, self._marks = self._marks, None
        if not marks:
            return
        found: dict[str, float] = {}
        for (phase, began), (_, ended) in pairwise(marks):
            found[phase] = found.get(phase, 0.0) + self._between(began, ended)
        self.steps.append(found)

    def medians(self, count: int | None = None, begin: int = 0) -> dict[str, float]:
        """The median of each phase over the first so many steps, or all; without those before ``begin``.

        Of several steps the first is left out, which meets every kernel for the first time.
        """
        counted = self.steps[begin:count]
        steps = counted[1:] or counted
        phases = list(dict.fromkeys(phase for step in steps for phase in step))
        return {phase: statistics.median(step[phase] for step in steps if phase in step) for phase in phases}

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _between(self, began: Any, ended: Any) -> float:
        return began.elapsed_time(ended) / 1000 if self._cuda else ended - began
