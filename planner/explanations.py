"""Why each optimisation is on or off, and what would make a plan fit; every figure is computed, none is a phrase."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from planner.evaluate import Limits, Outcome
from planner.optimizations import all_optimizations
from planner.solver import Objective, Search
from planner.units import format_bytes, format_count, format_seconds


def reasons_for_choices(found: Search, limits: Limits, objective: Objective, required: Sequence[str]) -> dict[str, str]:
    """For each optimisation that is on, what would be lost without it."""
    return {name: _why_on(name, found, limits, objective, required) for name in found.best.ids}


def _why_on(name: str, found: Search, limits: Limits, objective: Objective, required: Sequence[str]) -> str:
    if name in required:
        return "asked for by --with"
    best, index = found.best, found.index
    without = found.among(name, False)
    if not len(without.rows) and all_optimizations()[name].free:
        return _why_free(found.without(name), best, limits, index)
    if not len(without.rows):
        return "nothing would be trained without it"
    other = found.best_among(objective, name, False)
    if other is None:
        if (reached := without.reached(index)) is not None:
            want = found.wanted[reached]
            return f"without it tier {want.tier} ({format_count(want.total)} tokens) is the longest that fits"
        return _missing(without.least_high(index), without.least_host(index), limits)
    time, faster = float(other.time.rank[index]), float(best.time.rank[index])
    if time > 1.005 * faster:
        return f"fastest: without it a step takes {time / faster:.2f} times as long"
    saved = int(other.high[index]) - int(best.high[index])
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
        elif optimization.asked:
            reasons[name] = (f"on only where it is asked for, by --with {name}: {optimization.effect}",)
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
    time, chosen = float(other.time.rank[index]), float(best.time.rank[index])
    if time > 1.005 * chosen:
        parts.append(f"a step would take {time / chosen:.2f} times as long")
    if not optimization.exact:
        parts.append(optimization.effect)
    saved = int(best.high[index]) - int(other.high[index])
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
    lines += _more(found, limits, found.index)
    known = all_optimizations()
    for name in (name for name in required if known[name].asked):
        other = found.without(name)
        if other is not None and bool(other.fits[found.index]):
            lines.append(f"without {name} it fits")
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

    @property
    def short_of(self) -> tuple[str, ...]:
        return tuple(name for name in ("card", "host", "seconds") if getattr(self, name) > 0)


def _more(found: Search, limits: Limits, index: int) -> list[str]:
    """For each limit what it alone would have to be; where no one limit is enough, the least change of several."""
    needs = [needed(outcome, limits, index, shared=found.situation.gpu.kind == "cpu") for outcome in found.leading]
    alone = {
        name: min(
            (need for need in needs if need.short_of == (name,)), key=lambda need: getattr(need, name), default=None
        )
        for name in ("host", "seconds", "card")
    }
    if lines := [_told(need, limits) for need in alone.values() if need is not None]:
        return lines

    def excess(need: Need) -> float:
        shares = (need.card / max(1, limits.gpu_bytes), need.host / max(1, limits.host_bytes))
        return max(*shares, need.seconds / limits.step_seconds)

    return [_told(min(needs, key=excess), limits)]


def needed(outcome: Outcome, limits: Limits, index: int, *, shared: bool) -> Need:
    """What an outcome needs beyond the limits; ``shared``: card and host are one memory."""
    card, host = int(outcome.high[index]) - limits.gpu_bytes, int(outcome.host[index]) - limits.host_bytes
    slow = 0.0 if outcome.time.estimate is None else float(outcome.time.estimate[index]) - limits.step_seconds
    if shared:  # one memory holds everything, the process itself included
        return Need(max(0, host), 0, max(0.0, slow), shared=True)
    return Need(max(0, card), max(0, host), max(0.0, slow))


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
