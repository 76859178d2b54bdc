"""Hubs and leaves: what is left out is never better, with optimisations that exist and with made-up ones."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from test_solver import Asked, Weighed, asked_at_random, asked_of, card, everything, key, weigh

from planner.branches import DECIDING, branches
from planner.calibration import calibration
from planner.compose import compose
from planner.evaluate import Limits
from planner.fronts import BLOCK, nondominated
from planner.hardware import list_profiles
from planner.matrix import kind_of_card
from planner.model import load_model
from planner.optimizations import all_optimizations
from planner.optimizations.base import EVERY, REGISTRY, Chosen, Evidence, Needs, Optimization, Situation
from planner.planning import Request, make_plan
from planner.sets import has_pinned, valid_sets
from planner.solver import Search, Wanted, space_of
from planner.space import Space
from planner.timecost import CLOCK, step_time
from planner.units import GIB
from reports.performance.synthetic import Kind, mixed, registered


def all_ids(space: Space) -> set[tuple[str, ...]]:
    """Every set of a space."""
    found = set()
    for branch in space.branches:
        sets = [branch.ids]
        for group in branch.groups:
            sets = [(*ids, *option.ids) for ids in sets for option in group]
        found |= {tuple(sorted(ids)) for ids in sets}
    return found


def expected(asked: Asked) -> set[tuple[str, ...]]:
    """Every valid set that has what is pinned, one by one."""
    return {
        ids
        for ids in valid_sets(asked.situation, asked.required, asked.excluded)
        if has_pinned(ids, asked.knobs or {}, asked.situation)
    }


@pytest.mark.parametrize("seed", range(40))
def test_the_branches_hold_every_valid_set_and_no_other(seed: int) -> None:
    asked = asked_at_random(seed)
    found = branches(asked.situation, asked.required, asked.excluded, asked.knobs or {})
    assert all_ids(Space(found, asked.situation)) == expected(asked)


def best_of(search: Search, names: Sequence[str]) -> dict[tuple[str, bool], Any]:
    """Of the sets with each name, and of those without: the cheapest that fits, as it is compared."""
    found: dict[tuple[str, bool], Any] = {}
    for name in names:
        for on in (True, False):
            best = search.best_among("context", name, on)
            if best is not None:
                known = all_optimizations()
                inexact = sum(known[each].harm for each in best.ids if not known[each].exact)
                found[name, on] = (float(f"{best.seconds:.3g}"), inexact, best.high)
    return found


def counted(weighed: Sequence[Weighed], names: Sequence[str]) -> dict[tuple[str, bool], Any]:
    """The same by counting everything."""
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
    ("letter", "letter", "dial"),
    ("letter", "trade", "host"),
    ("executor",),
    ("dial", "executor"),
)


def same_as_counting(asked: Asked) -> None:
    """The search chooses, and tells of each optimisation, what counting everything does."""
    found = asked.search()
    weighed = [weigh(one, asked, asked.wanted[found.index]) for one in everything(asked)]
    fitting = [one for one in weighed if one.fits]
    best = next(one for one in weighed if key(one.configuration) == key(found.best.configuration))
    assert bool(fitting) is best.fits
    if not fitting:
        assert best.excess == min(one.excess for one in weighed)
        return
    assert best.cost("context")[:2] == min(one.cost("context") for one in fitting)[:2]
    everyone = may_be_off(asked)
    assert best_of(found, everyone) == counted(weighed, everyone)


@pytest.mark.parametrize("number", range(len(KINDS)))
def test_made_up_optimisations_are_chosen_as_counting_everything_chooses(number: int) -> None:
    with registered(KINDS[number]) as names:
        asked = asked_of(card("rtx2060s"), "phi-2")
        lengths = (Wanted(None, 3000, 3000, 8), Wanted(None, 30_000, 4096, 8), Wanted(None, 44_000, 4096, 8))
        excluded: tuple[str, ...] = ("adamw_8bit", "fused_activation")
        if number > 4:
            excluded = (*excluded, "checkpoint_offload", "exact_attention")
        # Two of an executor's five knobs are pinned, since a thousand values of each set take long to count.
        pinned = {name: {"knob0": 8, "knob1": 4} for name in names if "executor" in name}
        excluded = (*excluded, "streamed")  # which of its own has more configurations than can be counted one by one
        asked = Asked(asked.situation, asked.limits, lengths, excluded=excluded, knobs=pinned)
        if number == 3:
            asked = Asked(
                asked.situation, asked.limits, lengths, required=(names[0],), excluded=("nf4_weights", "streamed")
            )
        same_as_counting(asked)
        known = all_optimizations()
        free = {name for name in known if known[name].free and not known[name].reasons(asked.situation)}
        free -= {*asked.excluded}
        every = {key(one) for one in everything(asked) if free <= {*one.ids}}
        assert {key(each) for each in asked.search().space.configurations()} == every


@pytest.mark.parametrize(("seed", "slices"), [*((seed, 8) for seed in range(12)), (12, 10), (13, 12)])
def test_random_subsets_of_up_to_twelve_are_chosen_as_counting_everything_chooses(seed: int, slices: int) -> None:
    source = random.Random(seed)
    kinds: list[Kind] = ["trade", "trade", "host", "better", "bound", "bound", "letter", "letter", "hub", "dial"]
    profile = card(("rtx2060s", "h200-sxm", "cpu", "unlinked", "unrated")[seed % 5])
    asked = asked_of(profile, source.choice(("phi-2", "llama-3.2-1b", "smollm2-135m")))
    resorts = {name for name, each in all_optimizations().items() if each.last_resort}
    some = [name for name in all_optimizations() if name not in {"lora", "mixed_precision", *resorts}]
    kept = source.sample([name for name in some if not all_optimizations()[name].reasons(asked.situation)], 3)
    lengths = tuple(Wanted(None, size, size, 8) for size in sorted(int(2 ** source.uniform(8, 16)) for _ in range(3)))
    memory = min(asked.limits.gpu_bytes, int(2 ** source.uniform(0, 3.5) * GIB))
    limits = Limits(memory, memory if profile.kind == "cpu" else asked.limits.host_bytes, 86_400.0)
    with registered(source.sample(kinds, slices - 5)):
        excluded = tuple(name for name in some if name not in kept)
        # It is drawn at random, and may lack what it needs, or stand beside nothing that has it.
        usable = any("streamed" in ids for ids in valid_sets(asked.situation, (), excluded))
        knobs = {"streamed": {"chunk": 2048, "heads": 2}} if usable else {}
        same_as_counting(Asked(asked.situation, limits, lengths, excluded=excluded, knobs=knobs))


def test_thirty_more_are_places_and_not_branches_and_each_has_its_reason() -> None:
    before = space_of(asked_of(card("rtx2060s"), "phi-2").situation)
    with registered(mixed(30)) as names:
        plan = make_plan(Request(tier=4))
        space = space_of(Situation(card("rtx2060s"), load_model("phi-2"), 32 * GIB))
        assert not {*names} & {name for branch in space.branches for name in branch.ids}
        # With more to choose from another may come out as a hub; what is evaluated grows with sums, and no product.
        assert len(space.branches) <= 2 * len(before.branches) and space.table.many <= 20 * before.table.many
        assert space.size > 10**8 * before.size
        assert {*names} <= {each.id for each in (*plan.choices, *plan.rejected)}
        saving = [name for name in names if "better" in name]
        assert {*saving} <= {choice.id for choice in plan.choices}, "what costs nothing is on"
        assert not {name for name in names if "neutral" in name or "hub" in name} & {each.id for each in plan.choices}


class Noted(dict[str, Any]):
    """Letters or settings that note which of them are asked for."""

    def __init__(self, values: Mapping[str, Any], kind: str, asked: set[str]) -> None:
        super().__init__(values)
        self.kind, self.asked = kind, asked

    def __getitem__(self, name: str) -> Any:
        self.asked.add(f"{self.kind} {name}")
        return super().__getitem__(name)


def test_what_the_clock_goes_by_is_what_is_said_and_whoever_sets_it_is_a_hub() -> None:
    asked: set[str] = set()
    situation = Situation(card("rtx2060s"), load_model("phi-2"), 2**35)
    one = space_of(situation).branches[-1].trunk
    noted = replace(one, letters=Noted(one.letters, "letter", asked), settings=Noted(one.settings, "setting", asked))
    step_time(noted, dict.fromkeys(one.ledger.work, 1.0), situation.gpu, calibration())
    assert asked == CLOCK
    setters = {name for name, each in all_optimizations().items() if each.claims & DECIDING}
    assert setters >= {"exact_attention", "gradient_checkpointing", "mixed_precision"}
    assert not any(space_of(situation).is_leaf(name) for name in setters)


@pytest.mark.parametrize("seed", range(0, 24, 2))
def test_a_random_subset_of_optimisations_is_explained_as_counting_everything_does(seed: int) -> None:
    asked = asked_at_random(seed)
    if asked.objective == "context" and everything(asked):
        same_as_counting(asked)


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
    assert all_ids(space) == {*valid_sets(situation, (), ())}
    assert any("asking" in ids for ids in all_ids(space))
    assert not any({"asking", "adamw_8bit"} <= {*ids} for ids in all_ids(space))


def test_what_is_asked_of_a_set_is_noted() -> None:
    asked: set[str] = set()
    chosen = Chosen(["a", "b"], asked)
    assert chosen and not asked
    assert "a" in chosen and "c" not in chosen and asked == {"a", "c"}
    assert {"a", "d"} & chosen == {"a"} and asked == {"a", "c", "d"}
    assert sorted(chosen) == ["a", "b"] and EVERY in asked


@pytest.mark.parametrize("model", ["phi-2", "smollm2-135m", "llama-3.1-8b"])
def test_what_is_composed_on_top_of_a_smaller_option_is_as_if_it_were_composed_at_once(model: str) -> None:
    space = make_space(model)
    several = 0
    for branch in space.branches:
        for option in (each for group in branch.groups for each in group if len(each.ids) > 1):
            ids = (*branch.ids, *option.ids)
            whole = compose(ids, branch.trunk.knobs, space.situation, onto=branch.trunk)
            trunk = {**branch.trunk.ledger.terms, **branch.trunk.ledger.work}
            at_once = {**whole.ledger.terms, **whole.ledger.work}
            come = {row.name: row for row in option.come}
            assert whole.letters == option.letters
            assert {name: come.get(name, trunk.get(name)) for name in at_once} == at_once
            several += 1
    assert several > 5


def make_space(model: str) -> Space:
    """All there is to choose from on the reference card."""
    return space_of(Situation(card("rtx2060s"), load_model(model), 32 * GIB))


def test_leaves_that_only_need_the_same_are_not_bound_together() -> None:
    class First(Asking):
        """Needs the adapters."""

        id = "needs_first"
        requires = (Needs("adapters/weights", "for a test"),)
        makes = frozenset({"buffers/needs_first"})

    try:
        space = space_of(Situation(card("rtx4090"), load_model("phi-2"), 2**35), (), ("needs_first",))
        groups = {len(group) for branch in space.branches for group in branch.groups if not group[0].dials}
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


@pytest.mark.parametrize("rows", [1, 2, 12, 90, BLOCK + 1])
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
