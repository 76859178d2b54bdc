"""One branch at some candidates: what its trunk takes, what each option adds, and which combinations matter.

Work is summed by *lane*: the phase, the resource, and over the link the direction. A step's time is a function of these
sums that grows with each (``planner.timecost``), so they are all that combinations need to be compared by.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from planner.branches import Branch, Option
from planner.compose import Configuration
from planner.evaluate import Array, masks
from planner.fronts import nondominated
from planner.ledger import Phase, Resource, Term, Work
from planner.optimizations import all_optimizations
from planner.rows import Rows, Values

PHASES, KINDS = len(Phase), 4  # kinds: on the card, exactly known there, pinned, in the host
LIMITED = [*range(PHASES), *range(3 * PHASES, 4 * PHASES)]  # rows of a kind and phase that a limit looks at
Lane = tuple[Phase, Resource, bool]
LANES: tuple[Lane, ...] = tuple((p, r, out) for p in Phase for r in Resource for out in (False, True))
Wish = tuple[str, bool]  # a name, and whether it is to be on


def lane_of(work: Work) -> int:
    """The lane of a piece of work; over the link, what leaves the card has a name that ends in ``/out``."""
    return LANES.index((work.phase, work.resource, work.name.endswith("/out")))


def work_of(lane: int) -> Work:
    """A piece of work that stands for all of a lane."""
    phase, resource, out = LANES[lane]
    name = f"{phase.value}/{resource.value}/{'out' if out else 'in'}"
    return Work(name, lambda letters: 0, resource, phase, "all work of a lane")


@dataclass(frozen=True)
class Change:
    """Rows of the table of formulas with what they add to: kinds and phases of bytes, lanes of work."""

    sizes: Array
    mask: Values  # (kind, phase) × row, negative for what goes
    work: tuple[tuple[int, int, int], ...]  # lane, row, 1 or −1 for what goes


@dataclass(frozen=True)
class Leaf:
    """An option of a group, with what it changes. ``adds`` counts the pieces of work that it adds to each lane."""

    option: Option
    change: Change
    inexact: int
    adds: Values


@dataclass(frozen=True)
class Fold:
    """Combinations of one option from each group, and what each adds to its trunk."""

    chosen: tuple[tuple[Option, ...], ...]
    sizes: Values  # combination × (kind, phase) × candidate
    work: Values  # combination × lane × candidate
    adds: Values  # combination × lane
    inexact: Values

    def points(self) -> Values:
        """What combinations are compared by; smaller is better.

        A rate that is unknown makes the time unknown, so only those that keep the same things busy are compared.
        """
        many = len(self.chosen)
        sizes = self.sizes[:, LIMITED]
        # What all of them leave alone says nothing; most rows and lanes are that.
        touched, busy = sizes.any(axis=(0, 2)), self.work.any(axis=(0, 2)) | self.adds.any(axis=0)
        parts = (sizes[:, touched], self.work[:, busy], self.inexact, self.adds[:, busy], -self.adds[:, busy])
        return np.hstack([part.reshape(many, -1) for part in parts])

    def only(self, places: Sequence[int] | Array) -> Fold:
        """Some of them."""
        chosen = tuple(self.chosen[place] for place in places)
        at = np.asarray(places, dtype=np.int64)
        return Fold(chosen, self.sizes[at], self.work[at], self.adds[at], self.inexact[at])

    def best(self) -> Fold:
        """Those that no other beats."""
        kept = nondominated(self.points()) if len(self.chosen) > 1 else [0]
        return self if len(kept) == len(self.chosen) else self.only(kept)

    def times(self, other: Fold) -> Fold:
        """Each of these with each of the others."""
        many = len(self.chosen) * len(other.chosen)

        def added(one: Values, two: Values) -> Values:
            return (one[:, None] + two[None]).reshape(many, *one.shape[1:])

        return Fold(
            tuple((*one, *two) for one in self.chosen for two in other.chosen),
            added(self.sizes, other.sizes),
            added(self.work, other.work),
            added(self.adds, other.adds),
            added(self.inexact, other.inexact),
        )


class Table:
    """One branch as rows of the table of formulas."""

    def __init__(self, branch: Branch, rows: Rows) -> None:
        self.branch = branch
        first = branch.trunk[0]
        terms, works = first.ledger.terms.values(), first.ledger.work.values()
        self.trunk_sizes = np.array(
            [[rows.size(term, one.letters) for term in one.ledger.terms.values()] for one in branch.trunk]
        )
        self.trunk_mask = _mask(terms)
        self.lanes = np.array([lane_of(work) for work in works], dtype=np.int64)
        self.trunk_work = np.array([[rows.amount(work.amount, one.letters) for work in works] for one in branch.trunk])
        self.groups = [[_leaf(option, first, rows) for option in group] for group in branch.groups]

    def at(self, values: Values) -> Bare:
        """The branch at some candidates."""
        width = values.shape[1]
        sizes = self.trunk_mask @ values[self.trunk_sizes]
        work = np.zeros((len(self.branch.trunk), len(LANES), width))
        for place, lane in enumerate(self.lanes):
            work[:, lane] += values[self.trunk_work[:, place]]
        busy = np.zeros(len(LANES), dtype=bool)
        busy[self.lanes] = True
        return Bare(self.branch, sizes, work, busy, [_fold_of(group, values) for group in self.groups])


class Bare:
    """A branch at some candidates: bytes and work of its trunk, and of the options of each group what they add."""

    def __init__(self, branch: Branch, sizes: Values, work: Values, busy: Array, groups: Sequence[Fold]) -> None:
        self.branch, self.sizes, self.work, self.busy = branch, sizes, work, busy
        self.groups = groups
        self.fronts = [group.best() for group in groups]
        width = sizes.shape[-1]
        nothing = (np.zeros((1, KINDS * PHASES, width)), np.zeros((1, len(LANES), width)), np.zeros((1, len(LANES))))
        self.nothing = Fold(((),), *nothing, np.zeros(1))

    def fold(self, wish: Wish | None, every: bool) -> Fold | None:
        """The combinations; None where the wish is not met.

        Unless ``every`` is asked for, those that others beat at all candidates are left out.
        """
        folds = list(self.groups if every else self.fronts)
        if wish is not None:
            name, on = wish
            mine = [any(name in option.ids for option in options) for group in self.groups for options in group.chosen]
            if not any(mine) and (name in self.branch.ids) is not on:
                return None
            for place, group in enumerate(self.groups):
                meets = [any(name in option.ids for option in options) is on for options in group.chosen]
                if any(name in option.ids for options in group.chosen for option in options):
                    some = group.only([index for index, met in enumerate(meets) if met])
                    folds[place] = some if every else some.best()
        together = self._sum([fold for fold in folds if len(fold.chosen) == 1])
        for fold in folds:
            if len(fold.chosen) > 1:
                together = together.times(fold)
                if not every:
                    together = together.best()
        return together.only(sorted(range(len(together.chosen)), key=lambda place: _length(together.chosen[place])))

    def _sum(self, folds: Sequence[Fold]) -> Fold:
        """What is on whatever else is."""
        every = [self.nothing, *folds]
        sums = (sum(getattr(fold, name) for fold in every) for name in ("sizes", "work", "adds", "inexact"))
        return Fold((tuple(option for fold in folds for option in fold.chosen[0]),), *sums)


def _length(options: Iterable[Option]) -> int:
    return sum(len(option.ids) for option in options)


def _leaf(option: Option, trunk: Configuration, rows: Rows) -> Leaf:
    letters, before, known = trunk.letters, trunk.ledger.work, all_optimizations()
    sizes = [rows.size(term, letters) for term in (*option.come, *option.gone)]
    come = [(lane_of(work), rows.amount(work.amount, letters), 1) for work in option.work.values()]
    gone = [
        (lane_of(before[name]), rows.amount(before[name].amount, letters), -1) for name in option.work if name in before
    ]
    adds = np.zeros(len(LANES))
    for name, work in option.work.items():
        adds[lane_of(work)] += name not in before
    change = Change(
        np.array(sizes, dtype=np.int64), np.hstack([_mask(option.come), -_mask(option.gone)]), (*come, *gone)
    )
    return Leaf(option, change, sum(not known[name].exact for name in option.ids), adds)


def _fold_of(group: Sequence[Leaf], values: Values) -> Fold:
    work = np.zeros((len(group), len(LANES), values.shape[1]))
    for place, leaf in enumerate(group):
        for lane, row, sign in leaf.change.work:
            work[place, lane] += sign * values[row]
    return Fold(
        tuple((leaf.option,) if leaf.option.ids else () for leaf in group),
        np.array([leaf.change.mask @ values[leaf.change.sizes] for leaf in group]),
        work,
        np.array([leaf.adds for leaf in group]),
        np.array([float(leaf.inexact) for leaf in group]),
    )


def _mask(terms: Iterable[Term]) -> Values:
    found: tuple[Any, ...] = tuple(terms)
    return np.vstack(masks(found)).astype(np.float64) if found else np.zeros((KINDS * PHASES, 0))
