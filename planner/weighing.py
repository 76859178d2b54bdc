"""Sums of bytes and work on one card: what they take of its limits, and what one is chosen by.

A sum is a row of columns: bytes by phase on the card, bytes by phase in the host, bytes on the disk, seconds by phase
that the card computes, seconds by phase that link and disk copy, optimisations that change the result. What is weighed
grows with each column, so the least of each column weighs no more than any sum that can still come of it. That is what
``planner.bounds`` leaves out most sums by.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

import numpy as np

from planner.calibration import Calibration
from planner.compose import Configuration
from planner.evaluate import Limits
from planner.hardware import HardwareProfile
from planner.rates import ON_DISK, TO_DEVICE, TO_HOST
from planner.rows import Values
from planner.table import CARD, DISK, HOST, LANES, WORK
from planner.timecost import NOMINAL, TIMED, launches, overlapped, rates_for

BUSY = slice(DISK + 1, DISK + 1 + len(TIMED))
LINK = slice(BUSY.stop, BUSY.stop + len(TIMED))
INEXACT, ORDER = LINK.stop, LINK.stop + 1  # the order is nothing, but where values of knobs are gone through
WIDTH = ORDER + 1
LINKS = (TO_HOST, TO_DEVICE, ON_DISK)


@dataclass(frozen=True)
class Clock:
    """How a branch's work becomes seconds; one, or the clocks of several branches one above the other.

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

    def columns(self, table: Values, inexact: Values) -> Values:
        """Places of a table (place × column × candidate) with seconds in place of work."""
        work = np.matmul(self.seconds, table[:, WORK])
        counts = np.zeros((len(table), 2, table.shape[2]))
        counts[:, 0] = inexact[:, None]
        return np.concatenate([table[:, : DISK + 1], work, counts], axis=1)


@dataclass(frozen=True)
class Weights:
    """What sums come to; arrays of one shape. ``seconds`` of a step rank, and are an estimate where rates are known."""

    high: Any
    host: Any
    disk: Any
    seconds: Any
    inexact: Any
    order: Any
    known: Any

    def at(self, row: int) -> Weights:
        """Those of one row."""
        known = np.broadcast_to(self.known, np.shape(self.high))[row]
        return Weights(*(float(each[row]) for each in self._parts()), known=bool(known))  # type: ignore[misc]

    def _parts(self) -> tuple[Any, ...]:
        return (self.high, self.host, self.disk, self.seconds, self.inexact, self.order)

    def fits(self, limits: Limits) -> Any:
        """Whether card, host, disk and time allow it."""
        fits = (self.high <= limits.gpu_bytes) & (self.host <= limits.host_bytes) & (self.disk <= limits.disk_bytes)
        return fits & ((self.seconds <= limits.step_seconds) | np.logical_not(self.known))


@dataclass(frozen=True)
class Caps:
    """The most that a sum may come to, of all that is weighed."""

    high: float
    host: float
    disk: float
    seconds: float
    inexact: float = float("inf")
    order: float = float("inf")

    @classmethod
    def of(cls, limits: Limits, *, known: bool) -> Caps:
        """The limits; time has none where it is not known."""
        seconds = limits.step_seconds if known else float("inf")
        return cls(limits.gpu_bytes, limits.host_bytes, limits.disk_bytes, seconds)

    def hold(self, weights: Weights) -> Any:
        """Whether nothing is exceeded."""
        held = (weights.high <= self.high) & (weights.host <= self.host) & (weights.disk <= self.disk)
        return (
            held & (weights.seconds <= self.seconds) & (weights.inexact <= self.inexact) & (weights.order <= self.order)
        )

    def lowered(self, **to: float) -> Caps:
        """The same with some of them lower, unless they are already."""
        return replace(self, **{name: min(getattr(self, name), most) for name, most in to.items()})


