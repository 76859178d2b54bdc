"""Sums of bytes and work on one card: what they take of its limits, and what one is chosen by.

A sum is a row of columns: bytes by phase on the card, bytes by phase in the host, bytes on the disk, seconds of
each part of a step (`planner.timecost.PARTS`), optimisations that change the result. What is weighed
grows with each column, so the least of each column weighs no more than any sum that can still come of it. That is what
``planner.fields`` leaves out most sums by.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, reduce
from typing import Any

import numpy as np

from planner.calibration import Calibration
from planner.compose import Configuration
from planner.evaluate import Limits
from planner.hardware import HardwareProfile
from planner.rows import Values
from planner.table import BYTES, CARD, DISK, HOST, LANES, WORK
from planner.timecost import AHEAD, BUSY, EXPOSED, NOMINAL, PARTS, TIMED, phase_seconds, rates_for

SPENT = slice(DISK + 1, DISK + 1 + len(PARTS))
INEXACT, ORDER = SPENT.stop, SPENT.stop + 1  # the order is nothing, but where values of knobs are gone through
WIDTH = ORDER + 1
PART = {part: SPENT.start + number for number, part in enumerate(PARTS)}


def _lanes_by_part(what: str) -> tuple[slice, slice, int]:
    """The lanes whose parts are of one nature, those parts, and how many kinds of work each part has: part by part."""
    lanes = [number for number, (part, _) in enumerate(LANES) if part[0] == what]
    parts = [number for number, part in enumerate(PARTS) if part[0] == what]
    whole = slice(lanes[0], lanes[-1] + 1), slice(parts[0], parts[-1] + 1)
    assert lanes == [*range(len(LANES))[whole[0]]] and parts == [*range(len(PARTS))[whole[1]]], "they lie together"
    return *whole, len(lanes) // len(parts)


_SPANS = [_lanes_by_part(what) for what in dict.fromkeys(part[0] for part in PARTS)]
_ADDS_UP = np.array([[float(what in (BUSY, EXPOSED)), float(what == AHEAD)] for what, *_ in PARTS])


def adds_up(parts: Any, layers: int) -> Any:
    """Seconds that no step with these parts (… × part) is faster than: of its time, what adds up."""
    computed, ahead = _ADDS_UP.T
    return parts @ (computed + ahead / layers)


@dataclass(frozen=True)
class Clock:
    """How a branch's work becomes seconds; one, or the clocks of several branches one above the other.

    Attributes:
        known: whether the card's rates are known; else these are nominal ones, which rank and are never shown.
        seconds: seconds that a unit of each lane adds to its part.
    """

    known: Any
    layers: int
    seconds: Values

    @classmethod
    def of(cls, trunk: Configuration, gpu: HardwareProfile, constants: Calibration, *, known: bool) -> Clock:
        """The clock of a branch on a card."""
        rates = rates_for(trunk, gpu, constants).likely if known else NOMINAL
        seconds = [1 / rate if (rate := rates[kind]) else 0.0 for _, kind in LANES]
        return cls(known, trunk.letters["L"], np.array(seconds))

    @cached_property
    def key(self) -> bytes:
        """What tells clocks of one card apart."""
        return self.seconds.tobytes()

    def columns(self, table: Values) -> Values:
        """The columns of a table (row × column) with seconds in place of work, and nothing counted yet."""
        found = np.zeros((len(table), WIDTH))
        found[:, BYTES] = table[:, BYTES]
        work, spent = table[:, WORK] * self.seconds, found[:, SPENT]
        for lanes, parts, kinds in _SPANS:
            of_parts = work[:, lanes].reshape(len(table), -1, kinds)
            several = of_parts[:, :, 0].copy()
            for number in range(1, kinds):
                several += of_parts[:, :, number]
            spent[:, parts] = several
        return found


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
    known: bool = True  # whether time is; else limits of time say nothing

    @classmethod
    def of(cls, limits: Limits, *, known: bool) -> Caps:
        """The limits; time has none where it is not known."""
        seconds = limits.step_seconds if known else float("inf")
        return cls(limits.gpu_bytes, limits.host_bytes, limits.disk_bytes, seconds, known=known)

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
        """Weigh sums: … × column."""
        high, host = self._high_and_host(sums)
        columns = np.ascontiguousarray(np.moveaxis(sums, -1, 0))  # each is read as a whole, most of them several times
        parts = {part: columns[column] for part, column in PART.items()}
        seconds = sum(phase_seconds(phase, clock.layers, parts) for phase in TIMED) * self.accumulation
        return Weights(high, host, sums[..., DISK], seconds, sums[..., INEXACT], sums[..., ORDER], clock.known)

    def has_room(self, sums: Values, limits: Limits) -> Any:
        """Whether card, host and disk allow sums, of which the columns of bytes will do: … × column."""
        high, host = self._high_and_host(sums)
        return (high <= limits.gpu_bytes) & (host <= limits.host_bytes) & (sums[..., DISK] <= limits.disk_bytes)

    def _high_and_host(self, sums: Values) -> tuple[Any, Any]:
        kind = self.gpu.kind
        expected = sums[..., CARD].max(axis=-1).astype(np.int64)
        high = expected + self.constants.reserve_bytes(expected, kind)
        # With the CPU alone there is one memory: what the card would hold lies in the host too.
        process = self.constants.host_process_bytes(kind) + (high if kind == "cpu" else 0)
        return high, sums[..., HOST].max(axis=-1).astype(np.int64) + process

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


ROUNDED = 1 + 1e-12
"""A share times its limit is not to the digit what the share was taken of."""
CAPPED = ("high", "host", "disk", "seconds", "inexact", "order")
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
        lowered = caps.lowered(**{name: value * most * ROUNDED for name, most in _sizes(limits).items()})
        return lowered.lowered(seconds=value * limits.step_seconds * ROUNDED) if caps.known else lowered

    return Measure(of, frozenset({"high", "host", "disk", "seconds"}), below)


def beyond(limits: Limits) -> Key:
    """The share that is taken of each limit, where that is more than there is: of the card, host, disk, and of time."""

    def beyond_one(name: str, most: float) -> Measure:
        def of(weights: Weights) -> Any:
            taken = np.maximum(getattr(weights, name) / most, 1.0)
            return np.where(weights.known, taken, 1.0) if name == "seconds" else taken

        def below(caps: Caps, value: float) -> Caps:
            return caps if name == "seconds" and not caps.known else caps.lowered(**{name: value * most * ROUNDED})

        return Measure(of, frozenset({name}), below)

    return tuple(beyond_one(name, most) for name, most in (*_sizes(limits).items(), ("seconds", limits.step_seconds)))


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
