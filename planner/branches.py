"""The valid sets as a tree: a trunk for each set of hubs, and on it groups of choices that add up.

A *hub* decides what formulas everywhere give: rates that all work goes by, or what others need, or a letter by name.
Sets of hubs are gone through one by one. Beside given hubs, choices that touch nothing in common cannot see each other,
so what each of them changes is added, whatever the others do: bytes in a phase, FLOPs of a piece of work. A choice is
an optimisation that is on or off (a *leaf*) or the value of a knob (a *dial*). Choices that touch the same terms, or of
which one sets a letter that a formula of the other reads, form a group, and each group is looked at once.

That nobody sees more than it says is watched: the letters that formulas read (``planner.groups``), and the names that
requirements and knobs ask for in the set.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, product
from math import prod

from planner.compose import Configuration, Standing, compose
from planner.groups import Dial, Option, dials_of, options, reading_of, ties_between
from planner.optimizations import all_optimizations
from planner.optimizations.base import EVERY, Chosen, Needs, Scalar, Situation
from planner.sets import PinnedKnobs, always_on, has_pinned, subsets, trains, usable
from planner.timecost import CLOCK

DECIDING = CLOCK | {"letter p"}
"""What a hub claims: what the clock goes by, and how often layers run, which formulas of most others read."""
MOST_LEAVES, MOST_OPTIONS = 8, 4096  # of one group; beyond, the leaf with most ties becomes a hub
Ties = frozenset[frozenset[str]]
Names = Sequence[tuple[str, str, Scalar]]
"""Values of knobs, each with its optimisation and its knob."""


@dataclass(frozen=True)
class Branch:
    """One set of hubs with values of its knobs, and the groups of choices on it."""

    trunk: Configuration
    dials: tuple[Dial, ...]  # of the trunk
    groups: tuple[tuple[Option, ...], ...]  # of each group the first option is none of its leaves
    like: Branch | None = None  # another that differs in the values of some letters alone, ``renamed``
    renamed: frozenset[str] = frozenset()

    @property
    def ids(self) -> tuple[str, ...]:
        """The hubs, and what is always on."""
        return self.trunk.ids


def branches(
    situation: Situation, required: Sequence[str], excluded: Sequence[str], knobs: PinnedKnobs
) -> tuple[Branch, ...]:
    """Every valid set that trains something, holds what is required and lacks what is excluded."""
    allowed = usable(situation, required, excluded)
    certain = always_on(situation, allowed, required)
    hubs = _with_what_they_need({*certain, *(name for name in allowed if _is_hub(name))}, allowed)
    ties = _ties([name for name in allowed if name not in hubs])
    while True:
        leaves = [name for name in allowed if name not in hubs]
        if (crowded := _crowded(leaves, ties, situation)) is not None:
            hubs = _with_what_they_need({*hubs, crowded}, allowed)
            continue
        asked: set[str] = set()
        watched = replace(situation, chosen=Chosen((), asked))
        found: list[Branch] = []
        # Ties found on one trunk hold on the next; what was kept before had none that it lacked.
        for trunk in _trunks(watched, certain, [name for name in allowed if name in hubs], knobs):
            branch, ties = _grown(trunk, leaves, ties, watched)
            if branch is None:
                break
            found += [branch, *(_renamed(branch, names) for names in trunk.others)]
        else:
            # Whom a hub or another group asked for is no leaf: once more, with these among the hubs.
            seen = {*allowed} if EVERY in asked else asked & {*allowed}
            if seen <= hubs:
                return tuple(found)
            hubs = _with_what_they_need(hubs | seen, allowed)


def _is_hub(name: str) -> bool:
    each = all_optimizations()[name]
    by_name = any(knob.letter and knob.names for knob in each.knobs)
    return bool("adapters/weights" in each.makes or each.claims & DECIDING or by_name)


def _changes(name: str) -> set[str]:
    """The terms and pieces of work that an optimisation makes or changes."""
    each = all_optimizations()[name]
    return {claim.rpartition(".")[0] for claim in each.claims if "/" in claim} | each.makes | each.adds


def _touches(name: str) -> set[str]:
    """The same, and those that it needs as others leave them."""
    requires = all_optimizations()[name].requires
    return _changes(name) | {requirement.term for requirement in requires if isinstance(requirement, Needs)}


def _ties(names: Sequence[str]) -> Ties:
    """Pairs of which one changes what the other touches, or which claim the same."""
    known = all_optimizations()
    changes, touches = ({name: look(name) for name in names} for look in (_changes, _touches))
    return frozenset(
        frozenset({one, other})
        for one, other in combinations(names, 2)
        if changes[one] & touches[other] or touches[one] & changes[other] or known[one].claims & known[other].claims
    )


def _with_what_they_need(hubs: Iterable[str], allowed: Sequence[str]) -> set[str]:
    """The hubs, and every leaf that makes what one of them touches, over and over."""
    known, together = all_optimizations(), {*hubs}
    while True:
        touched = {term for name in together for term in _touches(name)}
        more = {name for name in allowed if name not in together and (known[name].makes | known[name].adds) & touched}
        if not more:
            return together
        together |= more


def _crowded(leaves: Sequence[str], ties: Ties, situation: Situation) -> str | None:
    """The leaf with most ties of a group that is too large to be gone through; None where there is no such group."""
    for group in _groups(leaves, ties):
        dials = [dial for name in group for dial in dials_of((name,), {}, situation)]
        many = prod(len(dial.values) for dial in dials)
        if len(group) > MOST_LEAVES or (len(group) > 1 and many << len(group) > MOST_OPTIONS):
            return max(group, key=lambda name: sum(name in tie for tie in ties))
    return None


@dataclass(frozen=True)
class _Trunk:
    """A valid set of hubs, with values of its knobs.

    Attributes:
        dials: of its hubs; ``standing``: what can be put on top of it.
        pinned: knobs that are fixed; ``others``: the other names that letters may have.
    """

    configuration: Configuration
    dials: tuple[Dial, ...]
    standing: Standing
    pinned: PinnedKnobs
    others: tuple[Names, ...]


def _trunks(situation: Situation, certain: frozenset[str], hubs: Sequence[str], knobs: PinnedKnobs) -> Iterator[_Trunk]:
    """One for each valid set of hubs."""
    nothing = Standing.of_nothing()
    for extra in subsets([name for name in hubs if name not in certain]):
        ids = tuple(sorted({*certain, *extra}))
        if not trains(ids) or not nothing.bears(ids, situation) or not has_pinned(ids, knobs, situation):
            continue
        first, *others = _named(ids, knobs, situation)
        pinned = _with(knobs, first)
        dials = dials_of(ids, pinned, situation)
        yield _Trunk(compose(ids, pinned, situation), dials, nothing.with_more(ids), pinned, tuple(others))


def _grown(trunk: _Trunk, leaves: Sequence[str], ties: Ties, situation: Situation) -> tuple[Branch | None, Ties]:
    """A trunk with its groups, and all ties that are known then; no branch where these make a group too large."""
    on, reading = trunk.configuration, reading_of(trunk.configuration)
    names = [*leaves, *(dial.name for dial in trunk.dials)]
    while _crowded(leaves, ties, situation) is None:
        groups = [
            tuple(options(group, on, trunk.dials, trunk.standing, situation, trunk.pinned, reading))
            for group in _groups(names, ties)
        ]
        more = ties_between(groups)
        if not more:
            kept = tuple(group for group in groups if len(group) > 1 or group[0].dials)
            return Branch(on, trunk.dials, kept), ties
        ties |= more
    return None, ties


def _renamed(branch: Branch, names: Names) -> Branch:
    """The same with other names: a knob with a letter does no more than give the letter its value."""
    known = all_optimizations()
    knobs = {(owner, knob.name): knob for owner, _, _ in names for knob in known[owner].knobs}
    letters = {knobs[owner, name].letter: knobs[owner, name].number(value) for owner, name, value in names}
    trunk = replace(branch.trunk, knobs=_with(branch.trunk.knobs, names), letters={**branch.trunk.letters, **letters})
    groups = (
        tuple(replace(option, letters={**option.letters, **letters}) for option in group) for group in branch.groups
    )
    return Branch(trunk, branch.dials, tuple(groups), branch, frozenset(letters))


def _with(knobs: PinnedKnobs, names: Names) -> dict[str, dict[str, Scalar]]:
    values = {name: {**of_one} for name, of_one in knobs.items()}
    for owner, name, value in names:
        values.setdefault(owner, {})[name] = value
    return values


def _named(ids: Sequence[str], knobs: PinnedKnobs, situation: Situation) -> Iterator[Names]:
    """Each combination of names that give a letter its value, where nobody pins them: formulas everywhere may read it.

    So there is a trunk for each.
    """
    known, inside = all_optimizations(), situation.choosing(ids)
    free = [
        [(name, knob.name, value) for value in knob.choices(inside)]
        for name in ids
        for knob in known[name].knobs
        if knob.letter and knob.names and knob.name not in knobs.get(name, {})
    ]
    return product(*free)


def _groups(names: Sequence[str], ties: Ties) -> list[list[str]]:
    """Names that are tied to each other, directly or through others."""
    groups: list[list[str]] = []
    for name in names:
        near = [group for group in groups if any(frozenset({name, other}) in ties for other in group)]
        groups = [*(group for group in groups if group not in near), sorted([name, *(n for g in near for n in g)])]
    return groups
