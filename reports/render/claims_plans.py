"""What the planner gives the cards of the claims document: tiers, lengths, times, and the least memory at a length."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np

from planner.calibration import calibration
from planner.compose import Configuration, compose
from planner.evaluate import Candidates, Evaluator, Limits, Outcome
from planner.hardware import load_profile
from planner.ledger import Device, Phase
from planner.lengths import NO_TIER_RANK
from planner.model import load_model
from planner.on_card import SpaceOnCard
from planner.optimizations.base import Situation
from planner.planning import HOST_BYTES, Request, make_plan
from planner.solver import ENDLESS_LIMITS, Search, Wanted, search, space_of
from planner.symbols import Letters
from planner.tiers import TIERS
from planner.units import GIB, format_bytes, format_seconds
from planner.weighing import CARD_MEMORY, HOST_MEMORY, SECONDS, Key
from reports.render.claims_data import Document, Found, gigabytes
from reports.render.figures import CARD, MODEL

NAMES = {"rtx2060s": "RTX 2060 SUPER", "rtx3090": "RTX 3090", "rtx4090": "RTX 4090", "a100-80gb-sxm": "A100 80 GB"}


def budget(card: str) -> int:
    """Bytes of the card that a plan may use."""
    size = load_profile(card).budget_bytes()
    assert size is not None, f"the profile of {card} lacks a fact"
    return size


def situation(card: str = CARD) -> Situation:
    """The card, the reference model, and the host memory that `plan` takes when none is given."""
    return Situation(load_profile(card), load_model(MODEL), HOST_BYTES)


@cache
def planned(card: str) -> Search:
    """The search behind `plan --gpu CARD`: every valid set of optimisations at every tier."""
    wanted = [Wanted(tier.number, tier.total, tier.target, tier.rank) for tier in TIERS]
    limits = Limits(budget(card), HOST_BYTES, Request().max_step_seconds)
    return search(situation(card), limits, calibration(), wanted, objective="context")


@cache
def choices(card: str, required: tuple[str, ...] = (), excluded: tuple[str, ...] = ()) -> SpaceOnCard:
    """All there is to choose from with some optimisations on and some off."""
    found = planned(card)
    if not required and not excluded:
        return found.on_card
    space = space_of(found.situation, required, excluded)
    return SpaceOnCard(space, found.situation.gpu, found.constants, found.limits.accumulation)


@cache
def least(
    card: str,
    key: Key,
    total: int,
    target: int,
    rank: int,
    *,
    limits: Limits = ENDLESS_LIMITS,
    required: tuple[str, ...] = (),
    excluded: tuple[str, ...] = (),
) -> Outcome | None:
    """The configuration that takes least of something at one length and within limits; None where there is none."""
    found, on_card = planned(card), choices(card, required, excluded)
    one = Candidates(np.array([total]), np.array([target]), np.array([rank]))
    best = on_card.at(one, 0).having(None).cheapest(limits, key)
    if best is None:
        return None
    evaluate = Evaluator(one, found.situation, found.constants, found.limits)
    return evaluate(on_card.space.configuration(best.branch, best.places))


def least_memory(
    card: str, total: int, target: int, rank: int, required: tuple[str, ...] = (), excluded: tuple[str, ...] = ()
) -> Outcome:
    """The configuration that takes least of the card at one length, whatever host and time allow."""
    key: Key = (CARD_MEMORY, HOST_MEMORY)
    return _found(least(card, key, total, target, rank, required=required, excluded=excluded))


def fastest(card: str, total: int, target: int, rank: int) -> Outcome:
    """The configuration whose step is estimated shortest at one length, whatever card, host and time allow."""
    return _found(least(card, (SECONDS,), total, target, rank))


def at_tier(card: str, key: Key, number: int, limits: Limits = ENDLESS_LIMITS) -> Outcome | None:
    """As ``least`` at the length of a tier."""
    tier = TIERS[number - 1]
    return least(card, key, tier.total, tier.target, tier.rank, limits=limits)


@cache
def within(card: str, number: int) -> Outcome | None:
    """What `plan --tier` chooses of what card, host and time allow; None where they allow nothing."""
    found, tier = planned(card), TIERS[number - 1]
    best = found.best_at(number - 1)
    if not best.fits[number - 1]:
        return None
    one = Candidates(np.array([tier.total]), np.array([tier.target]), np.array([tier.rank]))
    return Evaluator(one, found.situation, found.constants, found.limits)(best.configuration)


def host_needed(card: str, number: int, **lifted: float) -> Outcome | None:
    """The configuration at a tier that takes least of the host, were that without a limit; ``lifted`` are others."""
    limits = replace(planned(card).limits, host_bytes=ENDLESS_LIMITS.host_bytes, **lifted)
    return at_tier(card, (HOST_MEMORY, SECONDS), number, limits)


def tier_fits(card: str, number: int) -> bool:
    """Whether any configuration trains a tier."""
    return within(card, number) is not None


def _found(outcome: Outcome | None) -> Outcome:
    assert outcome is not None, "without limits everything is within them"
    return outcome


@dataclass(frozen=True)
class Run:
    """One configuration with a value for every letter it needs."""

    configuration: Configuration
    letters: Letters

    def size(self, name: str) -> int:
        """Bytes of a term; 0 where there is none of that name."""
        term = self.configuration.ledger.terms.get(name)
        return 0 if term is None else int(term.bytes(self.letters))

    def phases(self, devices: tuple[Device, ...] = (Device.GPU,)) -> dict[Phase, dict[str, int]]:
        """For each phase the terms that lie on the devices, and their bytes."""
        by_phase = self.configuration.ledger.by_phase(self.letters, devices)
        return {phase: {name: int(size) for name, size in terms.items()} for phase, terms in by_phase.items()}

    def highest(self) -> dict[str, int]:
        """The terms on the card in the phase that takes most of it."""
        return max(self.phases().values(), key=lambda terms: sum(terms.values()))

    def peak(self) -> int:
        """Bytes expected on the card at the highest moment."""
        return sum(self.highest().values())

    def work(self, *names: str) -> int:
        """FLOPs or bytes of pieces of work."""
        return sum(int(self.configuration.ledger.work[name].amount(self.letters)) for name in names)


def run(configuration: Configuration, total: int, target: int, rank: int, card: str = CARD) -> Run:
    """A configuration at one length, one sequence at a time."""
    workspace = calibration().workspace_bytes(load_profile(card).compute_capability)
    letters = configuration.at(batch=1, total=total, target=target, workspace=workspace, rank=rank)
    return Run(configuration, letters)


def composed(ids: tuple[str, ...], total: int, target: int = 0, rank: int = NO_TIER_RANK, card: str = CARD) -> Run:
    """A set of optimisations at one length; every token is trained unless said otherwise."""
    return run(compose(ids, {}, situation(card)), total, target or total, rank, card)


def best_run(card: str) -> Run:
    """What `plan --gpu CARD` chooses."""
    found = planned(card)
    want = found.wanted[found.index]
    return run(found.best.configuration, want.total, want.target, want.rank, card)


def tier_of(card: str) -> int:
    """The highest tier that fits; 0 where none does."""
    found = planned(card)
    return int(found.wanted[found.index].tier or 0) if found.best.fits[found.index] else 0


def longest(card: str) -> int:
    """Tokens of the longest sequence that fits at the rank of the highest tier, every token trained."""
    return planned(card).longest_all_trained or 0


@cache
def step_seconds(card: str, number: int) -> float:
    """Seconds of a step of a tier that fits, the optimiser's among them, as `plan --tier` tells them."""
    estimate = make_plan(Request(gpu=card, tier=number)).time.step_seconds.estimate
    assert estimate is not None, f"the profile of {card} lacks a rate"
    return estimate


