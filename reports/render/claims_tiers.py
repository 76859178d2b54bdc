"""The claims document's table of tiers, line by line beside what the planner computes."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction

from planner.markdown import table
from planner.model import load_model
from planner.optimizations import all_optimizations
from planner.tiers import TIERS
from planner.units import format_seconds
from reports.render.claims_data import Document, TierLine, gigabytes
from reports.render.claims_plans import NAMES, planned, tier_fits, verdict
from reports.render.claims_terms import states
from reports.render.figures import CARD, MODEL

CARDS = ("rtx2060s", "rtx3090", "rtx4090")


def tiers(document: Document) -> str:
    """The document's table of tiers, in two tables."""
    lengths = table(
        (
            "line>",
            "tier>",
            "claimed",
            "true tokens>",
            "K is",
            "adds up as written",
            "rank>",
            "adapters>",
            "gain claimed>",
            "over 256>",
            "over own context>",
        ),
        (_lengths(line) for line in document.tiers),
    )
    verdicts = table(
        ("line>", "tier>", "claimed to need", f"cannot do without, {NAMES[CARD]}", *(NAMES[card] for card in CARDS)),
        (_verdicts(line) for line in document.tiers),
    )
    return (
        "Lengths are context + target = total. `K is` tells for each of the three whether the figure is in units of\n"
        "1,024 or of 1,000 (`M` in their squares): `either` where both round to it, `neither` where none does. The\n"
        f"gain is that of the context alone; {MODEL} was made for {load_model(MODEL).native_context:,} tokens. All\n"
        "rows are computed: from `planner/tiers.py` and the term `adapters/weights`.\n\n"
        f"{lengths}\nWhat `plan --gpu CARD --tier N` says, with {_host()} of host RAM and at most "
        f"{format_seconds(planned(CARD).limits.step_seconds)}\na step. Where a tier does not fit, the least that any "
        "valid set of optimisations would reserve stands beside what\nthere is.\n\n"
        f"{verdicts}"
    )


def _host() -> str:
    return f"{planned(CARD).limits.host_bytes // 2**30} GiB"


def _lengths(line: TierLine) -> tuple[str, ...]:
    tier = TIERS[line.tier - 1]
    assert tier.rank == line.rank
    sizes = ((line.context, tier.context), (line.target, tier.target), (line.total, tier.total))
    native = load_model(MODEL).native_context
    return (
        str(line.line),
        str(line.tier),
        f"{line.context} + {line.target} = {line.total}",
        f"{tier.context:,} + {tier.target:,} = {tier.total:,}",
        ", ".join(unit(text, size) for text, size in sizes),
        adds_up(line.context, line.target, line.total),
        str(line.rank),
        gigabytes(states(line.rank)["adapters"]),
        f"{line.improvement:,}",
        f"{tier.context / 256:,.0f}",
        f"{tier.context / native:,.0f}",
    )


def parts(text: str) -> tuple[Fraction, int, str]:
    """Number, digits behind its point, and suffix of a length as written."""
    digits = text.rstrip("KM")
    return Fraction(digits), len(digits.partition(".")[2]), text[len(digits) :]


def unit(text: str, tokens: int) -> str:
    """In which units a written length rounds to a number of tokens."""
    value, places, suffix = parts(text)
    if not suffix:
        return "plain" if value == tokens else "neither"
    power = 1 if suffix == "K" else 2
    found = [
        str(base) for base in (1024, 1000) if abs(Fraction(tokens, base**power) - value) <= Fraction(1, 2 * 10**places)
    ]
    return "either" if len(found) == 2 else found[0] if found else "neither"


def adds_up(context: str, target: str, total: str) -> str:
    """Whether written lengths add up as written, K being a thousandth of M and 512 half a K."""
    scale = {"": Fraction(1, 1024), "K": Fraction(1), "M": Fraction(1000)}

    def size(text: str) -> Fraction:
        value, _, suffix = parts(text)
        return value * scale[suffix]

    _, places, suffix = parts(total)
    rounding = scale[suffix] / (2 * 10**places)
    found = size(context) + size(target)
    return "yes" if abs(found - size(total)) <= rounding else f"no: {float(found / scale[suffix]):g}{suffix}"


def needed(number: int) -> list[str]:
    """Optimisations that every fitting set of a tier has, those left out that cost nothing or train."""
    found, known = planned(CARD), all_optimizations()
    level = found.on_card.at(found.candidates, number - 1)
    asked = [name for name, each in known.items() if not each.free and "adapters/weights" not in each.makes]
    return [name for name in asked if tier_fits(CARD, number) and not level.fits(found.limits, (name, False))]


def _verdicts(line: TierLine) -> tuple[str, ...]:
    def names() -> Iterator[str]:
        yield from (f"`{name}`" for name in needed(line.tier))

    told = ", ".join(names()) or "nothing in particular" if tier_fits(CARD, line.tier) else "all there is does not do"
    return str(line.line), str(line.tier), line.requirement, told, *(verdict(card, line.tier) for card in CARDS)
