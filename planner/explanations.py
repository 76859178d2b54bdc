"""Why each optimisation is on or off, and what would make a plan fit; every figure is computed, none is a phrase."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from planner.evaluate import Limits, Outcome
from planner.optimizations import all_optimizations
from planner.solver import Objective, Search
from planner.units import format_bytes, format_count, format_seconds
from planner.weighing import CARD_BYTES, HOST_BYTES, SECONDS, Weights


def reasons_for_choices(found: Search, limits: Limits, objective: Objective, required: Sequence[str]) -> dict[str, str]:
    """For each optimisation that is on, what would be lost without it."""
    return {name: _why_on(name, found, limits, objective, required) for name in found.best.ids}


def _why_on(name: str, found: Search, limits: Limits, objective: Objective, required: Sequence[str]) -> str:
    if name in required:
        return "asked for by --with"
    best, index = found.best, found.index
    on_card, in_host = (found.least(measure, wish=(name, False)) for measure in (CARD_BYTES, HOST_BYTES))
    if on_card is None or in_host is None:
        if all_optimizations()[name].free:
            return _why_free(found.without(name), best, limits, index)
        return "nothing would be trained without it"
    other = found.best_among(objective, name, False)
    if other is None:
        if (reached := found.reached(name, False)) is not None:
            want = found.wanted[reached]
            return f"without it tier {want.tier} ({format_count(want.total)} tokens) is the longest that fits"
        return _missing(int(on_card.high), int(in_host.host), limits)
    faster = float(best.time.rank[index])
    if other.seconds > 1.005 * faster:
        return f"fastest: without it a step takes {other.seconds / faster:.2f} times as long"
    saved = other.high - int(best.high[index])
    if saved > 0:
        return f"costs no time and saves {format_bytes(saved)}"
    return "changes the result less than what would stand in its place"


def _why_free(other: Outcome | None, best: Outcome, limits: Limits, index: int) -> str:
    if other is None:
        return "costs nothing"
    if not bool(other.fits[index]) and bool(best.fits[index]):
        return f"costs nothing, and {_missing(int(other.high[index]), int(other.host[index]), limits)}"
    return f"costs nothing and saves {format_bytes(max(0, int(other.high[index]) - int(best.high[index])))}"


def _missing(high: int, host: int, limits: Limits) -> str:
    """What is lacking where these are the least that is needed of card and host."""
    if high > limits.gpu_bytes:
        return f"without it the card would lack {format_bytes(high - limits.gpu_bytes)}"
    if host > limits.host_bytes:
        return f"without it the host would lack {format_bytes(host - limits.host_bytes)}"
    return "without it no set keeps within card, host and time together"


def reasons_for_rejections(
    found: Search, limits: Limits, objective: Objective, excluded: Sequence[str]
) -> dict[str, tuple[str, ...]]:
    """For each optimisation that is off, why: it cannot be used here, or what it would cost for nothing."""
    reasons: dict[str, tuple[str, ...]] = {}
    for name, optimization in all_optimizations().items():
        if name in found.best.ids:
            continue
        if name in excluded:
            reasons[name] = ("switched off by --without",)
        elif unmet := optimization.reasons(found.situation):
            reasons[name] = unmet
        else:
            reasons[name] = (_why_off(name, found, limits, objective),)
    return reasons


def _why_off(name: str, found: Search, limits: Limits, objective: Objective) -> str:
    best, index = found.best, found.index
    optimization = all_optimizations()[name]
    if name not in found.space.names:
        return "cannot stand beside what is pinned"
    other = found.best_among(objective, name, True)
    if other is None:
        return "does not fit with it"
    parts = []
    chosen = float(best.time.rank[index])
    if other.seconds > 1.005 * chosen:
        parts.append(f"a step would take {other.seconds / chosen:.2f} times as long")
    if not optimization.exact:
        parts.append(optimization.effect)
    saved = int(best.high[index]) - other.high
    if saved > 0:
        parts.append(f"it would save {format_bytes(saved)}")
    return "not needed: " + "; ".join(parts) if parts else "not needed: the plan fits as it is, and it brings nothing"


def suggestions(found: Search, limits: Limits, required: Sequence[str], excluded: Sequence[str]) -> list[str]:
    """What would make it fit, nearest first; each is computed."""
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
    lines += _more(found, limits)
    if required or excluded:
        lines.append("without the --with and --without given, more sets are free to choose from")
    return lines


@dataclass(frozen=True)
class Need:
    """What one set of optimisations needs beyond the limits: bytes on the card, bytes in the host, seconds a step.

    Where card and host are one memory, it is the card that lacks bytes.
    """

    card: int
    host: int
    seconds: float
    shared: bool = False

    @classmethod
    def of(cls, card: int, host: int, seconds: float, *, shared: bool) -> Need:
        """From what is taken beyond each limit; less than nothing where there is room."""
        if shared:  # one memory holds everything, the process itself included
            return cls(max(0, host), 0, max(0.0, seconds), shared=True)
        return cls(max(0, card), max(0, host), max(0.0, seconds))


def _more(found: Search, limits: Limits) -> list[str]:
    """For each limit what it alone would have to be; where no one limit is enough, the least change of several."""
    shared = found.situation.gpu.kind == "cpu"
    memory = {"gpu_bytes": 2**62, "host_bytes": 2**62}
    alone = (
        (HOST_BYTES, {} if shared else {"host_bytes": 2**62}),
        (SECONDS, {"step_seconds": float("inf")}),
        (HOST_BYTES if shared else CARD_BYTES, memory if shared else {"gpu_bytes": 2**62}),
    )
    within = (found.least(key, replace(limits, **freed)) for key, freed in alone if freed)
    needs = [_beyond(weights, limits, shared=shared) for weights in within if weights is not None]
    return [_told(need, limits) for need in needs or [needed(found.best, limits, found.index, shared=shared)]]


def _beyond(weights: Weights, limits: Limits, *, shared: bool) -> Need:
    late = float(weights.seconds) - limits.step_seconds if weights.known else 0.0
    return Need.of(int(weights.high) - limits.gpu_bytes, int(weights.host) - limits.host_bytes, late, shared=shared)


def needed(outcome: Outcome, limits: Limits, index: int, *, shared: bool) -> Need:
    """What an outcome needs beyond the limits; ``shared``: card and host are one memory."""
    card, host = int(outcome.high[index]) - limits.gpu_bytes, int(outcome.host[index]) - limits.host_bytes
    slow = 0.0 if outcome.time.estimate is None else float(outcome.time.estimate[index]) - limits.step_seconds
    return Need.of(card, host, slow, shared=shared)


def _told(need: Need, limits: Limits) -> str:
    parts, values = [], []
    if need.host:
        parts.append(f"--host-ram {-(-(limits.host_bytes + need.host) // 2**30)}GiB")
        values.append(f"{format_bytes(need.host)} more host RAM")
    if need.seconds:
        seconds = limits.step_seconds + need.seconds
        parts.append(f"--max-step-time {int(seconds * 1.01) + 1}s")
        values.append(f"a step takes about {format_seconds(seconds)}")
    if need.card:
        more = f"{format_bytes(need.card)} more memory" + ("" if need.shared else " on the card")
        return f"{more} would fit" + (f", with {' '.join(parts)}" if parts else "")
    return f"{' '.join(parts)} fits: {', '.join(values)}"
