"""What the planner gives the cards of the claims document: tiers, lengths, times, and the least memory at a length."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
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
from planner.optimizations.base import Situation
from planner.planning import HOST_BYTES, Request
from planner.solver import ENDLESS_LIMITS, Search, Wanted, search
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
def least(card: str, key: Key, total: int, target: int, rank: int, *, fitting: bool = False) -> Outcome | None:
    """The configuration that takes least of something at one length; None where nothing fits and it has to.

    Args:
        fitting: within the limits of that search; else whatever card, host and time allow.
    """
    found = planned(card)
    one = Candidates(np.array([total]), np.array([target]), np.array([rank]))
    limits = found.limits if fitting else ENDLESS_LIMITS
    best = found.on_card.at(one, 0).having(None).cheapest(limits, key)
    if best is None:
        return None
    evaluate = Evaluator(one, found.situation, found.constants, found.limits)
    return evaluate(found.space.configuration(best.branch, best.places))


def least_memory(card: str, total: int, target: int, rank: int) -> Outcome:
    """The configuration that takes least of the card at one length, whatever host and time allow."""
    return _found(least(card, (CARD_MEMORY, HOST_MEMORY), total, target, rank))


def fastest(card: str, total: int, target: int, rank: int) -> Outcome:
    """The configuration whose step is estimated shortest at one length, whatever card, host and time allow."""
    return _found(least(card, (SECONDS,), total, target, rank))


def at_tier(card: str, key: Key, number: int, *, fitting: bool) -> Outcome | None:
    """As ``least`` at the length of a tier."""
    tier = TIERS[number - 1]
    return least(card, key, tier.total, tier.target, tier.rank, fitting=fitting)


def tier_fits(card: str, number: int) -> bool:
    """Whether any configuration trains a tier."""
    return at_tier(card, (SECONDS,), number, fitting=True) is not None


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


def verdict(card: str, number: int) -> str:
    """Whether a tier fits, and the figure that decides it."""
    found, best = planned(card), at_tier(card, (SECONDS,), number, fitting=True)
    if best is not None:
        return f"fits, about {format_seconds(float(best.time.estimate[0]))} a step"
    on_card, in_host = (_found(at_tier(card, key, number, fitting=False)) for key in ((CARD_MEMORY,), (HOST_MEMORY,)))
    if int(on_card.high[0]) > found.limits.gpu_bytes:
        lacking = f"{gigabytes(int(on_card.high[0]))} of {gigabytes(found.limits.gpu_bytes)}"
    elif (host := int(in_host.host[0])) > found.limits.host_bytes:
        lacking = f"host RAM: {gigabytes(host)} of {gigabytes(found.limits.host_bytes)}"
    else:
        lacking = "card, host and time together are not enough"
    return f"does not fit: {lacking}"


# --- What rows of the report ask for ----------------------------------------------------------------------


def reach(document: Document, card: str) -> Found:
    """The highest tier a card trains."""
    total, number = planned(card).wanted[planned(card).index].total, tier_of(card)
    text = f"{NAMES[card]}: tier {number}, {total:,} tokens; at most {longest(card):,}"
    return Found(text, number)


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
        f"{tokens:,} tokens are {tokens / base:.0f} times {base}, and {tokens / native:.1f} times the {native:,} that "
        f"{MODEL} was made for",
        tokens / base,
    )


def epochs_take(document: Document, card: str, tier: int, epochs: int, days: float) -> Found:
    """What so many epochs of a single sequence of a tier take, at the card's peak rates and as estimated."""
    time = _found(at_tier(card, (SECONDS,), tier, fitting=False)).time
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
    best = at_tier(card, (SECONDS,), tier, fitting=True) or _found(at_tier(card, (SECONDS,), tier, fitting=False))
    step = float(best.time.estimate[0])
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


def card_memory(document: Document, card: str) -> Found:
    """As sold, as CUDA shows it, and what a plan may use; the value is GiB as sold."""
    profile = load_profile(card)
    sold, visible = int(profile.memory_bytes.value or 0), int(profile.visible_bytes.value or 0)
    text = (
        f"{sold / GIB:g} GiB as sold; CUDA shows {format_bytes(visible)}, and {format_bytes(budget(card))} are for use"
    )
    return Found(text, sold / GIB)


def against(document: Document, card: str, other: str) -> Found:
    """What two cards reach."""
    told = "; ".join(f"{NAMES[each]}: tier {tier_of(each)}, at most {longest(each):,} tokens" for each in (card, other))
    return Found(told, holds="yes" if longest(card) >= longest(other) else "no")


def half_rate(document: Document, cards: list[str]) -> Found:
    """Peak rate in 16 bits over that in float32."""
    told, ratios = [], []
    for card in cards:
        profile = load_profile(card)
        half, single = (profile.rates[name].value for name in ("fp16", "fp32"))
        ratios.append(float(half or 0) / float(single or 1))
        told.append(f"{ratios[-1]:.1f} on {NAMES[card]}{'' if profile.supports_bf16 else ' (which has no BF16)'}")
    held = {abs(ratio / 2 - 1) <= 0.05 for ratio in ratios}
    return Found(
        f"peak FP16 rate over FP32: {', '.join(told)}",
        holds="in part" if len(held) > 1 else "yes" if True in held else "no",
    )


def stage(document: Document, card: str, tokens: int) -> Found:
    """Whether a stage of the curriculum fits."""
    fits = longest(card) >= tokens
    told = "fit" if fits else "do not fit"
    return Found(
        f"{tokens:,} tokens {told} on {NAMES[card]} ({longest(card):,} at most)", holds="yes" if fits else "no"
    )


def curriculum(document: Document, card: str, stages: list[int]) -> Found:
    """Estimated time of as many tokens in each stage, against all of them at the longest."""
    each = [float(fastest(card, length, length, NO_TIER_RANK).time.estimate[0]) / length for length in stages]
    saved = 1 - sum(each) / len(each) / each[-1]
    text = (
        f"as many tokens in each stage, {stages[0]:,} to {stages[-1]:,} long, are estimated to take "
        f"{100 * saved:.0f} % "
        "less time than all at the longest; whether as much is learned is not shown"
    )
    return Found(text, 100 * saved, holds="in part")


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
        card_memory,
        against,
        half_rate,
        stage,
        curriculum,
        least_at,
        peak_of,
        per_gigabyte,
    )
}
