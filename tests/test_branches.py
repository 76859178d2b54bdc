"""Hubs and leaves: what is left out is never better, with optimisations that exist and with made-up ones."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from test_solver import Asked, asked_at_random, asked_of, card, everything, key, weigh

from planner.branches import branches
from planner.fronts import FEW, nondominated
from planner.hardware import list_profiles
from planner.matrix import kind_of_card
from planner.model import load_model
from planner.optimizations import all_optimizations
from planner.optimizations.base import EVERY, REGISTRY, Chosen, Evidence, Needs, Optimization, Situation
from planner.sets import configurations, valid_sets
from planner.solver import Search, Wanted, space_of
from planner.space import Space
from reports.performance.synthetic import Kind, registered


def all_ids(space: Space) -> set[tuple[str, ...]]:
    """Every set of a space."""
    found = set()
    for branch in space.branches:
        sets = [branch.ids]
        for group in branch.groups:
            sets = [(*ids, *option.ids) for ids in sets for option in group]
        found |= {tuple(sorted(ids)) for ids in sets}
    return found


@pytest.mark.parametrize("seed", range(40))
def test_the_branches_hold_every_valid_set_and_no_other(seed: int) -> None:
    asked = asked_at_random(seed)
    given = (asked.required, asked.excluded)
    expected = {
        ids
        for ids in valid_sets(asked.situation, *given)
        if any(configurations(ids, asked.knobs or {}, asked.situation))
    }
    space = Space(branches(asked.situation, *given, asked.knobs or {}), asked.situation)
    assert all_ids(space) == expected


def best_of(search: Search, names: Sequence[str]) -> dict[tuple[str, bool], Any]:
    """Of the sets with each name, and of those without: the cheapest that fits, as it is compared."""
    found: dict[tuple[str, bool], Any] = {}
    for name in names:
        for on in (True, False):
            best = search.best_among("context", name, on)
            if best is not None:
                inexact = sum(not all_optimizations()[each].exact for each in best.ids)
                found[name, on] = (float(f"{best.seconds:.3g}"), inexact, best.high)
    return found


def counted(asked: Asked, search: Search, names: Sequence[str]) -> dict[tuple[str, bool], Any]:
    """The same by counting everything."""
    want = asked.wanted[search.index]
    weighed = [weigh(one, asked, want) for one in everything(asked)]
    found: dict[tuple[str, bool], Any] = {}
    for name in names:
        for on in (True, False):
            fitting = [one for one in weighed if one.fits and (name in one.configuration.ids) is on]
            if fitting:
                found[name, on] = min(one.cost("context") for one in fitting)
    return found


def may_be_off(asked: Asked) -> list[str]:
    """The names that are not switched off, and not on in every set because they are free."""
    return [name for name, each in all_optimizations().items() if name not in asked.excluded and not each.free]


KINDS: tuple[tuple[Kind, ...], ...] = (
    ("better", "neutral"),
    ("trade", "trade"),
    ("bound", "bound", "bound"),
    ("hub", "better"),
    ("trade", "neutral", "bound"),
)


@pytest.mark.parametrize("number", range(len(KINDS)))
def test_made_up_optimisations_are_chosen_as_counting_everything_chooses(number: int) -> None:
    with registered(KINDS[number]) as names:
        asked = asked_of(card("rtx2060s"), "phi-2")
        lengths = (Wanted(None, 3000, 3000, 8), Wanted(None, 30_000, 4096, 8), Wanted(None, 44_000, 4096, 8))
        asked = Asked(asked.situation, asked.limits, lengths, excluded=("adamw_8bit", "fused_activation"))
        if number == 3:
            asked = Asked(asked.situation, asked.limits, lengths, required=(names[0],), excluded=("nf4_weights",))
        found = asked.search()
        weighed = [weigh(one, asked, asked.wanted[found.index]) for one in everything(asked)]
        fitting = [one for one in weighed if one.fits]
        best = next(one for one in weighed if key(one.configuration) == key(found.best.configuration))
        assert best.cost("context")[:2] == min(one.cost("context") for one in fitting)[:2]
        everyone = may_be_off(asked)
        assert best_of(found, everyone) == counted(asked, found, everyone)
        free = {name for name, each in all_optimizations().items() if each.free} - {*asked.excluded}
        every = {key(one.configuration) for one in weighed if free <= {*one.configuration.ids}}
        assert {key(each.configuration) for each in found.outcomes} == every


@pytest.mark.parametrize("seed", range(0, 24, 2))
def test_a_random_subset_of_optimisations_is_explained_as_counting_everything_does(seed: int) -> None:
    asked = asked_at_random(seed)
    if asked.objective != "context" or not everything(asked):
        return
    found, names = asked.search(), may_be_off(asked)
    assert best_of(found, names) == counted(asked, found, names)


class Asking(Optimization):
    """Asks who else is on."""

    id = "asking"
    title = "asks"
    evidence = (Evidence("made for a test", "tests/test_branches.py"),)
    needs: Any = None

    def reasons(self, situation: Situation) -> tuple[str, ...]:
        """Refuses where its rival is on."""
        return ("not beside adamw_8bit",) if "adamw_8bit" in situation.chosen else ()

    def rewrite(self, ledger: Any, knobs: Any, situation: Situation) -> Any:
        """Nothing."""
        return ledger

    def apply(self, session: Any) -> None:
        """Nothing."""


REGISTRY.pop("asking")


def test_who_is_asked_for_in_a_set_is_no_leaf(monkeypatch: pytest.MonkeyPatch) -> None:
    situation = Situation(card("rtx2060s"), load_model("phi-2"), 2**35)
    assert space_of(situation).is_leaf("adamw_8bit")
    monkeypatch.setitem(REGISTRY, "asking", Asking)
    space = space_of(situation)
    assert not space.is_leaf("adamw_8bit")
    assert all_ids(space) == set(valid_sets(situation, (), ()))
    assert any("asking" in ids for ids in all_ids(space))
    assert not any({"asking", "adamw_8bit"} <= {*ids} for ids in all_ids(space))


def test_what_is_asked_of_a_set_is_noted() -> None:
    asked: set[str] = set()
    chosen = Chosen(["a", "b"], asked)
    assert chosen and not asked
    assert "a" in chosen and "c" not in chosen and asked == {"a", "c"}
    assert {"a", "d"} & chosen == {"a"} and asked == {"a", "c", "d"}
    assert sorted(chosen) == ["a", "b"] and EVERY in asked


def test_leaves_that_only_need_the_same_are_not_bound_together() -> None:
    class First(Asking):
        """Needs the adapters."""

        id = "needs_first"
        requires = (Needs("adapters/weights", "for a test"),)
        makes = frozenset({"buffers/needs_first"})

    try:
        space = space_of(Situation(card("rtx4090"), load_model("phi-2"), 2**35), (), ("needs_first",))
        groups = {len(group) for branch in space.branches for group in branch.groups}
        assert groups == {2}, "each leaf is on or off, whatever the others are"
    finally:
        REGISTRY.pop("needs_first")


def test_cards_of_one_kind_have_the_same_to_choose_from() -> None:
    """Whatever optimisations ask of a card is in its kind; else the matrix would share what differs."""
    known: dict[tuple[object, ...], Any] = {}
    for profile in list_profiles():
        for model in ("phi-2", "llama-3.2-1b"):
            situation = Situation(profile, load_model(model), 2**35)
            made = [
                (branch.ids, branch.trunk.knobs, branch.trunk.letters, branch.trunk.settings, branch.groups)
                for branch in branches(situation, (), (), {})
            ]
            first = known.setdefault((kind_of_card(profile), model), (profile.id, made))
            assert made == first[1], f"{profile.id} and {first[0]}"
    assert len(known) < 2 * len(list_profiles()), "some cards are of one kind"


@pytest.mark.parametrize("rows", [1, 2, FEW, FEW + 1, 90])
def test_the_front_is_what_no_row_beats(rows: int) -> None:
    source = random.Random(rows)
    for columns in (1, 2, 5):
        points = np.array([[source.choice((0, 1, 2, 1e18, 1e18 + 1024)) for _ in range(columns)] for _ in range(rows)])
        beaten = {
            j
            for j in range(rows)
            for i in range(rows)
            if i != j and (points[i] <= points[j]).all() and ((points[i] < points[j]).any() or i < j)
        }
        assert nondominated(points).tolist() == sorted({*range(rows)} - beaten)
