"""Why each optimisation is on or off; every figure is computed, none is a phrase."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from planner.evaluate import Limits, Outcome
from planner.optimizations import all_optimizations
from planner.plan import ON_WHERE_ASKED
from planner.solver import Best, Objective, Search
from planner.units import format_bytes, format_count
from planner.weighing import CARD_MEMORY, HOST_MEMORY


def reasons_for_choices(found: Search, limits: Limits, objective: Objective, required: Sequence[str]) -> dict[str, str]:
    """For each optimisation that is on, what would be lost without it."""
    return {name: _why_on(name, found, limits, objective, required) for name in found.best.ids}


def _why_on(name: str, found: Search, limits: Limits, objective: Objective, required: Sequence[str]) -> str:
    if name in required:
        return "asked for by --with"
    best, index = found.best, found.index
    if all_optimizations()[name].last_resort and found.first is not None:
        return _why_resorted_to(found.first, best, limits, index)
    if not found.exists(name, False):
        if all_optimizations()[name].free:
            return _why_free(found.without(name), best, limits, index)
        return "nothing would be trained without it"
    other = found.best_among(objective, name, False)
    if other is None:
        if (reached := found.reached(name, False)) is not None:
            want = found.wanted[reached]
            return f"without it tier {want.tier} ({format_count(want.total)} tokens) is the longest that fits"
        on_card, in_host = (found.least(measure, wish=(name, False)) for measure in (CARD_MEMORY, HOST_MEMORY))
        assert on_card is not None and in_host is not None
        return _missing(int(on_card.high), int(in_host.host), limits)
    faster = float(best.time.rank[index])
    if other.seconds > 1.005 * faster:
        return f"fastest: without it a step takes {_times(other, best, index)}"
    saved = other.high - int(best.high[index])
    if saved > 0:
        return f"costs no time and saves {format_bytes(saved)}"
    return "changes the result less than what would stand in its place"


def _why_resorted_to(first: Search, best: Outcome, limits: Limits, index: int) -> str:
    there = replace(first, index=index)
    on_card, in_host = (there.least(measure) for measure in (CARD_MEMORY, HOST_MEMORY))
    assert on_card is not None and in_host is not None
    return _missing(int(on_card.high), int(in_host.host), limits)


def _why_free(other: Outcome | None, best: Outcome, limits: Limits, index: int) -> str:
    if other is None:
        return "costs nothing"
    if not bool(other.fits[index]) and bool(best.fits[index]):
        return f"costs nothing, and {_missing(int(other.high[index]), int(other.host[index]), limits)}"
    saved = int(other.high[index]) - int(best.high[index])
    return f"costs nothing and saves {format_bytes(saved)}" if saved > 0 else "costs nothing"


def _times(other: Best, best: Outcome, index: int) -> str:
    """How a step's time would change; no figure where a card's rates are unknown, and others rank in their place."""
    times = other.seconds / float(best.time.rank[index])
    if best.time.estimate is None:
        return f"{'longer' if times > 1 else 'less time'}, by the rates that rank where a card's are unknown"
    return f"{times:.2f} times as long"


def _missing(high: int, host: int, limits: Limits) -> str:
    """What is lacking where these are the least that is needed of card and host."""
    if high > limits.gpu_bytes:
        return f"without it the card would lack {format_bytes(high - limits.gpu_bytes)}"
    if host > limits.host_bytes:
        return f"without it the host would lack {format_bytes(host - limits.host_bytes)}"
    disk = ", disk" if limits.disk_bytes else ""
    return f"without it no set keeps within card, host{disk} and time together"


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
        elif optimization.last_resort and name not in found.space.names:
            reasons[name] = (
                f"a last resort: tried where {optimization.last_resort} lacks no more than this saves of the card",
            )
        elif optimization.asked:
            reasons[name] = (f"{ON_WHERE_ASKED}, by --with {name}: {optimization.effect}",)
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
        parts.append(f"a step would take {_times(other, best, index)}")
    elif objective == "context" and optimization.worth > 1 and other.seconds < 0.995 * chosen:
        times = _times(other, best, index)
        parts.append(f"a step would take {times}, which is too little for what it does to the result")
    if not optimization.exact:
        parts.append(optimization.effect)
    saved = int(best.high[index]) - other.high
    if saved > 0:
        parts.append(f"it would save {format_bytes(saved)}")
    return "not needed: " + "; ".join(parts) if parts else "not needed: the plan fits as it is, and it brings nothing"
