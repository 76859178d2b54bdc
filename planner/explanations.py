"""Why each optimisation is on or off, and what would make a plan fit; every figure is computed, none is a phrase."""

from __future__ import annotations

from collections.abc import Sequence

from planner.optimizations import all_optimizations
from planner.solver import Limits, Objective, Outcome, Search
from planner.units import format_bytes, format_count, format_seconds


def reasons_for_choices(found: Search, limits: Limits, objective: Objective, required: Sequence[str]) -> dict[str, str]:
    """For each optimisation that is on, what would be lost without it."""
    return {name: _why_on(name, found, limits, objective, required) for name in found.best.configuration.ids}


def _why_on(name: str, found: Search, limits: Limits, objective: Objective, required: Sequence[str]) -> str:
    if name in required:
        return "asked for by --with"
    best, index = found.best, found.index
    without = [outcome for outcome in found.outcomes if name not in outcome.configuration.ids]
    if not without and all_optimizations()[name].free:
        return _why_free(found.without(name), best, limits, index)
    if not without:
        return "nothing would be trained without it"
    other = found.best_among(objective, lambda outcome: name not in outcome.configuration.ids, index)
    if other is None:
        reached = [i for i in range(index) if any(bool(outcome.fits[i]) for outcome in without)]
        if reached:
            want = found.wanted[reached[-1]]
            return f"without it tier {want.tier} ({format_count(want.total)} tokens) is the longest that fits"
        return _missing(without, limits, index)
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
        return f"costs nothing, and {_missing([other], limits, index)}"
    return f"costs nothing and saves {format_bytes(max(0, int(other.high[index]) - int(best.high[index])))}"


def _missing(without: Sequence[Outcome], limits: Limits, index: int) -> str:
    least = min(without, key=lambda outcome: int(outcome.high[index]))
    over = int(least.high[index]) - limits.gpu_bytes
    if over > 0:
        return f"without it the card would lack {format_bytes(over)}"
    least = min(without, key=lambda outcome: int(outcome.host[index]))
    over = int(least.host[index]) - limits.host_bytes
    if over > 0:
        return f"without it the host would lack {format_bytes(over)}"
    return "without it no set keeps within card, host and time together"


def reasons_for_rejections(
    found: Search, limits: Limits, objective: Objective, excluded: Sequence[str]
) -> dict[str, tuple[str, ...]]:
    """For each optimisation that is off, why: it cannot be used here, or what it would cost for nothing."""
    reasons: dict[str, tuple[str, ...]] = {}
    for name, optimization in all_optimizations().items():
        if name in found.best.configuration.ids:
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
    if not any(name in outcome.configuration.ids for outcome in found.outcomes):
        return "cannot stand beside what is pinned"
    other = found.best_among(objective, lambda outcome: name in outcome.configuration.ids, index)
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
    index, want = found.index, found.wanted[found.index]
    lines = []
    if found.longest_with_target and found.longest_with_target > want.target:
        lines.append(
            f"--context {found.longest_with_target} --set train.target={want.target} fits: the longest at rank "
            f"{want.rank} with {format_count(want.target)} trained tokens"
        )
    elif found.longest_all_trained:
        lines.append(
            f"--context {found.longest_all_trained} fits: the longest at rank {want.rank}, every token trained"
        )
    lines += [
        line for line in (_host(found, limits, index), _time(found, limits, index), _card(found, limits, index)) if line
    ]
    if required or excluded:
        lines.append("without the --with and --without given, more sets are free to choose from")
    return lines


def _within_card(found: Search, limits: Limits, index: int) -> list[Outcome]:
    return [outcome for outcome in found.outcomes if int(outcome.high[index]) <= limits.gpu_bytes]


def _slow(outcome: Outcome, limits: Limits, index: int) -> bool:
    return outcome.time.estimate is not None and float(outcome.time.estimate[index]) > limits.step_seconds


def _host(found: Search, limits: Limits, index: int) -> str:
    if found.situation.gpu.kind == "cpu":
        return ""
    enough = [outcome for outcome in _within_card(found, limits, index) if not _slow(outcome, limits, index)]
    if not enough:
        return ""
    need = min(int(outcome.host[index]) for outcome in enough)
    gibibytes = -(-need // 2**30)
    return (
        f"--host-ram {gibibytes}GiB fits: {format_bytes(need - limits.host_bytes)} more host RAM"
        if need > limits.host_bytes
        else ""
    )


def _time(found: Search, limits: Limits, index: int) -> str:
    enough = [o for o in _within_card(found, limits, index) if int(o.host[index]) <= limits.host_bytes]
    slow = [float(o.time.estimate[index]) for o in enough if _slow(o, limits, index)]
    if not slow or len(slow) < len(enough):
        return ""
    return f"--max-step-time {int(min(slow) * 1.01) + 1}s fits: a step takes about {format_seconds(min(slow))}"


def _card(found: Search, limits: Limits, index: int) -> str:
    if found.situation.gpu.kind == "cpu":
        # One memory holds everything, the process itself included.
        over = min(int(outcome.host[index]) for outcome in found.outcomes) - limits.host_bytes
        return f"{format_bytes(over)} more memory would fit" if over > 0 else ""
    over = min(int(outcome.high[index]) for outcome in found.outcomes) - limits.gpu_bytes
    return f"{format_bytes(over)} more memory on the card would fit" if over > 0 else ""
