"""reports/claims.yaml: what the claims document says, line by line, and by which computation it is held to account."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, model_validator

PATH = Path(__file__).resolve().parents[1] / "claims.yaml"
TOLERANCE = 0.05  # by which a claimed figure may be off and still hold; whole numbers may not

Holds = Literal["yes", "no", "in part"]
State = Literal["computed", "measured", "not yet"]
Figure = int | float


@dataclass(frozen=True)
class Found:
    """What a computation gives.

    Attributes:
        text: what is true, in a few words.
        value: the figure to hold the claimed one to; None where the text says all.
        holds: whether the claim holds, where comparing figures would not tell.
        arithmetic: the document's own figures alone are put together; equal figures are right in part then.
    """

    text: str
    value: float | None = None
    holds: Holds | None = None
    arithmetic: bool = False


class Strict(BaseModel):
    """No key that is not known."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Claim(Strict):
    """One statement. Exactly one of ``computed``, ``measured`` and ``not_yet`` is given, and that is its state.

    Attributes:
        line: of the claims document.
        claim: what is claimed, in words of our own.
        claimed: the figure as it is written there.
        figure: the same as a number, or the ends of a range; in the unit of what the computation gives.
        computed, measured: name of a computation, or the name with its arguments.
        not_yet: what would show it.
        sources: what the true value comes from; the first word says of what kind it is.
    """

    line: int = Field(ge=1)
    claim: str = Field(min_length=1)
    claimed: str = Field(min_length=1)
    figure: Figure | tuple[Figure, Figure] | None = None
    computed: str | dict[str, dict[str, Any]] | None = None
    measured: str | dict[str, dict[str, Any]] | None = None
    not_yet: str | None = None
    sources: tuple[str, ...] = Field(alias="from", default=())

    @model_validator(mode="after")
    def _one_state(self) -> Claim:
        given = [state for state in (self.computed, self.measured, self.not_yet) if state is not None]
        if len(given) != 1:
            raise ValueError(f"line {self.line}: give one of computed, measured and not_yet")
        if self.not_yet is None and not self.sources:
            raise ValueError(f"line {self.line}: says nothing of where its value comes from")
        return self

    @property
    def state(self) -> State:
        """How the true value is known."""
        return "computed" if self.computed is not None else "measured" if self.measured is not None else "not yet"

    @property
    def computation(self) -> tuple[str, dict[str, Any]] | None:
        """Name and arguments of the computation; None where there is none yet."""
        given = self.computed if self.computed is not None else self.measured
        if given is None:
            return None
        if isinstance(given, str):
            return given, {}
        ((name, arguments),) = given.items()
        return name, arguments

    def holds(self, found: Found) -> Holds | None:
        """Whether the claim holds; None where nothing decides it."""
        if found.holds is not None or found.value is None or self.figure is None:
            return found.holds
        low, high = self.figure if isinstance(self.figure, tuple) else (self.figure, self.figure)
        whole = isinstance(low, int) and isinstance(high, int)
        slack = 0.0 if whole else TOLERANCE
        if not low * (1 - slack) <= found.value <= high * (1 + slack):
            return "no"
        return "in part" if found.arithmetic else "yes"


class MemoryLine(Strict):
    """A line of one of the document's tables of memory: its name, its gigabytes, the groups of terms it stands for.

    ``about``: the document has a tilde before the figure.
    """

    line: int
    name: str
    claimed: float
    about: bool = False
    groups: tuple[str, ...] = ()

    @property
    def written(self) -> str:
        """The claimed figure as it stands there."""
        return f"{'~' if self.about else ''}{self.claimed:.2f} GB"

    def holds(self, true: float) -> Holds:
        """Whether so many bytes are what is claimed."""
        return "yes" if abs(true / 1e9 - self.claimed) <= TOLERANCE * self.claimed else "no"


