"""Counts and pure arithmetic: what follows from the claims document's own figures, and from lists kept here."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

from planner.compose import compose, problems
from planner.evaluate import Evaluator
from planner.explain_formulas import Run as Explained
from planner.explain_formulas import planned_run, run_without
from planner.hardware import load_profile
from planner.ledger import Device
from planner.model import load_model
from planner.optimizations import all_items, all_optimizations, given_items
from planner.optimizations.base import Situation
from planner.planning import HOST_BYTES
from planner.sets import largest_set
from planner.tiers import TIERS
from reports.render.claims_data import Document, Found, listed
from reports.render.claims_plans import planned
from reports.render.figures import CARD, MODEL, reference_plan

EXTREME = "tier 4"
ARXIV = re.compile(r"\d{4}\.\d{5}")


def counted(document: Document, section: str = "") -> int:
    """Numbered items, of one section or of all."""
    return sum(last - first + 1 for name, (first, last) in document.items.items() if section in ("", name))


def items(document: Document) -> Found:
    """How many items are numbered, standard and extreme."""
    everything, extreme = counted(document), counted(document, EXTREME)
    return Found(f"{everything} are numbered: {everything - extreme} standard and {extreme} EXTREME", everything)


def halves(document: Document, standard: int, extreme: int) -> Found:
    """A split into standard and extreme, beside the list's own."""
    own = counted(document, EXTREME)
    right = (standard, extreme) == (counted(document) - own, own)
    text = f"{standard} + {extreme} is {standard + extreme}; the list has {counted(document) - own} + {own}"
    return Found(text, holds="yes" if right else "no")


def extreme_members(document: Document, named: int, counted_again: int) -> Found:
    """How many optimisations are called extreme in three places."""
    own = counted(document, EXTREME)
    text = f"{named} are named here, {own} are listed under that heading, {counted_again} are counted on line 364"
    return Found(text, holds="yes" if named == own == counted_again else "no")


def numbers() -> dict[int, list[str]]:
    """For each item that is realised here the optimisations that do."""
    found: dict[int, list[str]] = {}
    for name, each in all_items().items():
        for number in each.numbers:
            found.setdefault(number, []).append(name)
    return dict(sorted(found.items()))


@cache
def idle() -> tuple[int, ...]:
    """Items for which nothing can be switched on and that no run of the page's model on its card has."""
    situation = Situation(load_profile(CARD), load_model(MODEL), HOST_BYTES)
    at_work = {number for each in all_optimizations().values() for number in each.numbers}
    for each in given_items().values():
        if each.state(situation)[0] == "always":
            at_work |= {*each.numbers}
    return tuple(number for number in numbers() if number not in at_work)


def realised(document: Document) -> Found:
    """How many of the items the planner has."""
    have = [number for number in numbers() if number not in idle()]
    text = (
        f"{len(have)} of the {counted(document)} items are at work here, by choice of a plan or in every run; {MODEL} "
        f"on one card has nothing to do for {listed(list(idle()))}"
    )
    return Found(text, len(have))


def complete(document: Document) -> Found:
    """The same as a share of all; the value is in percent."""
    found = realised(document)
    assert found.value is not None
    share = 100 * found.value / counted(document)
    return Found(f"{share:.0f} %: {found.text}", share)


def together(document: Document) -> Found:
    """How many of the items are on together in the reference plan."""
    on = planned(CARD).best.configuration.ids
    have = [number for number, names in numbers().items() if set(names) & set(on)]
    endless = 2**50  # bytes of host and disk, so that nothing is left out for want of them
    most = largest_set(Situation(load_profile(CARD), load_model(MODEL), endless, disk_bytes=endless))
    could = {number for name in most for number in all_optimizations()[name].numbers}
    text = (
        f"{len(have)} items are on together in the plan of `plan --gpu {CARD}` ({listed(have)}); at most {len(most)} "
        f"optimisations of {len(could)} items can be on together there, all of them asked for"
    )
    return Found(text, len(have))


def duplicates(document: Document) -> Found:
    """Items that one and the same optimisation realises."""
    twice = {name: each.numbers for name, each in all_items().items() if len(each.numbers) > 1}
    twice |= {
        each.again: (*all_optimizations()[each.again].numbers, *each.numbers)
        for each in given_items().values()
        if each.again
    }
    told = "; ".join(f"{' and '.join(map(str, each))} are both `{name}`" for name, each in twice.items())
    return Found(
        f"items {told}; 3 and 35 are two stages of one thing, of which one can be on", holds="no" if twice else "yes"
    )


def item_again(document: Document, item: int, first: int) -> Found:
    """Whether an item is another one over again; the value is what it adds, in GB."""
    again = {each.again for each in given_items().values() if item in each.numbers}
    same = sorted(again & {*numbers()[first]})
    assert same, f"item {item} is not item {first} again here"
    return Found(f"0 GB: it is item {first} counted again (`{same[0]}` is both)", 0.0)


