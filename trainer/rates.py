"""The learning rate of every step: one function has it, whatever schedule there is; and how the highest is found."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from planner.plan import Train


@dataclass(frozen=True)
class RateSearch:
    """Which rates to try: ``steps`` of them from ``low`` to ``high``, each as many times the one before.

    ``rule`` says which is taken, by its name in `trainer.rate_search.RULES`.
    """

    steps: int
    low: float
    high: float
    rule: str = "half_least"

    def rates(self) -> list[float]:
        """All of them."""
        return [self.low * (self.high / self.low) ** (step / (self.steps - 1)) for step in range(self.steps)]


@dataclass(frozen=True)
class RateFound:
    """What a range test gave.

    Attributes:
        curve: of every step that was made its rate, its loss, and by how much that was more than the same batch's
            before training, smoothed.
        rate: what the rule took from it; None where the loss never fell.
        told: how, in words.
    """

    curve: tuple[tuple[float, float, float], ...]
    rate: float | None
    told: str = ""

    def still_fell(self, search: RateSearch) -> bool:
        """Whether the loss was least at the last rate of all, where half of the least is taken."""
        whole = len(self.curve) == search.steps
        least = min(self.curve, key=lambda each: each[2], default=None)
        return search.rule == "half_least" and whole and self.rate is not None and least == self.curve[-1]

    def document(self) -> dict[str, Any]:
        """As plain data."""
        return {"rate": self.rate, "curve": [list(each) for each in self.curve]}

    @staticmethod
    def of(stored: dict[str, Any] | None) -> RateFound | None:
        """What was stored."""
        if stored is None:
            return None
        return RateFound(tuple((each[0], each[1], each[2]) for each in stored["curve"]), stored["rate"])


@dataclass(frozen=True)
class Rates:
    """How the rate goes over a run, as a share of the highest.

    Attributes:
        kind: one of `planner.session.Schedule`, or empty for ``train.schedule``.
        knobs: of that schedule.
    """

    kind: str = ""
    knobs: Mapping[str, float] = field(default_factory=dict)

    def factor(self, train: Train, done: int, steps: int) -> float:
        """The share of the rate for a step.

        Args:
            done: steps before it, all of them where the run is over; those that were skipped do not count.
            steps: of the run.
        """
        if self.kind == "one_cycle":
            return one_cycle(done, steps, **self.knobs)
        warm = math.ceil(train.warmup * steps)
        rise = (done + 1) / warm if done < warm else 1.0
        if self.kind == "warmup_stable_decay":  # where both are under way, the lower of the two
            falling = math.ceil(self.knobs["decay"] * steps)
            return min(rise, max(0, steps - done) / falling if falling else 1.0, 1.0)
        if done < warm:
            return rise
        share = min(1.0, (done - warm) / max(1, steps - warm))
        if self.kind == "polynomial_decay":
            end = self.knobs["end"]
            return end + (1 - end) * (1 - share) ** self.knobs["power"]
        return {"constant": 1.0, "linear": 1 - share, "cosine": 0.5 * (1 + math.cos(math.pi * share))}[train.schedule]


def one_cycle(done: int, steps: int, share: float, rise: float, fall: float) -> float:
    """From 1 / ``rise`` to 1 in ``share`` of the steps and on to 1 / ``rise`` / ``fall``, each along half a cosine.

    Where ``share`` of the steps is less than one, the first has the highest rate.
    """
    top = max(0.0, share * steps - 1)
    if done <= top:
        return _between(1 / rise, 1.0, done / top) if top else 1.0
    return _between(1.0, 1 / rise / fall, min(1.0, (done - top) / max(1, steps - 1 - top)))


def _between(begin: float, end: float, share: float) -> float:
    return end + (begin - end) * 0.5 * (1 + math.cos(math.pi * share))
