"""Which optimisations there are to choose from, which of them are on in every set, and what pins leave of the rest."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, combinations

from planner.compose import problems
from planner.optimizations import all_optimizations
from planner.optimizations.base import Optimization, Scalar, Situation

PinnedKnobs = Mapping[str, Mapping[str, Scalar]]


def usable(situation: Situation, required: Sequence[str], excluded: Sequence[str]) -> list[str]:
    """What the card and the model allow, and nobody has switched off; of some more only what is required.

    That is what has to be asked for, and what is a last resort.
    """
    known = all_optimizations()
    free = {name for name, each in known.items() if not each.asked and not each.last_resort}
    offered = [name for name in known if name not in excluded and (name in required or name in free)]
    return [name for name in offered if not known[name].reasons(situation)]


def last_resorts(situation: Situation, required: Sequence[str], excluded: Sequence[str]) -> list[str]:
    """What may be tried where nothing is lacking but what it can save."""
    known = all_optimizations()
    resorts = [name for name in known if known[name].last_resort and name not in (*required, *excluded)]
    return [name for name in resorts if not known[name].reasons(situation)]


def always_on(situation: Situation, allowed: Sequence[str], required: Sequence[str]) -> frozenset[str]:
    """What is required, and what is free: a set without that is never better (``tests/test_solver.py`` proves it)."""
    known = all_optimizations()
    free = [name for name in allowed if known[name].is_free(situation)]
    return frozenset({*required, *(name for name in free if _undisputed(name, allowed, required, situation))})


def valid_sets(situation: Situation, required: Sequence[str], excluded: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """Every valid set, one by one; what the search finds without (``planner.branches``) is held against it."""
    allowed = usable(situation, required, excluded)
    certain = always_on(situation, allowed, required)
    for extra in subsets([name for name in allowed if name not in certain]):
        ids = tuple(sorted({*certain, *extra}))
        if trains(ids) and not problems(ids, situation):
            yield ids


def largest_set(situation: Situation) -> tuple[str, ...]:
    """As many optimisations as can be on together; of several such sets the one that is found first.

    Of two that lay claim to the same, one or the other is left out; what then lacks what it needs is left out, too.
    """
    known, best = all_optimizations(), frozenset[str]()

    def look(ids: frozenset[str]) -> None:
        nonlocal best
        if len(ids) <= len(best):
            return
        pairs = combinations(sorted(ids), 2)
        rivals = next(((one, other) for one, other in pairs if _rivals(known[one], known[other])), ())
        for name in rivals:
            look(ids - {name})
        if rivals:
            return
        if broken := problems(ids, situation):
            look(ids - {*broken})
        else:
            best = ids

    look(frozenset(name for name, each in known.items() if not each.reasons(situation)))
    return tuple(sorted(best))


def _rivals(one: Optimization, other: Optimization) -> bool:
    return bool(one.claims & other.claims or one.makes & other.makes)


def subsets(names: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """Every subset, the smallest first."""
    return chain.from_iterable(combinations(names, size) for size in range(len(names) + 1))


def trains(ids: Sequence[str]) -> bool:
    """Whether a set makes adapters, without which nothing is trained."""
    known = all_optimizations()
    return any("adapters/weights" in known[name].makes for name in ids)


def _undisputed(name: str, allowed: Sequence[str], required: Sequence[str], situation: Situation) -> bool:
    """Whether nothing else lays claim to what a free optimisation does, and it stands beside what is required."""
    known = all_optimizations()
    names = known[name].claims | known[name].makes
    rivals = any(names & (known[other].claims | known[other].makes) for other in allowed if other != name)
    return not rivals and name not in problems({*required, name}, situation)


def has_pinned(ids: Sequence[str], knobs: PinnedKnobs, situation: Situation) -> bool:
    """Whether every choice by name that the user pins is to be had in this set."""
    if not knobs:
        return True
    known, inside = all_optimizations(), situation.choosing(ids)
    pinned = (
        (knob, knobs[name][knob.name])
        for name in ids
        for knob in known[name].knobs
        if name in knobs
        if knob.name in knobs[name]
    )
    return all(knob.may_be(value, inside) for knob, value in pinned)