@dataclass(frozen=True)
class Scale:
    """Weighs sums on one card. ``accumulation``: micro-batches of a step."""

    gpu: HardwareProfile
    constants: Calibration
    accumulation: int

    def weigh(self, sums: Values, clock: Clock) -> Weights:
        """Weigh sums: … × column, or with ``axis`` after the columns … × column × candidate."""
        kind = self.gpu.kind
        expected = sums[..., CARD].max(axis=-1).astype(np.int64)
        high = expected + self.constants.reserve_bytes(expected, kind)
        # With the CPU alone there is one memory: what the card would hold lies in the host too.
        process = self.constants.host_process_bytes(kind) + (high if kind == "cpu" else 0)
        host = sums[..., HOST].max(axis=-1).astype(np.int64) + process
        busy, link = sums[..., BUSY], sums[..., LINK]
        seconds = sum(
            overlapped(busy[..., phase], link[..., phase], clock.layers, least)
            for phase, least in enumerate(clock.least)
        )
        seconds = seconds * self.accumulation
        return Weights(high, host, sums[..., DISK], seconds, sums[..., INEXACT], sums[..., ORDER], clock.known)

    def most_on_card(self, high: float) -> float:
        """No less than the most bytes expected on the card whose bound is no higher than this."""
        fixed = int(self.constants.reserve_bytes(0, self.gpu.kind))
        per_thousand = (int(self.constants.reserve_bytes(10**9, self.gpu.kind)) - fixed) / 1e9
        return (high - fixed + 1) / (1 + per_thousand)

    def most_in_host(self, host: float) -> float:
        """No less than the most bytes of terms in the host where so many are taken of it."""
        return host - self.constants.host_process_bytes(self.gpu.kind)


@dataclass(frozen=True)
class Measure:
    """One thing to choose by, the less the better; it grows with the columns of a sum.

    Attributes:
        reads: which of ``Weights`` it is made of.
        below: caps within which it is no more than a value.
    """

    of: Callable[[Weights], Any]
    reads: frozenset[str]
    below: Callable[[Caps, float], Caps]


Key = tuple[Measure, ...]
"""What is least first, and then, and then."""


def three_digits(seconds: Any) -> Any:
    """Seconds rounded to three digits; times that are alike in them differ by no more than one in a hundred."""
    unit = _unit(seconds)
    return np.rint(seconds / unit) * unit


def _unit(seconds: Any) -> Any:
    return 10.0 ** (np.floor(np.log10(np.maximum(seconds, 1e-300))) - 2)


def share(limits: Limits) -> Measure:
    """The largest share that is taken of any limit."""

    def of(weights: Weights) -> Any:
        late = np.where(weights.known, weights.seconds / limits.step_seconds, 0.0)
        shares = [getattr(weights, name) / most for name, most in _sizes(limits).items()]
        return reduce(np.maximum, shares, late)

    def below(caps: Caps, value: float) -> Caps:
        # Of those whose time is not known it may be anything.
        return caps.lowered(**{name: value * most for name, most in _sizes(limits).items()})

    return Measure(of, frozenset({"high", "host", "disk", "seconds"}), below)


def _sizes(limits: Limits) -> dict[str, int]:
    return {"high": max(1, limits.gpu_bytes), "host": max(1, limits.host_bytes), "disk": max(1, limits.disk_bytes)}


def _plain(name: str) -> Measure:
    return Measure(
        lambda weights: getattr(weights, name), frozenset({name}), lambda caps, value: caps.lowered(**{name: value})
    )


CARD_MEMORY, HOST_MEMORY, DISK_SPACE, SECONDS, INEXACT_COUNT, KNOB_ORDER = map(
    _plain, ("high", "host", "disk", "seconds", "inexact", "order")
)
TIME = Measure(
    lambda weights: three_digits(weights.seconds),
    frozenset({"seconds"}),
    lambda caps, value: caps.lowered(seconds=(value + 0.5 * float(_unit(value))) * (1 + 1e-9)),
)
"""Three digits of the seconds."""
