"""Complete search: every valid set of optimisations at every candidate, evaluated with numpy, none left out.

Sets are few (claims prune them), candidates are arrays, and a configuration's formulas are evaluated once for all
of its candidates; so the search needs no heuristic and can say of every loser why it lost.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, combinations
from typing import Any, Literal

import numpy as np

from planner.calibration import Calibration
from planner.compose import Configuration, compose, problems
from planner.errors import PlanError, raise_all
from planner.evaluate import Candidates, Evaluator, Limits, Outcome
from planner.ledger import Device, Phase
from planner.optimizations import all_optimizations
from planner.optimizations.base import Scalar, Situation

Objective = Literal["context", "speed", "memory"]
COARSEST, FINEST = 64, 64  # tokens: the least sequence that is looked at, and the step of the longest


def valid_sets(situation: Situation, required: Sequence[str], excluded: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """Every valid set that trains something, holds what is required and lacks what is excluded.

    What is free is in all of them: a set without it is never better (``tests/test_solver.py`` proves it).
    """
    known = all_optimizations()
    usable = [name for name in known if name not in excluded and not known[name].reasons(situation)]
    certain = {
        *required,
        *(n for n in usable if known[n].is_free(situation) and _undisputed(n, usable, required, situation)),
    }
    free = [name for name in usable if name not in certain]
    for extra in chain.from_iterable(combinations(free, size) for size in range(len(free) + 1)):
        ids = tuple(sorted({*certain, *extra}))
        if any("adapters/weights" in known[name].makes for name in ids) and not problems(ids, situation):
            yield ids


def _undisputed(name: str, usable: Sequence[str], required: Sequence[str], situation: Situation) -> bool:
    """Whether nothing else lays claim to what a free optimisation does, and it stands beside what is required."""
    known = all_optimizations()
    names = known[name].claims | known[name].makes
    rivals = any(names & (known[other].claims | known[other].makes) for other in usable if other != name)
    return not rivals and name not in problems({*required, name}, situation)


def configurations(
    ids: tuple[str, ...], knobs: Mapping[str, Mapping[str, Scalar]], situation: Situation
) -> Iterator[Configuration]:
    """The configurations of a valid set: one for each combination of the knobs that bound memory at a price."""
    known = all_optimizations()
    situation = replace(situation, chosen=frozenset(ids))
    for name in ids:
        for knob in known[name].knobs:
            pinned = knobs.get(name, {}).get(knob.name)
            if pinned is not None and knob.low is None and pinned not in knob.choices(situation):
                return  # what the user pins is not to be had in this set
    options: list[tuple[str, str, tuple[Scalar, ...]]] = [
        (name, knob.name, knob.choices(situation))
        for name in ids
        for knob in known[name].knobs
        if knob.letter and knob.letter != "R" and knob.name not in knobs.get(name, {})
    ]
    combos: list[dict[str, dict[str, Scalar]]] = [{}]
    for name, knob_name, choices in options:
        combos = [{**combo, name: {**combo.get(name, {}), knob_name: value}} for combo in combos for value in choices]
    # A knob with a letter does no more than give the letter its value, so one composition serves all of them.
    first = compose(ids, knobs, situation)
    for combo in combos:
        letters = {
            knob.letter: int(values[knob.name])
            for name, values in combo.items()
            for knob in known[name].knobs
            if knob.name in values
        }
        chosen = {name: {**first.knobs[name], **combo.get(name, {})} for name in first.ids}
        yield replace(first, knobs=chosen, letters={**first.letters, **letters})


def cost(outcome: Outcome, index: int, objective: Objective) -> tuple[float, ...]:
    """What to choose by among configurations that fit, smallest first.

    Time first (three digits of it), then how many optimisations change the result, then memory; for the objective
    ``memory`` memory comes before all.
    """
    known = all_optimizations()
    ids = outcome.configuration.ids
    seconds = float(f"{float(outcome.time.rank[index]):.3g}")
    rounding = sum(not known[name].exact for name in ids)
    memory = float(outcome.high[index])
    return (memory, seconds, rounding) if objective == "memory" else (seconds, rounding, memory)


def longest(
    found: Sequence[Configuration],
    situation: Situation,
    limits: Limits,
    constants: Calibration,
    *,
    rank: int,
    target: int | None,
    batch: int = 1,
    least: int = COARSEST,
) -> int | None:
    """The longest sequence any of the configurations can train; None where not even ``least`` tokens fit.

    Memory and time grow with the sequence, so the answer is bracketed on a grid that is refined around it.

    Args:
        target: trained tokens, or None where every token is trained.
    """
    low, high, remaining = max(least, COARSEST), 2**24, list(found)
    best: int | None = None
    while True:
        steps = np.geomspace(low, high, 33).astype(np.int64) // FINEST * FINEST
        grid = np.array(sorted({int(total) for total in steps if total >= COARSEST} | {low}))
        targets = grid if target is None else np.minimum(grid, target)
        evaluate = Evaluator(Candidates(grid, targets, np.full_like(grid, rank), batch), situation, constants, limits)
        fits = [evaluate(configuration).fits for configuration in remaining]
        together = np.logical_or.reduce(fits)
        if not together.any():
            return best
        last = int(np.flatnonzero(together)[-1])
        best = int(grid[last])
        if last == len(grid) - 1 or grid[last + 1] - grid[last] <= FINEST:
            return best
        # What does not fit here does not fit further on.
        remaining = [configuration for configuration, ok in zip(remaining, fits, strict=True) if ok[last]]
        low, high = best, int(grid[last + 1])


@dataclass(frozen=True)
class Wanted:
    """One length that a plan is wanted for; ``tier`` is None where it is no tier."""

    tier: int | None
    total: int
    target: int
    rank: int


@dataclass(frozen=True)
class Search:
    """Everything a search found: each configuration at each wanted length, and the one chosen.

    ``best`` at ``index`` fits, unless nothing fits at any wanted length; then it is what comes nearest there.
    """

    wanted: tuple[Wanted, ...]
    candidates: Candidates
    outcomes: tuple[Outcome, ...]
    best: Outcome
    index: int
    longest_with_target: int | None
    longest_all_trained: int | None
    situation: Situation
    constants: Calibration
    limits: Limits

    def phases(self, devices: Sequence[Device]) -> dict[Phase, dict[str, int]]:
        """Bytes of the chosen configuration: each term alive in each phase on the devices, none that is empty."""
        want = self.wanted[self.index]
        total, target, rank = (np.array([size]) for size in (want.total, want.target, want.rank))
        one = Candidates(total, target, rank, self.candidates.batch)
        letters = Evaluator(one, self.situation, self.constants, self.limits).letters(self.best.configuration)
        by_phase = self.best.configuration.ledger.by_phase(letters, devices)
        return {
            phase: {name: int(np.ravel(size)[0]) for name, size in terms.items() if np.any(size)}
            for phase, terms in by_phase.items()
        }

    def without(self, name: str) -> Outcome | None:
        """The chosen configuration with one optimisation taken out; None where that is no valid set."""
        ids = [other for other in self.best.configuration.ids if other != name]
        if not ids or problems(ids, self.situation):
            return None
        configuration = compose(ids, self.best.configuration.knobs, self.situation)
        return Evaluator(self.candidates, self.situation, self.constants, self.limits)(configuration)

    def best_among(self, objective: Objective, wants: Callable[[Outcome], bool], index: int) -> Outcome | None:
        """The best configuration that fits one wanted length and meets a wish; None where there is none."""
        fitting = [o for o in self.outcomes if wants(o) and bool(o.fits[index])]
        return min(fitting, key=lambda outcome: cost(outcome, index, objective), default=None)


def search(
    situation: Situation,
    limits: Limits,
    constants: Calibration,
    wanted: Sequence[Wanted],
    *,
    objective: Objective,
    required: Sequence[str] = (),
    excluded: Sequence[str] = (),
    knobs: Mapping[str, Mapping[str, Scalar]] | None = None,
    batch: int = 1,
) -> Search:
    """Search every valid set at every wanted length; the last length that fits wins.

    Raises:
        PlanError: no valid set holds what is required and lacks what is excluded.
    """
    candidates = Candidates(
        np.array([want.total for want in wanted]),
        np.array([want.target for want in wanted]),
        np.array([want.rank for want in wanted]),
        batch,
    )
    found = [
        configuration
        for ids in valid_sets(situation, required, excluded)
        for configuration in configurations(ids, knobs or {}, situation)
    ]
    if not found:
        asked = " ".join([*(f"--with {name}" for name in required), *(f"--without {name}" for name in excluded)])
        why = _why_no_set(situation, required, excluded)
        raise PlanError(asked or "a plan", why, "`plan optimizations` says what each needs.")
    raise_all(_never_used(knobs or {}, found, situation))
    evaluate = Evaluator(candidates, situation, constants, limits)
    outcomes = tuple(evaluate(configuration) for configuration in found)
    best, index = None, 0
    for index in reversed(range(len(wanted))):
        fitting = [outcome for outcome in outcomes if bool(outcome.fits[index])]
        if fitting:
            best = _first_like(min(fitting, key=lambda outcome: cost(outcome, index, objective)), fitting, objective)
            break
    if best is None:
        index = 0
        best = min(outcomes, key=lambda outcome: _excess(outcome, limits, 0))
    want = wanted[index]

    def reach(target: int | None) -> int | None:
        # What fits a longer sequence fits this one too; only where that finds nothing are all sets looked at.
        fitting = [outcome.configuration for outcome in outcomes if bool(outcome.fits[index])]
        arguments: dict[str, Any] = {"rank": want.rank, "target": target, "batch": batch}
        here = longest(fitting, situation, limits, constants, **arguments, least=want.total) if fitting else None
        return here or longest(found, situation, limits, constants, **arguments)

    return Search(
        wanted=tuple(wanted),
        candidates=candidates,
        outcomes=outcomes,
        best=best,
        index=index,
        longest_with_target=reach(want.target),
        longest_all_trained=reach(None),
        situation=situation,
        constants=constants,
        limits=limits,
    )


def _why_no_set(situation: Situation, required: Sequence[str], excluded: Sequence[str]) -> str:
    """Why nothing is left to choose from: nothing trains, or what is required lacks something."""
    known = all_optimizations()
    trainers = [name for name, each in known.items() if "adapters/weights" in each.makes]
    able = [name for name in trainers if name not in excluded]
    if not able:
        return f"nothing would be trained: {' or '.join(trainers)} makes the adapters."
    if unable := [reason for name in able for reason in known[name].reasons(situation)]:
        return f"nothing can be trained: {'; '.join(unable)}."
    lacking = problems({*required, able[0]}, situation)
    told = [f"{name}: {reason}" for name, reasons in lacking.items() for reason in reasons]
    if told:
        return f"no valid set of optimisations is left. {'; '.join(told)}."
    return "no valid set of optimisations is left that has the knobs as they were set."


def _never_used(
    knobs: Mapping[str, Mapping[str, Scalar]], found: Sequence[Configuration], situation: Situation
) -> list[PlanError]:
    """Knobs set of an optimisation that no set holds with them; none of one that cannot be used here at all."""
    known, used = all_optimizations(), {name for configuration in found for name in configuration.ids}
    lost = [(owner, values) for owner, values in knobs.items() if owner not in used]
    return [
        PlanError(
            " ".join(f"--set {owner}.{name}={value}" for name, value in values.items()),
            f"no set of optimisations that is left has {owner} with it.",
            f"`plan explain {owner}` says what it needs.",
        )
        for owner, values in lost
        if not known[owner].reasons(situation)
    ]


def _first_like(best: Outcome, fitting: Sequence[Outcome], objective: Objective) -> Outcome:
    """The same set with the knobs it names first, as long as it fits: knobs are ordered best first."""
    if objective == "memory":
        return best
    return next(outcome for outcome in fitting if outcome.configuration.ids == best.configuration.ids)


def _excess(outcome: Outcome, limits: Limits, index: int) -> float:
    """By how much a configuration misses the limits, as the largest share of any of them."""
    shares = [outcome.high[index] / max(1, limits.gpu_bytes), outcome.host[index] / max(1, limits.host_bytes)]
    if outcome.time.estimate is not None:
        shares.append(outcome.time.estimate[index] / limits.step_seconds)
    return float(max(shares))
