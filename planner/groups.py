"""One group of choices on a trunk: which options it has, and which formulas each of them takes away and brings."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from itertools import combinations

from planner.compose import Configuration, Standing, compose
from planner.evaluate import letters_read
from planner.ledger import Ledger, Term, Work
from planner.optimizations import all_optimizations
from planner.optimizations.base import Situation
from planner.sets import PinnedKnobs, has_pinned, subsets
from planner.symbols import letters_of

Row = Term | Work
Reading = Mapping[str, Set[str]]
"""By letter, the names of the rows that read it."""


@dataclass(frozen=True)
class Dial:
    """A number with a letter, of which nobody has fixed the value; values are ordered best first."""

    owner: str
    knob: str
    letter: str
    values: tuple[int, ...]

    @property
    def name(self) -> str:
        """As ``--set`` calls it."""
        return f"{self.owner}.{self.knob}"


@dataclass(frozen=True)
class Option:
    """Leaves of one group that are on together, with any values of the dials, and what they change on their trunk.

    Attributes:
        letters: all letters with these leaves on, each dial at its first value.
        gone: terms and pieces of work as the trunk has them, which are so no more.
        come: what there is instead, and what is new.
        sets: letters that may have another value than on the trunk.
    """

    ids: tuple[str, ...]
    dials: tuple[Dial, ...]
    letters: Mapping[str, int]
    gone: tuple[Row, ...] = ()
    come: tuple[Row, ...] = ()
    sets: frozenset[str] = frozenset()

    @property
    def choices(self) -> frozenset[str]:
        """The names of its leaves and dials."""
        return frozenset({*self.ids, *(dial.name for dial in self.dials)})


def dials_of(ids: Iterable[str], knobs: PinnedKnobs, situation: Situation) -> tuple[Dial, ...]:
    """The dials of a set's optimisations, by name; the rank is the run's own."""
    known, inside = all_optimizations(), situation.choosing(ids)
    found = (
        Dial(name, knob.name, knob.letter, tuple(map(int, knob.choices(inside))))
        for name in sorted(ids)
        for knob in known[name].knobs
        if knob.letter and not knob.names and knob.letter != "R" and knob.name not in knobs.get(name, {})
    )
    return tuple(dial for dial in found if len(dial.values) > 1)


def options(
    group: Sequence[str],
    trunk: Configuration,
    dials: Sequence[Dial],
    standing: Standing,
    situation: Situation,
    knobs: PinnedKnobs,
    reading: Reading,
) -> Iterator[Option]:
    """What a group can be on its trunk; first comes none of its leaves.

    Args:
        group: names of leaves and of dials of the trunk.
        reading: of the trunk.
    """
    mine = tuple(dial for dial in dials if dial.name in group)
    leaves = [name for name in group if name in all_optimizations()]
    composed: dict[tuple[str, ...], Configuration] = {}
    for ids in subsets(leaves):
        if not ids:
            yield _difference((), mine, trunk, trunk, reading)
            continue
        together = (*trunk.ids, *ids)
        if not standing.bears(ids, situation) or not has_pinned(together, knobs, situation):
            continue
        pinned = {name: {**trunk.knobs.get(name, {}), **knobs.get(name, {})} for name in together}
        # What a leaf does is the same on top of others: one that is asked for by name becomes a hub (``branches``).
        after = composed[ids] = compose(together, pinned, situation, onto=composed.get(ids[:-1], trunk))
        _check_claims(ids, trunk, after)
        own = dials_of(together, knobs, situation)
        yield _difference(ids, (*mine, *(dial for dial in own if dial.owner in ids)), trunk, after, reading)


def _check_claims(ids: tuple[str, ...], trunk: Configuration, after: Configuration) -> None:
    """What is set has to be claimed, or be the letter of a knob; else others could not know of it."""
    chosen = [all_optimizations()[name] for name in ids]
    claimed = {claim for each in chosen for claim in each.claims}
    claimed |= {f"letter {knob.letter}" for each in chosen for knob in each.knobs}
    letters = {f"letter {name}" for name, value in after.letters.items() if trunk.letters.get(name) != value}
    settings = {f"setting {name}" for name, value in after.settings.items() if trunk.settings.get(name) != value}
    assert letters | settings <= claimed, f"{ids} set what they do not claim: {(letters | settings) - claimed}"


def reading_of(trunk: Configuration) -> Reading:
    """By letter, the names of the trunk's rows that read it."""
    found: dict[str, set[str]] = defaultdict(set)
    for rows in (trunk.ledger.terms, trunk.ledger.work):
        for name, row in rows.items():
            for letter in read_by(row):
                found[letter].add(name)
    return found


def _difference(
    ids: tuple[str, ...], dials: tuple[Dial, ...], trunk: Configuration, after: Configuration, reading: Reading
) -> Option:
    sets = {name for name, value in after.letters.items() if trunk.letters.get(name) != value}
    sets |= {dial.letter for dial in dials}
    other = {name for letter in sets for name in reading.get(letter, ())}
    pairs = [
        (before.get(name), row)
        for before, now in _tables(trunk.ledger, after.ledger)
        for name, row in now.items()
        if before.get(name) is not row or name in other
    ]
    gone = tuple(old for old, _ in pairs if old is not None)
    return Option(ids, dials, after.letters, gone, tuple(new for _, new in pairs), frozenset(sets))


def _tables(before: Ledger, after: Ledger) -> tuple[tuple[Mapping[str, Row], Mapping[str, Row]], ...]:
    return (before.terms, after.terms), (before.work, after.work)


def read_by(row: Row) -> tuple[str, ...]:
    """The letters that a term's bytes or an amount of work depend on."""
    return letters_read(row.count, row.bits) if isinstance(row, Term) else letters_of(row.amount)


def ties_between(groups: Sequence[Sequence[Option]]) -> frozenset[frozenset[str]]:
    """Pairs of choices of several groups that do see each other: what they change does not simply add up."""
    rows = [
        {id(row): row for option in group for row in (*option.gone, *option.come)}.values()  # most are in many options
        for group in groups
    ]
    changed = [{row.name for row in of_one} for of_one in rows]
    sets = [{letter for option in group for letter in option.sets} for group in groups]
    read = [{letter for row in of_one for letter in read_by(row)} for of_one in rows]
    return frozenset(
        frozenset({min(groups[one][-1].choices), min(groups[other][-1].choices)})
        for one, other in combinations(range(len(groups)), 2)
        if changed[one] & changed[other] or sets[one] & (sets[other] | read[other]) or sets[other] & read[one]
    )
