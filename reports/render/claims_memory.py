"""The claims document's tables of memory and of tiers, line by line beside what the planner computes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

from planner.calibration import calibration
from planner.ledger import Device, Phase
from planner.model import load_model
from planner.optimizations import all_optimizations
from planner.tiers import TIERS
from planner.units import format_seconds
from reports.render.claims_data import Document, MemoryLine, MemoryTable, TierLine, gigabytes
from reports.render.claims_plans import NAMES, Run, budget, composed, least_memory, planned, run, tier_fits, verdict
from reports.render.claims_terms import states
from reports.render.figures import CARD, MODEL
from reports.render.markdown import table

CARDS = ("rtx2060s", "rtx3090", "rtx4090")
KEPT_ALIVE = 1_000_000  # bytes below which a term is not named


@dataclass(frozen=True)
class Computed:
    """The run that a table is computed for, in the phase that takes most of the card; bytes."""

    one: Run
    phase: str
    terms: dict[str, int]

    @property
    def total(self) -> int:
        """Expected peak."""
        return sum(self.terms.values())

    @property
    def bound(self) -> int:
        """Bound on what is reserved."""
        return self.total + int(calibration().reserve_bytes(self.total, "gpu"))

    def of(self, groups: tuple[str, ...]) -> dict[str, int]:
        """The terms of some groups."""
        return {name: size for name, size in self.terms.items() if name.partition("/")[0] in groups and size}


def compute(given: MemoryTable) -> Computed:
    """The run of a table: its own optimisations, or those that take least of the reference card."""
    if given.choices:
        one = composed(given.choices, given.tokens, given.target, given.rank)
    else:
        configuration = least_memory(CARD, given.tokens, given.target, given.rank).configuration
        one = run(configuration, given.tokens, given.target, given.rank)
    phases = one.phases()
    highest = max(phases, key=lambda phase: sum(phases[phase].values()))
    terms = dict(phases[highest])
    if given.weights == "int8":  # no optimisation here holds eight-bit weights: a byte for each, no scales
        terms["weights/linear"] = int(one.letters.L * one.letters.P)
    return Computed(one, highest.value, terms)


def memory(given: MemoryTable) -> str:
    """One table of memory, and what has no line in it."""
    found = compute(given)
    rows = [_row(part, found) for part in given.parts]
    named = {group for part in given.parts for group in part.groups}
    others = sorted({name.partition("/")[0] for name in found.terms} - named)
    for group in others:
        size = sum(found.of((group,)).values())
        rows.append(
            ("–", f"{group}, which has no line there", "–", gigabytes(size), "computed", _terms(found, (group,)))
        )
    added = sum(part.claimed for part in given.parts)
    right = "adds up" if abs(added - given.total.claimed) < 0.005 else f"its lines add up to {added:.2f} GB"
    rows.append(
        (
            str(given.total.line),
            given.total.name,
            f"{given.total.claimed:.2f} GB; {right}",
            gigabytes(found.total),
            "computed",
            f"expected peak, in the phase {found.phase}",
        )
    )
    rows.append(_headroom(given.headroom, found))
    return (
        f"### {given.title}\n\n{_conditions(given, found)}\n\n"
        + table(("line>", "what", "claimed>", "true>", "state", "from"), rows)
        + f"\n{_notes(given, found)}\n"
    )


def _row(part: MemoryLine, found: Computed) -> tuple[str, ...]:
    size = sum(found.of(part.groups).values())
    told = _terms(found, part.groups) if size else "no term: a training step has none"
    return str(part.line), part.name, f"{part.claimed:.2f} GB", gigabytes(size), "computed", told


def _terms(found: Computed, groups: tuple[str, ...]) -> str:
    terms = found.of(groups)
    shown = [name for name in sorted(terms, key=lambda name: -terms[name]) if terms[name] >= KEPT_ALIVE] or list(terms)
    return ", ".join(f"`{name}`" for name in shown)


def _headroom(line: MemoryLine | None, found: Computed) -> tuple[str, ...]:
    left = budget(CARD) - found.bound
    told = gigabytes(left) if left >= 0 else f"lacks {gigabytes(-left)}"
    source = f"budget of {NAMES[CARD]}, {gigabytes(budget(CARD))}, less the bound on what is reserved"
    if line is None:
        return "–", "left on the card", "–", told, "computed", source
    return str(line.line), line.name, f"{line.claimed:.2f} GB", told, "computed", source


def _conditions(given: MemoryTable, found: Computed) -> str:
    on = ", ".join(f"`{name}`" for name in found.one.configuration.ids)
    how = "given" if given.choices else f"those that take least of {NAMES[CARD]}, whatever host and time allow"
    base = (
        "" if given.weights == "nf4" else " Linears are taken at one byte a weight, which no optimisation here offers."
    )
    return (
        f"Computed for {MODEL}, {given.tokens:,} tokens in all, {given.target:,} of them trained, rank {given.rank}; "
        f"optimisations {how}: {on}.{base}"
    )


def _notes(given: MemoryTable, found: Computed) -> str:
    x = found.one.letters
    state = given.tokens * x.D * x.a // 8
    keys = 2 * given.tokens * x.K * x.E * x.a // 8
    pinned = sum(max(found.one.phases((Device.PINNED,)).values(), key=lambda terms: sum(terms.values())).values())
    host = f" Host RAM holds {gigabytes(pinned)} of checkpoints beside it." if pinned else ""
    backward = found.one.phases()[Phase.BACKWARD]
    live = sum(size for name, size in backward.items() if name.partition("/")[0] in ("activations", "attention"))
    later = "" if found.phase == Phase.BACKWARD else f" In the phase backward the activations are {gigabytes(live)}."
    return (
        f"One hidden state of that length is {gigabytes(state)}; keys and values of one layer are "
        f"{gigabytes(keys)}, which "
        f"live while that layer is differentiated and are counted among the activations.{later}{host}"
    )


# --- Tiers ------------------------------------------------------------------------------------------------


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