def memory_items(document: Document) -> Found:
    """How many items lower the peak of the reference plan when they are switched on."""
    plan = reference_plan()
    explained: Explained = planned_run(plan)
    on = set(explained.configuration.ids)
    lower = {number for name, gain in gains().items() if gain > 0 for number in all_optimizations()[name].numbers}
    found, index = planned(CARD), plan.tier - 1 if plan.tier else 0
    evaluate = Evaluator(found.candidates, found.situation, found.constants, found.limits)
    for name in set(all_optimizations()) - on:  # what is off in the plan may lower its peak all the same
        if problems(on | {name}, found.situation):
            continue
        having = evaluate(compose(on | {name}, found.best.configuration.knobs, found.situation))
        if int(having.expected[index]) < int(found.best.expected[index]):
            lower |= set(all_optimizations()[name].numbers)
    have = sorted(lower)
    return Found(f"{len(have)} items lower the peak here: {listed(have)}", len(have))


def gains() -> dict[str, int]:
    """By how many bytes the reference plan's peak is higher without each optimisation, and what hangs on it."""
    explained: Explained = planned_run(reference_plan())
    names = [name for name in explained.configuration.ids if "adapters/weights" not in all_optimizations()[name].makes]
    return {name: _peak(run_without(name, explained)) - _peak(explained) for name in names}


def _peak(one: Explained) -> int:
    by_phase = one.configuration.ledger.by_phase(one.letters, (Device.GPU,))
    return max(sum(int(size) for size in terms.values()) for terms in by_phase.values())


def backing() -> dict[str, list[str]]:
    """For each arXiv number the optimisations here that give it as evidence."""
    found: dict[str, list[str]] = {}
    for name, each in all_optimizations().items():
        for number in dict.fromkeys(number for one in each.evidence for number in ARXIV.findall(one.source)):
            found.setdefault(number, []).append(name)
    return found


def papers(document: Document) -> Found:
    """How many papers are listed, and how many of them optimisations here rest on."""
    used = [paper.name for paper in document.papers if paper.arxiv in backing()]
    text = f"{len(document.papers)} are listed; {len(used)} of them back an optimisation here ({', '.join(used)})"
    return Found(text, len(document.papers), "in part")


def tiers_counted(document: Document) -> Found:
    """How many tiers the planner has."""
    return Found(f"{len(TIERS)} tiers", len(TIERS))


def length(document: Document, tokens: int) -> Found:
    """A length in tokens, and the tier whose context it is."""
    tier = next((tier for tier in TIERS if tier.context == tokens), None)
    told = f"; tier {tier.number} is {tier.total:,} with its target" if tier else ""
    return Found(f"{tokens:,} tokens{told}", tokens)


def tier_of_length(document: Document, tokens: int) -> Found:
    """The tier whose context a length is."""
    tier = next(tier for tier in TIERS if tier.context == tokens)
    text = (
        f"{tokens:,} tokens are tier {tier.number}; tier 9 is {TIERS[8].context:,}. On one card there is no ring at all"
    )
    return Found(text, tier.number)


def sum_of(document: Document, parts: list[float], told: str, unit: str = "GB") -> Found:
    """The sum of claimed figures."""
    total = round(sum(parts), 6)
    return Found(f"adds up to {total:.2f} {unit}; {told}", total, arithmetic=True)


def epoch(document: Document, days: float, epochs: int, elsewhere: float) -> Found:
    """Hours of an epoch, beside what is said elsewhere; the value is in hours."""
    hours = days * 24 / epochs
    return Found(
        f"{hours:.2f} hours an epoch, where the benchmarks say {elsewhere}; how much data an epoch is, is not said",
        hours,
        "in part" if abs(hours / elsewhere - 1) < 0.05 else "no",
    )


def faster(document: Document, before: tuple[float, int], after: tuple[float, int], elsewhere: float) -> Found:
    """Time of two trainings in days and epochs; the value is the share of an epoch saved, in percent."""
    each = [24 * days / epochs for days, epochs in (before, after)]
    whole, single = 100 * (1 - after[0] / before[0]), 100 * (1 - each[1] / each[0])
    again = elsewhere * after[1] / 24
    text = (
        f"{whole:.0f} % less in all, but for {after[1]} epochs instead of {before[1]}: {single:.0f} % an epoch. "
        f"At the {elsewhere} hours of line 336 it is {again:.1f} days"
    )
    return Found(text, single)


def slower(document: Document, before: float, after: float) -> Found:
    """Hours of an epoch, before and after; the value is percent of time saved."""
    saved = 100 * (1 - after / before)
    return Found(f"{after} hours are {-saved:.0f} % more than {before}", saved)


def wasted(document: Document, actual: int, padded: int) -> Found:
    """Share of padding, in percent."""
    share = 100 * (1 - actual / padded)
    return Found(
        f"{share:.1f} %, as long as all is padded to {padded}K; a batch of one needs no padding", share, arithmetic=True
    )


def useful(document: Document, rows: tuple[float, float], padded: float) -> Found:
    """The share of tokens that are no padding in the document's own example; the value is in percent."""
    share = 100 * sum(rows) / (len(rows) * padded)
    return Found(f"{share:.1f} % of the tokens are no padding by its own lines 249 and 250", share)