def verdict(card: str, number: int) -> str:
    """Whether a tier fits, and the figure that decides it."""
    limits, best = planned(card).limits, within(card, number)
    if best is not None:
        return f"fits, about {format_seconds(step_seconds(card, number))} a step"
    on_card = _found(at_tier(card, (CARD_MEMORY,), number))
    if int(on_card.high[0]) > limits.gpu_bytes:
        return f"does not fit: {gigabytes(int(on_card.high[0]))} of {gigabytes(limits.gpu_bytes)} of the card"
    enough = host_needed(card, number)
    slow = enough or host_needed(card, number, step_seconds=ENDLESS_LIMITS.step_seconds)
    if slow is None:
        return "does not fit: whatever takes little of the card takes too much of the host"
    lacking = f"{format_bytes(int(slow.host[0]))} of {format_bytes(limits.host_bytes)} of host RAM"
    late = "" if enough else f", and about {format_seconds(float(slow.time.estimate[0]))} a step"
    return f"does not fit: {lacking}{late}"


# --- What rows of the report ask for ----------------------------------------------------------------------


def reach(document: Document, card: str) -> Found:
    """The highest tier a card trains."""
    total, number = planned(card).wanted[planned(card).index].total, tier_of(card)
    return Found(f"{NAMES[card]}: tier {number}, {total:,} tokens{_with_more(card, number + 1)}", number)