class MemoryTable(Strict):
    """One of the document's tables of memory, and the run that its lines are computed for.

    Attributes:
        choices: optimisations that are on; empty for those that take least memory on the card.
        required, excluded: where ``choices`` is empty, those that have to be on, and those that have to be off.
        weights: ``nf4`` or ``int8``, how the linears are held.
        parts: the lines that are summed.
        total, headroom: line and claimed gigabytes of the sum and of what is left of the card, where they are claimed.
    """

    title: str
    tokens: int
    target: int
    rank: int
    choices: tuple[str, ...] = ()
    required: tuple[str, ...] = ()
    excluded: tuple[str, ...] = ()
    weights: Literal["nf4", "int8"] = "nf4"
    parts: tuple[MemoryLine, ...]
    total: MemoryLine | None = None
    headroom: MemoryLine | None = None

    @property
    def rows(self) -> tuple[MemoryLine, ...]:
        """Every line of the document that it has a row for."""
        return (*self.parts, *(line for line in (self.total, self.headroom) if line))


class TierLine(Strict):
    """A row of the document's table of tiers, as written."""

    line: int
    tier: int
    context: str
    target: str
    total: str
    rank: int
    improvement: int
    requirement: str


class Paper(Strict):
    """A paper that the document lists: the year it gives, there and on other lines, and the arXiv number.

    ``arxiv`` is None for a paper that is not on arXiv, and ``year`` for one that is given none.
    """

    line: int
    also: tuple[int, ...] = ()
    name: str
    year: int | None
    arxiv: str | None = Field(pattern=r"^\d{4}\.\d{5}$")


class SetAside(Strict):
    """Lines that hold a digit, or speak of all or none, and yet state no quantity; and why."""

    lines: tuple[int, ...]
    why: str


class Section(Strict):
    """A part of the report: the claims from this line on."""

    line: int
    title: str


class Document(Strict):
    """All of reports/claims.yaml.

    Attributes:
        sha256: of the text of the claims document.
        numbers: for each line that holds a numeric statement its numbers, as ``claims_source.figures`` reads them, or
            what it says in place of one.
        items: the numbered items, section by section: first and last.
        item_lines: the line on which each item begins, in the order of their numbers.
        papers: those listed.
    """

    date: str
    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    numbers: dict[int, str]
    set_aside: tuple[SetAside, ...]
    sections: tuple[Section, ...]
    items: dict[str, tuple[int, int]]
    item_lines: tuple[int, ...]
    papers: tuple[Paper, ...]
    claims: tuple[Claim, ...]
    memory: tuple[MemoryTable, ...]
    tiers: tuple[TierLine, ...]

    @property
    def lines(self) -> tuple[int, ...]:
        """Numbers of the lines that hold a numeric statement."""
        return tuple(self.numbers)

    def rows(self) -> dict[int, list[tuple[str, str]]]:
        """For each line its rows in all tables: what is claimed in our words, and the figures as written there."""
        found: dict[int, list[tuple[str, str]]] = {}
        for claim in self.claims:
            found.setdefault(claim.line, []).append((claim.claim, claim.claimed))
        for line in (line for table in self.memory for line in table.rows):
            found.setdefault(line.line, []).append((line.name, line.written))
        for tier in self.tiers:
            written = (tier.tier, tier.context, tier.target, tier.total, tier.rank, f"{tier.improvement}x")
            found.setdefault(tier.line, []).append((tier.requirement, ", ".join(map(str, written))))
        for paper in self.papers:
            for number in (paper.line, *paper.also):
                found.setdefault(number, []).append((paper.name, str(paper.year or "no year")))
        return found


@cache
def document() -> Document:
    """The shipped file."""
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    return Document.model_validate(yaml.load(PATH.read_text(encoding="utf-8"), Loader=loader))


def gigabytes(size: float) -> str:
    """Bytes as the document writes them: GB of 10⁹ bytes, with as many digits as say something."""
    value = size / 1e9
    digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2 if abs(value) >= 0.1 else 3
    return f"{value:,.{digits}f} GB" if size else "0 GB"


def scientific(value: float) -> str:
    """A large number as a product with a power of ten."""
    digits, _, power = f"{value:.1e}".partition("e")
    return f"{digits} × 10{str(int(power)).translate(str.maketrans('0123456789', '⁰¹²³⁴⁵⁶⁷⁸⁹'))}"


def listed(numbers: tuple[int, ...] | list[int]) -> str:
    """Numbers in a sentence, runs of them drawn together."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}–{run[-1]}" for run in runs)
