"""The claims document's tables of memory, line by line beside what the planner computes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from planner.calibration import calibration
from planner.ledger import Device, Phase
from planner.markdown import table
from reports.render.claims_data import Document, Found, MemoryLine, MemoryTable, gigabytes
from reports.render.claims_plans import NAMES, Run, budget, composed, least_memory, run
from reports.render.figures import CARD, MODEL

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


@cache
def compute(given: MemoryTable) -> Computed:
    """The run of a table: its own optimisations, or of the sets with some on those that take least of the card."""
    length = (given.tokens, given.target, given.rank)
    if given.choices:
        one = composed(given.choices, *length)
    else:
        one = run(least_memory(CARD, *length, given.required, given.excluded).configuration, *length)
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
            ("–", f"{group}, which has no line there", "–", gigabytes(size), "–", "computed", _terms(found, (group,)))
        )
    rows.append(_total(given, found))
    rows.append(_headroom(given.headroom, found))
    return (
        f"### {given.title}\n\n{_conditions(given, found)}\n\n"
        + table(("line>", "what", "claimed>", "true>", "holds", "state", "from"), rows)
        + f"\n{_notes(given, found)}\n"
    )


def _row(part: MemoryLine, found: Computed) -> tuple[str, ...]:
    size = sum(found.of(part.groups).values())
    told = _terms(found, part.groups) if size else "no term: a training step has none"
    return str(part.line), part.name, part.written, gigabytes(size), marked(part.holds(size)), "computed", told


def _total(given: MemoryTable, found: Computed) -> tuple[str, ...]:
    source = f"expected peak, in the phase {found.phase}"
    if given.total is None:
        return "–", "all of it", "–", gigabytes(found.total), "–", "computed", source
    added = sum(part.claimed for part in given.parts)
    right = "adds up" if abs(added - given.total.claimed) < 0.005 else f"its lines add up to {added:.2f} GB"
    held = marked(given.total.holds(found.total))
    told = f"{given.total.written}; {right}"
    return str(given.total.line), given.total.name, told, gigabytes(found.total), held, "computed", source


def marked(held: str) -> str:
    """A verdict as the report shows it: what does not hold stands out."""
    return f"**{held}**" if held == "no" else held


def _terms(found: Computed, groups: tuple[str, ...]) -> str:
    terms = found.of(groups)
    shown = [name for name in sorted(terms, key=lambda name: -terms[name]) if terms[name] >= KEPT_ALIVE] or list(terms)
    return ", ".join(f"`{name}`" for name in shown)


def _headroom(line: MemoryLine | None, found: Computed) -> tuple[str, ...]:
    left = budget(CARD) - found.bound
    told = gigabytes(left) if left >= 0 else f"lacks {gigabytes(-left)}"
    source = f"budget of {NAMES[CARD]}, {gigabytes(budget(CARD))}, less the bound on what is reserved"
    if line is None:
        return "–", "left on the card", "–", told, "–", "computed", source
    return str(line.line), line.name, line.written, told, marked(line.holds(left)), "computed", source


def _conditions(given: MemoryTable, found: Computed) -> str:
    on = ", ".join(f"`{name}`" for name in found.one.configuration.ids)
    of = " of the sets with the document's items" if given.required else ""
    how = "given" if given.choices else f"those that take least of {NAMES[CARD]}{of}, whatever host and time allow"
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
    host = f" Host RAM holds {gigabytes(pinned)} beside it." if pinned else ""
    if given.excluded:
        least = int(least_memory(CARD, given.tokens, given.target, given.rank).expected[0])
        host += f" With other sets, such as weights of layers in host memory, the peak is {gigabytes(least)} at least."
    backward = found.one.phases()[Phase.BACKWARD]
    live = sum(size for name, size in backward.items() if name.partition("/")[0] in ("activations", "attention"))
    later = "" if found.phase == Phase.BACKWARD else f" In the phase backward the activations are {gigabytes(live)}."
    return (
        f"One hidden state of that length is {gigabytes(state)}; keys and values of one layer are "
        f"{gigabytes(keys)}, which "
        f"live while that layer is differentiated and are counted among the activations.{later}{host}"
    )


# --- What rows of the report ask for ----------------------------------------------------------------------


def of_line(document: Document, line: int) -> int:
    """Bytes that the planner has for a line of a table of memory."""
    for given in document.memory:
        if given.total is not None and given.total.line == line:
            return compute(given).total
        for part in given.parts:
            if part.line == line:
                return sum(compute(given).of(part.groups).values())
    raise AssertionError(f"line {line} is in no table of memory")


def less(document: Document, before: int, after: int) -> Found:
    """What the planner has for one line of memory over what it has for another; the value is in GB."""
    sizes = [of_line(document, line) for line in (before, after)]
    text = f"{gigabytes(sizes[0])} on line {before} to {gigabytes(sizes[1])} on line {after}: "
    saved = sizes[0] - sizes[1]
    return Found(text + (f"{gigabytes(saved)} less" if saved >= 0 else f"{gigabytes(-saved)} more"), saved / 1e9)


def too_much(document: Document, line: int) -> Found:
    """Whether a sum is more than the reference card has for use."""
    size = of_line(document, line)
    text = f"{gigabytes(size)} as the planner has it, and {gigabytes(budget(CARD))} of {NAMES[CARD]} are for use"
    return Found(text, holds="yes" if size > budget(CARD) else "no")


COMPUTATIONS: Mapping[str, Callable[..., Any]] = {each.__name__: each for each in (less, too_much)}