def _with_more(card: str, number: int) -> str:
    """What host RAM a tier takes that does not fit for want of it alone; the next one too if that is so there."""
    told = []
    for each in range(number, len(TIERS) + 1):
        enough = host_needed(card, each)
        if enough is None:
            break
        told.append(f"tier {each} with {-(-int(enough.host[0]) // GIB)} GiB of host RAM")
    return f"; it would be {', '.join(told)}" if told else ""


def longest_context(document: Document, card: str) -> Found:
    """The longest sequence that a card trains."""
    text = f"{longest(card):,} tokens at most on {NAMES[card]}, every token trained"
    return Found(text, longest(card))


def contexts(document: Document, tiers: list[int]) -> Found:
    """The contexts of tiers; the value is that of the last."""
    told = ", ".join(f"{TIERS[number - 1].context:,} in tier {number}" for number in tiers)
    return Found(f"tokens of context: {told}", TIERS[tiers[-1] - 1].context)


def increase(document: Document, card: str, before: int) -> Found:
    """How much longer the longest sequence is than the length that is called the one before."""
    ratio = longest(card) / before
    return Found(f"{longest(card):,} tokens fit, {ratio:.2f} times {before:,}", ratio)


def tiers_fit(document: Document, card: str, tiers: list[int]) -> Found:
    """Whether tiers fit a card."""
    told = "; ".join(f"tier {number} {verdict(card, number)}" for number in tiers)
    return Found(f"{NAMES[card]}: {told}", holds="yes" if tier_of(card) >= max(tiers) else "no")


def achieved(document: Document, card: str, base: int) -> Found:
    """The longest sequence over a base length, and over the model's own context."""
    native, tokens = load_model(MODEL).native_context, longest(card)
    return Found(
        f"{tokens:,} tokens are {tokens / base:,.0f} times {base}, and {tokens / native:.1f} times the {native:,} that "
        f"{MODEL} was made for",
        tokens / base,
    )


def epochs_take(document: Document, card: str, tier: int, epochs: int, days: float) -> Found:
    """What so many epochs of a single sequence of a tier take, at the card's peak rates and as estimated."""
    time = _found(at_tier(card, (SECONDS,), tier)).time
    bound, estimate = float(time.bound[0]), float(time.estimate[0])
    fits = tier_of(card) >= tier
    shortest, likely = format_seconds(bound * epochs), format_seconds(estimate * epochs)
    several = f"; {epochs} epochs of a single sequence {shortest} to {likely}" if epochs > 1 else ""
    text = (
        f"{'' if fits else f'tier {tier} does not fit; if it did, '}one step would take {NAMES[card]} "
        f"{format_seconds(bound)} at its peak rates, {format_seconds(estimate)} as "
        f"estimated{several}"
    )
    return Found(text, holds=None if fits and bound * epochs <= days * 86_400 else "no")