def packed(
    document: Document, used: tuple[float, float], after: float, rows: tuple[float, float], padded: float
) -> Found:
    """Gain from fuller rows by the document's utilisation, and by its own example."""
    low, high = after / used[1], after / used[0]
    example = 2 * padded / sum(rows)
    text = (
        f"{low:.1f} to {high:.1f} from {used[0]:g}–{used[1]:g} % to {after:g} %, but {example:.1f} by the example of "
        "lines 249 and 250; 1 where each sequence is a step of its own, without padding, as here"
    )
    return Found(text, holds="in part")


def contradiction(document: Document, said: float, elsewhere: float) -> Found:
    """Two figures for the same thing."""
    return Found(f"line 255 says {elsewhere:g} % is used, so {100 - elsewhere:g} % would be wasted", 100 - elsewhere)


def block_share(document: Document, block: int, tokens: int) -> Found:
    """One less the share of a block, in percent."""
    return Found(
        f"{100 * (1 - block / tokens):.1f} %, of a matrix that exact attention never stores",
        100 * (1 - block / tokens),
        "in part",
    )


def precision_factor(document: Document, before: float, after: float) -> Found:
    """A factor that memory is said to be proportional to; the value is how much longer a sequence could be."""
    more = 100 * (before / after - 1)
    text = (
        f"a factor of an estimate, which saves nothing. {before} to {after} would be "
        f"{100 * (1 - after / before):.1f} % "
        f"less and {more:.0f} % more context; {after} is {100 * (1 - after):.0f} % less than none, and line 32 says 80"
    )
    return Found(text, more)


def improvement(document: Document, context: int) -> Found:
    """A context over 256 tokens and over the model's own; the value is the first."""
    native = load_model(MODEL).native_context
    text = (
        f"{context / 256:.0f} times a baseline of 256 tokens, {context / native:.0f} times the model's own {native:,}"
    )
    return Found(text, context / 256, "in part")


def own_factor(document: Document, before: float, factors: list[float]) -> Found:
    """What the document's own factors make of its own figure; the value is in GB."""
    value = before
    for factor in factors:
        value *= factor
    return Found(
        f"{before:.2f} GB by its own factors ({' × '.join(f'{f:.4g}' for f in factors)}) is {value:.3g} GB",
        value,
        arithmetic=True,
    )


def difference(document: Document, whole: float, part: float, unit: str = "GB") -> Found:
    """A difference of claimed figures."""
    return Found(f"{whole:g} − {part:g} is {whole - part:.2f} {unit}", whole - part, arithmetic=True)


def same_for_twice(document: Document, value: float, line: int) -> Found:
    """A figure for 512K that stands for 256K as well; the value is what it is in proportion, in GB."""
    text = (
        f"{value:.2f} GB is the figure for half the length too, on line {line}; in proportion it is {2 * value:.2f} GB"
    )
    return Found(text, 2 * value)


def longer_for_less(document: Document, shorter: float, longer: float) -> Found:
    """A sum for a length beside that for half of it."""
    return Found(f"adds up, yet it is less than the {shorter:.2f} GB of half the length", longer, "in part")


def largest(document: Document, savings: list[float], claimed: float) -> Found:
    """Whether a claimed saving is the largest of all."""
    right = claimed == max(savings)
    return Found(f"{max(savings):.2f} GB is the largest on the list", holds="in part" if right else "no")


def pruning(document: Document, kept: int, of: int) -> Found:
    """Disk space saved where so many of so many stored states are kept; the value is in percent."""
    share = 100 * (1 - kept / of)
    text = (
        f"keeping {kept} of {of} saves {share:.0f} %, by arithmetic; here one state is stored, over the last one, "
        f"which is {100 * (1 - 1 / of):.0f} % less than {of}"
    )
    return Found(text, share, arithmetic=True)


def own_multiplier(document: Document, before: tuple[float, float], after: tuple[float, float]) -> Found:
    """Context for each GB, by the document's own figures."""
    ratio = (after[0] / after[1]) / (before[0] / before[1])
    return Found(f"{ratio:.0f} times by its own figures; {after[0] / before[0]:.0f} is the ratio of the lengths", ratio)


def ends_at(document: Document, epochs: list[int]) -> Found:
    """Where a schedule of 25 epochs stands after fewer."""
    stages = {5: "16K", 10: "32K", 15: "64K", 20: "128K", 25: "256K–1M"}
    told = ", ".join(f"{stages[min(last for last in stages if last >= count)]} after {count}" for count in epochs)
    return Found(f"25 epochs, where the runs above have {', '.join(map(str, epochs))}: they end at {told}", holds="no")


COMPUTATIONS: Mapping[str, Callable[..., Any]] = {
    each.__name__: each
    for each in (
        items,
        halves,
        extreme_members,
        realised,
        complete,
        together,
        duplicates,
        item_again,
        memory_items,
        papers,
        tiers_counted,
        length,
        tier_of_length,
        sum_of,
        epoch,
        faster,
        slower,
        wasted,
        packed,
        contradiction,
        block_share,
        precision_factor,
        improvement,
        own_factor,
        difference,
        same_for_twice,
        longer_for_less,
        largest,
        pruning,
        useful,
        own_multiplier,
        ends_at,
    )
}
