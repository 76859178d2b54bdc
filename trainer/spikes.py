"""Loss spikes: what one is, and the way back to a state from before it, without the batches in between.

A step whose loss is far above those before it is not taken. Adapters, moments, averages and loss scale go back to a
copy in host memory that was made some steps ago, when the next loss had shown that state to be good, and training goes
on with the batch after the spike. The learning rate goes on by the number of the step.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from planner.errors import PlanError

if TYPE_CHECKING:
    from trainer.built import BuiltRun

ENOUGH = 10
"""Losses that there have to be before one can be far from them."""
LEAST_SPREAD = 0.01
"""Of the mean: losses that hardly differ make no spike of the next one that does."""


@dataclass
class Spikes:
    """What a plan's hooks ask for, and what came of it.

    Attributes:
        sigmas: standard deviations above the mean from which on a loss is a spike.
        window: losses that mean and deviation are of, the last ones.
        every: steps between two copies.
        most: spikes in a run; one more ends it.
        losses: step and loss of the last steps that were taken.
        found: of each spike step, loss, and the step after which the state was that it went back to.
    """

    sigmas: float
    window: int
    every: int
    most: int
    losses: list[tuple[int, float]] = field(default_factory=list)
    found: list[dict[str, float]] = field(default_factory=list)
    _copy: dict[Any, Any] = field(default_factory=dict)
    _copied: int | None = None

    def is_spike(self, loss: float) -> bool:
        """Whether a loss is far above the last ones; one that is no number is, as soon as there are any."""
        if not math.isfinite(loss):
            return bool(self.losses)
        if len(self.losses) < min(ENOUGH, self.window):
            return False
        known = [each for _, each in self.losses[-self.window :]]
        mean = statistics.fmean(known)
        return loss > mean + self.sigmas * max(statistics.pstdev(known), LEAST_SPREAD * abs(mean))

    def good(self, step: int, loss: float, built: BuiltRun) -> None:
        """This step's loss is none: the state that it was computed with, after the step before, is good."""
        # More than the window, so that there are enough of them after those since the copy are dropped.
        self.losses = [*self.losses, (step, loss)][-(self.window + self.every) :]
        # An optimiser has no state to copy before it has stepped, which it has not while a loss scale is looked for.
        ready = all(built.optimizer.state.get(parameter) for parameter in built.trained)
        if ready and (self._copied is None or (step - 1) % self.every == 0):
            self._keep(built)
            self._copied = step - 1

    def back(self, step: int, loss: float, built: BuiltRun) -> int:
        """Go back to the copy, or, where there is none yet, leave out this step alone; gives the step it is of.

        Raises:
            PlanError: there were too many.
        """
        to = step - 1 if self._copied is None else self._copied
        self.found.append({"step": step, "loss": loss, "to": to})
        if len(self.found) > self.most:
            why = f"the loss of step {step} is the spike number {len(self.found)}, and {self.most} are borne."
            nearest = "A smaller learning rate is the first thing to try: --set train.lr=…"
            raise PlanError("training", why, nearest)
        if self._copied is not None:
            self._restore(built)
        self.losses = [each for each in self.losses if each[0] <= to]
        built.optimizer.zero_grad(set_to_none=False)
        return to

    def document(self) -> dict[str, Any]:
        """What a run stores of it; the copy is made anew."""
        return {"losses": [list(each) for each in self.losses], "found": list(self.found)}

    def restore(self, stored: dict[str, Any]) -> None:
        """As it was when that was stored."""
        self.losses = [(int(step), float(loss)) for step, loss in stored["losses"]]
        self.found = list(stored["found"])

    def _keep(self, built: BuiltRun) -> None:
        for key, value in _state(built):
            if not isinstance(value, Tensor):
                self._copy[key] = value
            elif key in self._copy:
                self._copy[key].copy_(value.detach())
            else:
                self._copy[key] = value.detach().to("cpu", copy=True)
        self._copy["scaler"] = built.scaler.state_dict() if built.scaler is not None else None
        self._copy["count"] = built.averages.state()["count"] if built.averages is not None else None

    def _restore(self, built: BuiltRun) -> None:
        with torch.no_grad():
            for key, value in _state(built):
                if isinstance(value, Tensor):
                    value.copy_(self._copy[key])
                else:
                    _, number, name = key
                    built.optimizer.state[built.trained[number]][name] = self._copy[key]
        if built.scaler is not None:
            built.scaler.load_state_dict(self._copy["scaler"])
        if built.averages is not None:
            built.averages.restore({"count": self._copy["count"], "tensors": built.averages.tensors})


def _state(built: BuiltRun) -> Iterator[tuple[tuple[str, int, str], Any]]:
    """What a step changes: adapters, what the optimiser has of each but its tables, averages."""
    for number, parameter in enumerate(built.trained):
        yield ("trained", number, ""), parameter
        for name, value in list(built.optimizer.state.get(parameter, {}).items()):
            if not name.startswith("qmap"):  # of the eight-bit optimiser: the same for all, and never changed
                yield ("optimizer", number, name), value
    for number, average in enumerate(built.averages.tensors if built.averages is not None else []):
        yield ("averages", number, ""), average
