"""The valid sets as a tree: a trunk for each set of hubs, and on it groups of leaves that add up.

A *hub* gives a letter or a setting its value, or makes what hubs need: formulas everywhere change with it, so sets of
hubs are gone through one by one. A *leaf* changes terms and work by name and nothing else. Beside given hubs, leaves
that touch nothing in common cannot see each other, so what each of them changes is added, whatever the others do:
bytes in a phase, FLOPs of a piece of work. Each group of leaves is then looked at once, and not once for each choice
of all others. That nobody sees more than it says is watched: the letters that formulas read, and the names that
requirements and knobs ask for in the set.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from planner.compose import Configuration, compose, problems
from planner.ledger import Formula, Ledger, Term, Work
from planner.optimizations import all_optimizations
from planner.optimizations.base import EVERY, Chosen, Needs, Situation
from planner.sets import PinnedKnobs, always_on, configurations, has_pinned, subsets, trains, usable
from planner.symbols import letters_of


@dataclass(frozen=True)
class Option:
    """Leaves of one group that are on together, and what they change on their trunk.

    ``gone`` and ``come`` are terms before and after; ``work`` is what the pieces of work become.
    """

    ids: tuple[str, ...]
    gone: tuple[Term, ...] = ()
    come: tuple[Term, ...] = ()
    work: Mapping[str, Work] = field(default_factory=dict)


@dataclass(frozen=True)
class Branch:
    """One set of hubs with each combination of its knobs' values, and the groups of leaves it can bear."""

    trunk: tuple[Configuration, ...]
    groups: tuple[tuple[Option, ...], ...]  # of each group the first option is none of its leaves

    @property
    def ids(self) -> tuple[str, ...]:
        """The hubs, and what is always on."""
        return self.trunk[0].ids


def branches(
    situation: Situation, required: Sequence[str], excluded: Sequence[str], knobs: PinnedKnobs
) -> tuple[Branch, ...]:
    """Every valid set that trains something, holds what is required and lacks what is excluded."""
    allowed = usable(situation, required, excluded)
    certain = always_on(situation, allowed, required)
    hubs = {*certain, *(name for name in allowed if _sets_letters(name))}
    while True:
        hubs = _with_what_they_need(hubs, allowed)
        asked: set[str] = set()
        watched = replace(situation, chosen=Chosen((), asked))
        found = list(_branches(watched, certain, hubs, allowed, knobs))
        # Whom a hub or another group asked for is no leaf: once more, with these among the hubs.
        seen = {*allowed} if EVERY in asked else asked & {*allowed}
        if seen <= hubs and None not in found:
            return tuple(branch for branch in found if branch is not None)
        hubs |= seen if not seen <= hubs else {*allowed}


def _sets_letters(name: str) -> bool:
    each = all_optimizations()[name]
    lettered = any(knob.letter for knob in each.knobs)
    return lettered or "adapters/weights" in each.makes or any("/" not in claim for claim in each.claims)


def _changes(name: str) -> set[str]:
    """The terms and pieces of work that an optimisation makes or changes."""
    each = all_optimizations()[name]
    return {claim.rpartition(".")[0] for claim in each.claims if "/" in claim} | each.makes | each.adds


def _touches(name: str) -> set[str]:
    """The same, and those that it needs as others leave them."""
    requires = all_optimizations()[name].requires
    return _changes(name) | {requirement.term for requirement in requires if isinstance(requirement, Needs)}


def _with_what_they_need(hubs: Iterable[str], allowed: Sequence[str]) -> set[str]:
    """The hubs, and every leaf that makes what one of them touches, over and over."""
    known, together = all_optimizations(), {*hubs}
    while True:
        touched = {term for name in together for term in _touches(name)}
        more = {name for name in allowed if name not in together and (known[name].makes | known[name].adds) & touched}
        if not more:
            return together
        together |= more


def _branches(
    situation: Situation, certain: frozenset[str], hubs: set[str], allowed: Sequence[str], knobs: PinnedKnobs
) -> Iterator[Branch | None]:
    """One for each valid set of hubs; None where a leaf reads a letter that a knob of the trunk varies."""
    groups = _groups([name for name in allowed if name not in hubs])
    for extra in subsets([name for name in allowed if name in hubs and name not in certain]):
        ids = tuple(sorted({*certain, *extra}))
        if not trains(ids) or problems(ids, situation):
            continue
        trunk = tuple(configurations(ids, knobs, situation))
        if not trunk:
            continue
        varied = {letter for one in trunk for letter, value in one.letters.items() if value != trunk[0].letters[letter]}
        options = tuple(tuple(_options(group, trunk[0], situation, knobs)) for group in groups)
        read = (each for group in options for option in group for each in _formulas(option))
        if any(varied & {*letters_of(formula)} for formula in read):
            yield None
        else:
            yield Branch(trunk, tuple(group for group in options if len(group) > 1))


def _groups(leaves: Sequence[str]) -> list[list[str]]:
    """Leaves of which one changes what another touches, directly or through others."""
    groups: list[list[str]] = []
    for name in leaves:
        near = [group for group in groups if any(_meet(name, other) for other in group)]
        groups = [*(group for group in groups if group not in near), sorted([name, *(n for g in near for n in g)])]
    return groups


def _meet(one: str, other: str) -> bool:
    return bool(_changes(one) & _touches(other) or _touches(one) & _changes(other))


def _options(group: Sequence[str], trunk: Configuration, situation: Situation, knobs: PinnedKnobs) -> Iterator[Option]:
    yield Option(())
    for ids in subsets(group):
        together = (*trunk.ids, *ids)
        if not ids or problems(together, situation) or not has_pinned(together, knobs, situation):
            continue
        pinned = {name: {**trunk.knobs.get(name, {}), **knobs.get(name, {})} for name in together}
        after = compose(together, pinned, situation, onto=trunk)
        assert (after.letters, after.settings) == (trunk.letters, trunk.settings), f"{ids} set what they do not claim"
        yield _difference(ids, trunk.ledger, after.ledger)


def _difference(ids: tuple[str, ...], before: Ledger, after: Ledger) -> Option:
    changed = [name for name, term in after.terms.items() if before.terms.get(name) is not term]
    return Option(
        ids,
        tuple(before.terms[name] for name in changed if name in before.terms),
        tuple(after.terms[name] for name in changed),
        {name: work for name, work in after.work.items() if before.work.get(name) is not work},
    )


def _formulas(option: Option) -> Iterator[Formula]:
    for term in (*option.gone, *option.come):
        yield from (term.count, term.bits)
    for work in option.work.values():
        yield work.amount