def sequences(document: Document, card: str, tier: int, hours: float) -> Found:
    """How many sequences of a tier a card is through with in so many hours."""
    fits = within(card, tier) is not None
    step = step_seconds(card, tier) if fits else float(_found(at_tier(card, (SECONDS,), tier)).time.estimate[0])
    total = TIERS[tier - 1].total
    many = hours * 3600 / step
    told = (
        f"{many:.0f} sequences, {many * total / 1e6:.1f} million tokens" if many >= 1 else f"{many:.2f} of a sequence"
    )
    return Found(f"a step of {total:,} tokens is estimated at {format_seconds(step)}: {hours:g} hours are {told}")


def per_token(document: Document, card: str) -> Found:
    """How memory grows with the sequence, at the least that any set of optimisations takes."""
    lengths = (2**18, 2**19)
    card_bytes = [int(least_memory(card, length, length, 4).expected[0]) for length in lengths]
    host_bytes = [int(least_memory(card, length, length, 4).host[0]) for length in lengths]
    each, host = ((sizes[1] - sizes[0]) / (lengths[1] - lengths[0]) for sizes in (card_bytes, host_bytes))
    text = (
        f"every token takes {each / 1000:.0f} kB of the card and {host / 1000:.0f} kB of host RAM; "
        f"{longest(card):,} tokens are the end on {NAMES[card]}"
    )
    return Found(text, holds="no" if each > 0 or host > 0 else "yes")


def against(document: Document, card: str, other: str) -> Found:
    """What two cards reach with the same host, and how long a step takes each."""
    each = [(name, tier_of(name), longest(name)) for name in (card, other)]
    told = "; ".join(
        f"{NAMES[name]}: at most {tokens:,} tokens, tier {tier} {verdict(name, tier).removeprefix('fits, ')}"
        for name, tier, tokens in each
    )
    return Found(f"{told}. Host RAM decides, not the card", holds="in part" if each[0][2] >= each[1][2] else "no")


def stage(document: Document, card: str, tokens: list[int]) -> Found:
    """Whether the lengths of a stage of the curriculum fit."""
    told = ", ".join(f"{each:,} tokens {'fit' if longest(card) >= each else 'do not fit'}" for each in tokens)
    return Found(
        f"{told} on {NAMES[card]} ({longest(card):,} at most)", holds="yes" if longest(card) >= max(tokens) else "no"
    )


def least_at(document: Document, card: str, tokens: int, rank: int) -> Found:
    """The least of the card that any set of optimisations takes at one length; the value is in GB."""
    outcome = least_memory(card, tokens, tokens, rank)
    size, host = int(outcome.expected[0]), int(outcome.host[0])
    return Found(f"{gigabytes(size)} at least at {tokens:,} tokens, and {gigabytes(host)} of host RAM", size / 1e9)


def peak_of(document: Document, ids: list[str], tokens: int, rank: int) -> Found:
    """What a set of optimisations takes of the card at one length; the value is in GB."""
    size = composed(tuple(ids), tokens, rank=rank).peak()
    return Found(f"{gigabytes(size)} with {', '.join(f'`{name}`' for name in ids)} at {tokens:,} tokens", size / 1e9)


def per_gigabyte(document: Document, standard: list[str], before: int, after: int, rank: int) -> Found:
    """Tokens for each gigabyte of the card: the least that can be had, over a standard set."""
    plain = composed(tuple(standard), before, rank=rank).peak()
    lowest = int(least_memory(CARD, after, after, rank).expected[0])
    ratio = (after / lowest) / (before / plain)
    return Found(
        f"{before / plain * 1e9:,.0f} tokens a GB with the standard set at {before:,}, "
        f"{after / lowest * 1e9:,.0f} with the "
        f"best at {after:,}: {ratio:.1f} times",
        ratio,
    )


COMPUTATIONS: Mapping[str, Callable[..., Any]] = {
    each.__name__: each
    for each in (
        reach,
        increase,
        tiers_fit,
        achieved,
        epochs_take,
        sequences,
        per_token,
        longest_context,
        contexts,
        against,
        stage,
        least_at,
        peak_of,
        per_gigabyte,
    )
}
