"""The smallest changes that would make a refused plan fit: each is planned, and told with what it comes to."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from planner.errors import PlanError
from planner.evaluate import Candidates, Limits, Outcome
from planner.optimizations.base import Scalar
from planner.solver import Search, chosen
from planner.units import format_bytes, format_count, format_seconds
from planner.weighing import CARD_MEMORY, DISK_SPACE, HOST_MEMORY, INEXACT_COUNT, SECONDS, Weights

RANKS = 8  # that are looked at together; all places at every one of them have to be in memory
Owners = Mapping[str, Mapping[str, Scalar]]


@dataclass(frozen=True)
class Pins:
    """What a user insists on, beside the length: optimisations that are to be on or off, and values of knobs."""

    required: tuple[str, ...] = ()
    excluded: tuple[str, ...] = ()
    knobs: Owners = field(default_factory=dict)

    @property
    def options(self) -> tuple[str, ...]:
        """Each pin as an option; the rank, which is told of by itself, is none of them."""
        knobs = ((owner, knob, value) for owner, values in self.knobs.items() for knob, value in values.items())
        return (
            *(f"--with {name}" for name in self.required),
            *(f"--without {name}" for name in self.excluded),
            *(f"--set {owner}.{knob}={value}" for owner, knob, value in knobs if owner != "lora"),
        )

    def without(self, options: Collection[str]) -> Pins:
        """The others."""
        knobs = {
            owner: {knob: held for knob, held in values.items() if f"--set {owner}.{knob}={held}" not in options}
            for owner, values in self.knobs.items()
        }
        return Pins(
            tuple(name for name in self.required if f"--with {name}" not in options),
            tuple(name for name in self.excluded if f"--without {name}" not in options),
            {owner: values for owner, values in knobs.items() if values},
        )


Replanned = Callable[[Pins], Search]
WithDisk = Callable[[], Search | None]


def suggestions(found: Search, limits: Limits, pins: Pins, replanned: Replanned, with_disk: WithDisk) -> list[str]:
    """What would make it fit, nearest first.

    Args:
        replanned: searches the same length with other pins.
        with_disk: searches it with as much disk as it takes; None where nothing makes use of one.
    """
    want = found.wanted[found.index]
    rank = f"--set lora.rank={want.rank} "
    lines = []
    if found.longest_with_target and found.longest_with_target > want.target:
        lines.append(
            f"--context {found.longest_with_target} {rank}--set train.target={want.target} fits: the longest at rank "
            f"{want.rank} with {format_count(want.target)} trained tokens"
        )
    elif found.longest_all_trained:
        lines.append(
            f"--context {found.longest_all_trained} {rank}fits: the longest at rank {want.rank}, every token trained"
        )
    lines += [*_smaller_rank(found, limits), *_smaller_batch(found, limits), *_fewer_pins(pins, limits, replanned)]
    return [*lines, *_disk(found, limits, with_disk), *_more(found, limits)]


def _smaller_rank(found: Search, limits: Limits) -> Iterator[str]:
    """The largest rank that fits; memory grows with it, so it is bracketed as the longest sequence is."""
    want, least, most, fitting = found.wanted[found.index], 1, found.wanted[found.index].rank - 1, 0
    while least <= most:
        ranks = np.unique(np.linspace(least, most, RANKS).astype(np.int64))
        at = Candidates(
            np.full_like(ranks, want.total), np.full_like(ranks, want.target), ranks, found.candidates.batch
        )
        last = found.on_card.last_of_growing(at, limits)
        if last is None:
            break
        fitting, least = int(ranks[last]), int(ranks[last]) + 1
        most = int(ranks[last + 1]) - 1 if last + 1 < len(ranks) else 0
    if fitting:
        total, target, rank = (np.array([size]) for size in (want.total, want.target, fitting))
        one = Candidates(total, target, rank, found.candidates.batch)
        yield f"--set lora.rank={fitting} fits: the largest rank that does; {_effect(found, one, 0, limits)}"


def _smaller_batch(found: Search, limits: Limits) -> Iterator[str]:
    """The largest micro-batch that fits."""
    at, least, most = found.candidates, 0, found.candidates.batch
    while most - least > 1:  # the largest known to fit, the smallest known not to
        middle = (least + most) // 2
        fits = found.on_card.at(replace(at, batch=middle), found.index).fits(limits, None)
        least, most = (middle, most) if fits else (least, middle)
    if least:
        effect = _effect(found, replace(at, batch=least), found.index, limits)
        yield f"--set train.batch={least} fits: the most sequences at once that do; {effect}"


def _effect(found: Search, at: Candidates, index: int, limits: Limits) -> str:
    """What is chosen there comes to."""
    best = chosen(found.on_card, at, index, found.objective, found.situation, limits)
    return _comes_to(best, index, limits)


def _comes_to(best: Outcome, index: int, limits: Limits) -> str:
    estimate = best.time.estimate
    step = "" if estimate is None else f", a step takes about {format_seconds(float(estimate[index]))}"
    return (
        f"{format_bytes(int(best.high[index]))} of {format_bytes(limits.gpu_bytes)} on the card, "
        f"{format_bytes(int(best.host[index]))} of {format_bytes(limits.host_bytes)} of host RAM{step}"
    )


def _fewer_pins(pins: Pins, limits: Limits, replanned: Replanned) -> Iterator[str]:
    """Each pin that alone stands in the way; where none does, some that do together, none of them for nothing."""
    everything = pins.options

    def fits(left_out: Collection[str]) -> bool:
        try:
            return bool(replanned(pins.without(left_out)).best.fits[0])
        except PlanError:  # what is left contradicts itself: a knob of what is on only where it is asked for
            return False

    if not everything or not fits(everything):
        return
    alone: list[tuple[str, ...]] = [(pin,) for pin in everything if fits((pin,))]
    together = everything
    for pin in everything if not alone else ():
        fewer = tuple(other for other in together if other != pin)
        together = fewer if fits(fewer) else together
    for left_out in alone or [together]:
        best = replanned(pins.without(left_out)).best
        yield f"leaving out {' '.join(left_out)} fits: {_comes_to(best, 0, limits)}"


def _disk(found: Search, limits: Limits, with_disk: WithDisk) -> Iterator[str]:
    """The least disk that is enough by itself."""
    if found.situation.gpu.kind == "cpu":
        return  # nothing is streamed where card and host are one
    endless = with_disk()
    least = (
        None if endless is None else endless.least(DISK_SPACE, INEXACT_COUNT, limits=replace(limits, disk_bytes=2**62))
    )
    if least is not None and least.disk > limits.disk_bytes:
        size = -(-int(least.disk) // 2**30)
        changed = "with settings that change the result, " if least.inexact else ""
        yield f"--disk {size}GiB fits: {changed}layer inputs lie on it while it trains, written anew in every step"


@dataclass(frozen=True)
class Need:
    """What a set of optimisations needs beyond the limits: bytes on the card, in the host, on disk, seconds a step.

    Where card and host are one memory, it is the card that lacks bytes.
    """

    card: int
    host: int
    seconds: float
    disk: int = 0
    shared: bool = False

    @classmethod
    def of(cls, card: int, host: int, disk: int, seconds: float, *, shared: bool) -> Need:
        """From what is taken beyond each limit; less than nothing where there is room."""
        if shared:  # one memory holds everything, the process itself included
            return cls(max(0, host), 0, max(0.0, seconds), max(0, disk), shared=True)
        return cls(max(0, card), max(0, host), max(0.0, seconds), max(0, disk))


def _more(found: Search, limits: Limits) -> list[str]:
    """For each limit what it alone would have to be; where no one limit is enough, the least change of several."""
    shared = found.situation.gpu.kind == "cpu"
    memory = {"gpu_bytes": 2**62, "host_bytes": 2**62}
    alone = (
        (HOST_MEMORY, {} if shared else {"host_bytes": 2**62}),
        (SECONDS, {"step_seconds": float("inf")}),
        (HOST_MEMORY if shared else CARD_MEMORY, memory if shared else {"gpu_bytes": 2**62}),
    )
    within = (found.least(key, limits=replace(limits, **freed)) for key, freed in alone if freed)
    needs = [_beyond(weights, limits, shared=shared) for weights in within if weights is not None]
    return [_told(need, limits) for need in needs or [needed(found.best, limits, found.index, shared=shared)]]


def _beyond(weights: Weights, limits: Limits, *, shared: bool) -> Need:
    late = float(weights.seconds) - limits.step_seconds if weights.known else 0.0
    card, host = int(weights.high) - limits.gpu_bytes, int(weights.host) - limits.host_bytes
    return Need.of(card, host, int(weights.disk) - limits.disk_bytes, late, shared=shared)


def needed(outcome: Outcome, limits: Limits, index: int, *, shared: bool) -> Need:
    """What an outcome needs beyond the limits; ``shared``: card and host are one memory."""
    card, host = int(outcome.high[index]) - limits.gpu_bytes, int(outcome.host[index]) - limits.host_bytes
    slow = 0.0 if outcome.time.estimate is None else float(outcome.time.estimate[index]) - limits.step_seconds
    return Need.of(card, host, int(outcome.disk[index]) - limits.disk_bytes, slow, shared=shared)


def _told(need: Need, limits: Limits) -> str:
    parts, values = [], []
    if need.host:
        parts.append(f"--host-ram {-(-(limits.host_bytes + need.host) // 2**30)}GiB")
        values.append(f"{format_bytes(need.host)} more host RAM")
    if need.disk:
        parts.append(f"--disk {-(-(limits.disk_bytes + need.disk) // 2**30)}GiB")
        values.append(f"{format_bytes(need.disk)} more disk")
    if need.seconds:
        seconds = limits.step_seconds + need.seconds
        parts.append(f"--max-step-time {int(seconds * 1.01) + 1}s")
        values.append(f"a step takes about {format_seconds(seconds)}")
    if need.card:
        more = f"{format_bytes(need.card)} more memory" + ("" if need.shared else " on the card")
        return f"{more} would fit" + (f", with {' '.join(parts)}" if parts else "")
    return f"{' '.join(parts)} fits: {', '.join(values)}"
