"""Parts of the search by themselves: what rules lengths out, what a name changes, what comes nearest, the longest."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from planner.bounds import Bounded
from planner.branches import Branch
from planner.compose import compose
from planner.evaluate import Candidates, Evaluator, Limits
from planner.fields import Field
from planner.longest import longest
from planner.on_card import Wish
from planner.optimizations import all_optimizations
from planner.planning import Request, Solved, solved
from planner.solver import ENDLESS_LIMITS
from planner.weighing import CARD_MEMORY, HOST_MEMORY, INEXACT_COUNT, SECONDS, TIME, share

ASKED = Request("rtx2060s", "phi-2", tier=4)


@pytest.fixture(scope="module")
def made() -> Solved:
    """A plan of the reference card."""
    return solved(ASKED)


def renamed(made: Solved) -> list[Branch]:
    """Branches that were not composed, but are another with other letters."""
    return [branch for branch in made.found.space.branches if branch.like is not None]


def test_a_branch_with_another_name_is_what_composing_it_gives(made: Solved) -> None:
    assert renamed(made), "what waits between the passes waits in the host or on the card"
    for branch in renamed(made):
        whole = compose(branch.ids, branch.trunk.knobs, made.situation)
        same = ("ids", "knobs", "letters", "settings")
        assert all(getattr(whole, name) == getattr(branch.trunk, name) for name in same)
        assert whole.ledger.terms == branch.trunk.ledger.terms and whole.ledger.work == branch.trunk.ledger.work
        assert branch.trunk.letters != branch.like.trunk.letters  # type: ignore[union-attr]
        for group in branch.groups:
            for option in group:
                again = compose((*branch.ids, *option.ids), branch.trunk.knobs, made.situation)
                assert {name: again.letters[name] for name in branch.renamed} == {
                    name: option.letters[name] for name in branch.renamed
                }


def test_nobody_else_claims_a_letter_that_a_name_gives(made: Solved) -> None:
    letters = {letter for branch in renamed(made) for letter in branch.renamed}
    claims = {claim for name, each in all_optimizations().items() if name != "streamed" for claim in each.claims}
    assert letters == {"j_h"} and not {f"letter {letter}" for letter in letters} & claims


@pytest.mark.parametrize("gpu", ["rtx2060s", "cpu"])
def test_where_bytes_leave_no_room_nothing_fits(gpu: str) -> None:
    """Of all configurations none fits a length at which the least bytes of every branch say so."""
    fewer = ("streamed", "nf4_weights", "adamw_8bit") if gpu == "rtx2060s" else ()  # to be gone through in a moment
    made = solved(Request(gpu, "smollm2-135m", tier=1, excluded=fewer))
    totals = np.array([512, 4096, 16_384, 65_536, 262_144])
    at = Candidates(totals, totals, np.full_like(totals, 8))
    on_card, seen = made.found.on_card, set()
    for budget in (2**29, 2**31, 2**33):
        limits = Limits(budget, budget if gpu == "cpu" else 2**32, float("inf"))
        evaluate = Evaluator(at, made.situation, made.found.constants, limits)
        fits = np.logical_or.reduce([evaluate(each).fits for each in on_card.space.configurations()])
        room = np.array([on_card.has_room(at, index, limits) for index in range(len(totals))])
        assert not (fits & ~room).any()
        assert [on_card.fits(at, index, limits, None) for index in range(len(totals))] == fits.tolist()
        seen |= {*room.tolist()}
    assert seen == {True, False}


@pytest.mark.parametrize("wish", [None, ("streamed", True), ("nf4_weights", False)])
@pytest.mark.parametrize("gpu", ["rtx2060s", "h200-sxm", "cpu"])
def test_no_product_takes_less_than_the_least_of_its_options(gpu: str, wish: Wish | None) -> None:
    """By which products are left out before their places are summed up; these go up, and nothing shared is changed."""
    found = solved(Request(gpu, "smollm2-135m", tier=1)).found
    stack, level = found.on_card.stack(wish), found.on_card.level(found.candidates, found.index)
    if stack is None:
        assert gpu == "cpu" and wish == ("streamed", True)
        return
    least = stack.least(level.least)
    for product, lowest in zip(stack.products, least, strict=True):
        sums = level.sums(product)
        assert (np.diff(product.places) > 0).all()
        assert (lowest <= np.minimum.reduceat(sums, product.starts).sum(axis=0) * (1 + 1e-12)).all()
        sums += 1.0
        assert not np.array_equal(level.sums(product), sums)
    assert np.array_equal(stack.least(level.least), least)


@pytest.mark.parametrize("gpu", ["rtx2060s", "h200-sxm", "cpu"])
def test_outlines_leave_out_nothing_that_is_found_without_them(gpu: str) -> None:
    """Under limits that leave much, little or nothing, among them those that what was found meets to the digit."""
    found = solved(Request(gpu, "smollm2-135m", tier=1)).found
    level, gib, seen = found.on_card.level(found.candidates, found.index), 2**30, set()
    sizes = ((0.6, 4.0, 1e9), (0.7, 2.0, 60.0), (16.0, 3.0, 1.0), (24.0, 32.0, 0.1), (24.0, 32.0, 1e9))
    asked = [Limits(int(card * gib), int((host + card * (gpu == "cpu")) * gib), late) for card, host, late in sizes]
    for wish in (None, ("streamed", True), ("nf4_weights", False)):
        stack = found.on_card.stack(wish)
        if stack is None:
            continue
        least = found.on_card.scale.weigh(stack.least(level.least), stack.clock)
        fields = [Field(product, level.sums(product), found.on_card.scale) for product in stack.products]
        without = Bounded(least, fields.__getitem__)
        queue = list(asked)
        while queue:
            limits = queue.pop()
            for key in ((TIME, INEXACT_COUNT, HOST_MEMORY), (SECONDS, CARD_MEMORY), (share(limits),)):
                fresh = found.on_card.level(found.candidates, found.index)  # whose places are not summed up yet
                best = fresh.having(wish).cheapest(limits, key)
                assert best == without.cheapest(limits, key)
                seen.add(best is not None)
                if best is not None and limits in asked:
                    exactly = best.weights
                    queue.append(Limits(int(exactly.high), int(exactly.host), exactly.seconds, disk_bytes=0))
            assert level.fits(limits, wish) is (without.cheapest(limits, (share(limits),), first=True) is not None)
    assert seen == {True, False}
    for product in found.on_card.products:
        assert len(level.outline(product).sums) <= len(product.places)


@pytest.mark.parametrize("tier", [8, 10, 11])
def test_what_comes_nearest_misses_the_most_exceeded_limit_by_the_least(tier: int) -> None:
    """Also where that is the time: no memory is saved at its price."""
    made = solved(Request("rtx2060s", "phi-2", tier=tier))
    found, limits = made.found, made.limits
    least = found.on_card.at(found.candidates, found.index).having(None).cheapest(ENDLESS_LIMITS, (share(limits),))
    assert least is not None and not found.best.fits[found.index]
    taken = max(
        int(found.best.high[found.index]) / limits.gpu_bytes,
        int(found.best.host[found.index]) / limits.host_bytes,
        float(found.best.time.estimate[found.index]) / limits.step_seconds,
    )
    assert taken == pytest.approx(float(share(limits).of(least.weights)), rel=1e-9)


def test_of_what_is_as_near_the_other_limits_are_missed_by_the_least() -> None:
    """With so much more host memory tier 8 fits: the card is not exceeded along with the host."""
    made = solved(Request("rtx2060s", "phi-2", tier=8))
    best, index = made.found.best, made.found.index
    assert int(best.host[index]) > made.limits.host_bytes and int(best.high[index]) <= made.limits.gpu_bytes


def test_the_longest_is_found_beyond_lengths_that_take_too_long() -> None:
    """One step into the second chunk is faster than one chunk, whose copies nothing hides."""
    knobs = {"streamed": {"chunk": 8192, "staging": "host"}, "lora": {"rank": 48}}
    made = solved(Request("rtx4090", "phi-2", total_tokens=4096, required=("streamed",), knobs=knobs))
    found, limits = made.found, replace(made.limits, step_seconds=2.96)
    before, after = 8192, 8256
    totals = np.array([before, after])
    at = Candidates(totals, totals, np.full_like(totals, 48))
    assert [found.on_card.fits(at, index, limits, None) for index in range(2)] == [False, True]
    for least in (64, before, after):
        assert (longest(found.on_card, limits, rank=48, target=None, least=least) or 0) > after


def test_the_longest_is_a_step_before_what_does_not_fit(made: Solved) -> None:
    total = made.found.longest_all_trained
    assert total is not None and total % 64 == 0
    asked = replace(ASKED, tier=None, knobs={"lora": {"rank": 12}})
    verdicts = [solved(replace(asked, total_tokens=each)).found for each in (total, total + 64)]
    assert [bool(each.best.fits[0]) for each in verdicts] == [True, False]
