"""Sums of bytes and work on one card: what they take of its limits, and what one is chosen by.

A sum is a row of columns: bytes by phase on the card, bytes by phase in the host, seconds by phase that the card
computes, seconds by phase that the link copies, optimisations that change the result, optimisations at all. What is
weighed grows with each column, so the least of each column weighs no more than any sum that can still come of it. That
is what ``planner.bounds`` leaves out most sums by.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from planner.calibration import Calibration
from planner.compose import Configuration
from planner.evaluate import Limits
from planner.hardware import HardwareProfile
from planner.rates import TO_DEVICE, TO_HOST
from planner.rows import Values
from planner.table import CARD, HOST, LANES, PHASES, WORK
from planner.timecost import NOMINAL, TIMED, launches, overlapped, rates_for

BUSY = slice(2 * len(PHASES), 2 * len(PHASES) + len(TIMED))
LINK = slice(BUSY.stop, BUSY.stop + len(TIMED))
INEXACT, COUNT = LINK.stop, LINK.stop + 1
LINKS = (TO_HOST, TO_DEVICE)


@dataclass(frozen=True)
class Clock:
    """How a branch's work becomes seconds.

    Attributes:
        known: whether the card's rates are known; else these are nominal ones, which rank and are never shown.
        seconds: seconds of (busy, link) in each phase for a unit of each lane.
        least: seconds that each phase takes at least.
    """

    known: Any
    layers: int
    seconds: Values
    least: tuple[Any, ...]

    @classmethod
    def of(cls, trunk: Configuration, gpu: HardwareProfile, constants: Calibration, *, known: bool) -> Clock:
        """The clock of a branch on a card."""
        rates = rates_for(trunk, gpu, constants).likely if known else NOMINAL
        seconds = np.zeros((2 * len(TIMED), len(LANES)))
        for lane, (phase, kind) in enumerate(LANES):
            if rate := rates[kind]:
                seconds[TIMED.index(phase) + len(TIMED) * (kind in LINKS), lane] = 1 / rate
        waits = launches(trunk, gpu, constants, known=known)
        return cls(known, trunk.letters["L"], seconds, tuple(waits[phase] for phase in TIMED))

    def columns(self, table: Values, inexact: Values, counts: Values) -> Values:
        """Places of a table (place × column × candidate) with seconds in place of work."""
        width = table.shape[2]
        work = np.matmul(self.seconds, table[:, WORK])
        both = np.broadcast_to(np.stack([inexact, counts], axis=1)[:, :, None], (len(table), 2, width))
        return np.concatenate([table[:, : HOST.stop], work, both], axis=1)


@dataclass(frozen=True)
class Weights:
    """What sums come to; arrays of one shape. ``seconds`` of a step rank, and are an estimate where rates are known."""

    high: Any
    host: Any
    seconds: Any
    inexact: Any
    count: Any
    known: Any

    def at(self, row: int) -> Weights:
        """Those of one row of sums at their one candidate."""
        high, host, seconds = (each[row, 0] for each in (self.high, self.host, self.seconds))
        return Weights(high, host, seconds, self.inexact[row, 0], self.count[row, 0], bool(self.known))

    def fits(self, limits: Limits) -> Any:
        """Whether card, host and time allow it."""
        fits = (self.high <= limits.gpu_bytes) & (self.host <= limits.host_bytes)
        return fits & ((self.seconds <= limits.step_seconds) | np.logical_not(self.known))


@dataclass(frozen=True)
class Scale:
    """Weighs sums on one card. ``accumulation``: micro-batches of a step."""

    gpu: HardwareProfile
    constants: Calibration
    accumulation: int

    def weigh(self, sums: Values, clock: Clock) -> Weights:
        """Weigh sums: … × column × candidate."""
        kind = self.gpu.kind
        card, host = sums[..., CARD, :].max(axis=-2), sums[..., HOST, :].max(axis=-2)
        expected = card.astype(np.int64)
        high = expected + self.constants.reserve_bytes(expected, kind)
        # With the CPU alone there is one memory: what the card would hold lies in the host too.
        host = host.astype(np.int64) + self.constants.host_process_bytes(kind) + (high if kind == "cpu" else 0)
        busy, link = sums[..., BUSY, :], sums[..., LINK, :]
        seconds = sum(
            overlapped(busy[..., phase, :], link[..., phase, :], clock.layers, least)
            for phase, least in enumerate(clock.least)
        )
        counts = sums[..., INEXACT, :], sums[..., COUNT, :]
        return Weights(high, host, seconds * self.accumulation, *counts, clock.known)


Measure = Callable[[Weights, Limits], Any]
Key = tuple[Measure, ...]
"""What is least first, and then, and then: each grows with the columns of a sum."""


def time(weights: Weights, limits: Limits) -> Any:
    """Three digits of the seconds; times that are alike in them differ by no more than one in a hundred."""
    unit = 10.0 ** (np.floor(np.log10(np.maximum(weights.seconds, 1e-300))) - 2)
    return np.rint(weights.seconds / unit) * unit


def seconds(weights: Weights, limits: Limits) -> Any:
    """Seconds of a step, every digit of them."""
    return weights.seconds


def inexact(weights: Weights, limits: Limits) -> Any:
    """How many optimisations change the result."""
    return weights.inexact


def count(weights: Weights, limits: Limits) -> Any:
    """How many optimisations there are."""
    return weights.count


def card(weights: Weights, limits: Limits) -> Any:
    """The bound on the card's memory."""
    return weights.high


def host(weights: Weights, limits: Limits) -> Any:
    """Memory of the host."""
    return weights.host


def share(weights: Weights, limits: Limits) -> Any:
    """The largest share that is taken of any limit."""
    shares = np.maximum(weights.high / max(1, limits.gpu_bytes), weights.host / max(1, limits.host_bytes))
    return np.maximum(shares, np.where(weights.known, weights.seconds / limits.step_seconds, 0.0))
