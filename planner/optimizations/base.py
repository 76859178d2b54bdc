"""What an optimisation is: one class in one file, with its claims, its formulas, its needs, its evidence, its hook."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from dataclasses import dataclass, replace
from typing import ClassVar, Protocol

from planner.hardware import HardwareProfile
from planner.ledger import Ledger
from planner.model import ModelShape
from planner.optimizations.item import Item
from planner.session import Session

Scalar = int | float | str
CAPABILITIES = ((5, 0), (6, 0), (7, 0), (8, 0), (9, 0), (12, 0))
"""Compute capabilities from which on something runs, or runs faster: cards between two of them are alike in that."""


class Chosen(Set[str]):
    """The ids of a set, noting which of them somebody asks for; who looks at all of them asks for ``EVERY``."""

    def __init__(self, ids: Iterable[str], asked: set[str]) -> None:
        self.ids, self.asked = frozenset(ids), asked

    @classmethod
    def _from_iterable(cls, names: Iterable[str]) -> frozenset[str]:  # type: ignore[override]
        return frozenset(names)  # what is made of it is a set like any other

    def __contains__(self, name: object) -> bool:
        self.asked.add(str(name))
        return name in self.ids

    def __iter__(self) -> Iterator[str]:
        self.asked.add(EVERY)
        return iter(self.ids)

    def __len__(self) -> int:
        self.asked.add(EVERY)
        return len(self.ids)

    def __bool__(self) -> bool:
        """Whether a set is looked at: says nothing of what is in it."""
        return bool(self.ids)


EVERY = "*"


@dataclass(frozen=True)
class Situation:
    """What is known before anything is chosen: the card, the model, the host's memory and disk to train with, in bytes.

    ``chosen`` holds the ids of the set that is being composed; it is empty as long as none is. ``merge``: whether the
    adapters are merged into the weights after training. Of the card an optimisation may ask what decides which code
    runs on it (kind, capability by the steps of ``CAPABILITIES`` or that it has none, 16-bit types, its names for
    people), never its sizes and rates: cards that are equal in those share what is composed for them.
    """

    gpu: HardwareProfile
    model: ModelShape
    host_bytes: int
    chosen: Set[str] = frozenset()
    merge: bool = False
    disk_bytes: int = 0

    def choosing(self, ids: Iterable[str]) -> Situation:
        """The same with a set that is looked at; what is asked of it is noted where it was before."""
        watched = isinstance(self.chosen, Chosen)
        return replace(self, chosen=Chosen(ids, self.chosen.asked) if watched else frozenset(ids))  # type: ignore[attr-defined]


class Requirement(Protocol):
    """Something an optimisation needs. One method both decides and explains."""

    @property
    def text(self) -> str:
        """The requirement in words, for `plan explain`."""
        ...

    def reasons(self, situation: Situation) -> tuple[str, ...]:
        """Why it is not met; empty where it is."""
        ...


@dataclass(frozen=True)
class OnCard:
    """Needs a graphics card, not the CPU."""

    because: str

    @property
    def text(self) -> str:
        """In words."""
        return f"a graphics card: {self.because}"

    def reasons(self, situation: Situation) -> tuple[str, ...]:
        """Empty on a card."""
        return () if situation.gpu.kind == "gpu" else (f"needs a graphics card: {self.because}",)


@dataclass(frozen=True)
class Capability:
    """Needs a CUDA compute capability of at least this."""

    least: tuple[int, int]
    because: str

    def __post_init__(self) -> None:
        assert self.least in CAPABILITIES, f"cards are not told apart by {self.least}"

    @property
    def text(self) -> str:
        """In words."""
        return f"compute capability ≥ {self.least[0]}.{self.least[1]}: {self.because}"

    def reasons(self, situation: Situation) -> tuple[str, ...]:
        """Names what is needed and what the card has."""
        gpu = situation.gpu
        if gpu.kind != "gpu":
            return (f"needs a graphics card: {self.because}",)
        if gpu.gfx:
            return (
                f"needs CUDA compute capability ≥ {self.least[0]}.{self.least[1]}; {gpu.name} has none ({gpu.gfx})",
            )
        if gpu.compute_capability is None:
            return (f"needs compute capability ≥ {self.least[0]}.{self.least[1]}; that of {gpu.name} is unknown",)
        if gpu.compute_capability < self.least:
            major, minor = gpu.compute_capability
            return (f"needs compute capability ≥ {self.least[0]}.{self.least[1]}; {gpu.name} has {major}.{minor}",)
        return ()


@dataclass(frozen=True)
class Needs:
    """Needs a term that another optimisation makes, although it claims nothing of it."""

    term: str
    because: str

    @property
    def text(self) -> str:
        """In words."""
        return f"{self.term}: {self.because}"

    def reasons(self, situation: Situation) -> tuple[str, ...]:
        """Judged for a whole set, by ``planner.compose``."""
        return ()


@dataclass(frozen=True)
class With:
    """Needs another optimisation for what it does without making a term."""

    name: str
    because: str

    @property
    def text(self) -> str:
        """In words."""
        return f"{self.name}: {self.because}"

    def reasons(self, situation: Situation) -> tuple[str, ...]:
        """Empty where it is chosen, and as long as nothing is."""
        met = not situation.chosen or self.name in situation.chosen
        return () if met else (f"needs {self.name}: {self.because}",)


@dataclass(frozen=True)
class Knob:
    """A quantity of an optimisation that the plan chooses.

    Attributes:
        name: short name; on the command line ``--set <optimisation>.<name>=value``.
        letter: the letter it gives a value to in formulas; "" where the code it chooses is all it changes.
        choices: what the solver may choose from, best first, given the situation.
        low, high: bounds of what a user may set (numbers), or None where only ``choices`` will do.
        names: of a choice by name, all there are on any card; the letter's value is the place in them, from 0.
        whole: whether it is a whole number, where it is a number.
        before: its value in plan files from before there was this knob; None: every file has it.
    """

    name: str
    meaning: str
    choices: Callable[[Situation], tuple[Scalar, ...]]
    letter: str = ""
    low: float | None = None
    high: float | None = None
    whole: bool = True
    names: tuple[str, ...] = ()
    before: Scalar | None = None

    def may_be(self, value: Scalar, situation: Situation) -> bool:
        """Whether a user may set it so here; a number has bounds besides. A letter may have any of its names."""
        return self.low is not None or value in (self.names if self.letter else self.choices(situation))

    def number(self, value: Scalar) -> int:
        """What the letter is where the knob has this value."""
        return self.names.index(str(value)) if self.names else int(value)


@dataclass(frozen=True)
class Evidence:
    """Where a statement comes from: a paper, a line of a library, or a record in this repository."""

    statement: str
    source: str


Knobs = Mapping[str, Scalar]
REGISTRY: dict[str, type[Optimization]] = {}


class Optimization(Item):
    """One optimisation. A concrete subclass registers itself by its ``id``.

    Class attributes:
        id: name in plan files and on the command line.
        title, claimed: as of every item (`planner.optimizations.item`).
        claims: what it replaces: ``term.attribute`` (attribute: count, bits, device, phases) or ``letter X``
            or ``setting name``. Within one configuration each may be claimed once.
        makes: names of the terms it adds.
        adds: names of the pieces of work it adds.
        requires: what it needs of card, model and host.
        knobs: what the plan chooses for it.
        evidence: where its formulas come from.
        exact: whether the trained result is the same function as without it.
        free: exact, and never more memory or time than without it (``is_free`` says where): on wherever it can be,
            unless switched off.
        asked: on only where the user asks for it: what it brings is neither memory nor time, or has not been measured
            on a card, or it changes the result by more than anyone should meet unasked.
        last_resort: the optimisation that it makes room for; it is tried only where sets with that one lack no more
            than it can save: bytes of terms that it claims, or of which it claims a letter. So it costs no search
            where nobody needs it.
        effect: what it does to the result where it is not exact, in a few words; of what is asked for, why it is not on
            by itself.
        harm: what it counts among those that change the result, where sets are alike otherwise: by trainings.
        worth: how many times as long a step may at most take without it before it is on for the sake of time alone,
            where plans are for the longest context; 1 for what takes nothing of what is learnt.
        measured: whether runs on a card show what it changes; where none do, plans that have it say so.
        instead: what takes the place of formulas of its own, a sentence; empty where it changes neither bytes nor time.
    """

    claims: ClassVar[frozenset[str]] = frozenset()
    makes: ClassVar[frozenset[str]] = frozenset()
    adds: ClassVar[frozenset[str]] = frozenset()
    requires: ClassVar[tuple[Requirement, ...]] = ()
    knobs: ClassVar[tuple[Knob, ...]] = ()
    exact: ClassVar[bool] = True
    free: ClassVar[bool] = False
    asked: ClassVar[bool] = False
    measured: ClassVar[bool] = True
    last_resort: ClassVar[str] = ""
    effect: ClassVar[str] = ""
    harm: ClassVar[int] = 1
    worth: ClassVar[float] = 1.0
    instead: ClassVar[str] = ""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        known = REGISTRY.get(cls.id)
        assert known is None or known.__module__ == cls.__module__, f"{cls.id} is defined twice"
        assert cls.__doc__ and cls.evidence, f"{cls.id}: a docstring and evidence are part of an optimisation"
        assert cls.exact or (cls.effect and not cls.free), f"{cls.id}: say what it does to the result"
        REGISTRY[cls.id] = cls

    def letters(self, situation: Situation, knobs: Knobs) -> dict[str, int]:
        """Values of the letters it claims or that its knobs set."""
        return {knob.letter: knob.number(knobs[knob.name]) for knob in self.knobs if knob.letter}

    def settings(self, situation: Situation, knobs: Knobs) -> dict[str, str]:
        """Values of the settings it claims (``dtype``, ``attention``)."""
        return {}

    def rewrite(self, ledger: Ledger, knobs: Knobs, situation: Situation) -> Ledger:
        """The ledger with this optimisation switched on; it reads no more of the ledger than it claims or needs.

        Unless it is overridden no term and no work changes.
        """
        return ledger

    @abstractmethod
    def apply(self, session: Session) -> None:
        """Switch it on in a run that is being put together."""

    def is_free(self, situation: Situation) -> bool:
        """Whether it is free here."""
        return self.free

    def reasons(self, situation: Situation) -> tuple[str, ...]:
        """Why it cannot be used here; empty where it can."""
        return tuple(reason for requirement in self.requires for reason in requirement.reasons(situation))
