"""The ledger: every term of memory and of work, in which phases it lives, on which device.

A term's bytes are ``ceil(count × bits / 8)``. Its attributes (count, bits, device, phases) are what an optimisation
may claim, each once; so a set of optimisations composes in any order, and a clash shows itself by name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any

from planner.symbols import Letters, Number, ceil_div

Formula = Callable[[Letters], Number]


class Phase(StrEnum):
    """The moments of a run that have a peak of their own, in order.

    Attention is a moment of its own where layers run in passes; elsewhere it is a part of forward and backward.
    """

    LOAD = "load"
    FORWARD = "forward"
    ATTENTION = "attention"
    LOSS = "loss"
    BACKWARD = "backward"
    ATTENTION_BACKWARD = "attention_backward"
    OPTIMIZER = "optimizer"
    EVALUATE = "evaluate"
    EVALUATE_LOSS = "evaluate_loss"
    SAVE = "save"
    MERGE = "merge"


class Device(StrEnum):
    """Where bytes lie. With `--gpu cpu` the device called gpu is the host's own memory."""

    GPU = "gpu"
    HOST = "host"
    PINNED = "pinned"
    DISK = "disk"


class Basis(StrEnum):
    """How well a number is known: counted, derived from code, measured on a machine, or assumed."""

    EXACT = "exact"
    DERIVED = "derived"
    MEASURED = "measured"
    ASSUMED = "assumed"


ALWAYS = frozenset(Phase)
STEP = frozenset({Phase.FORWARD, Phase.LOSS, Phase.BACKWARD, Phase.OPTIMIZER})
PASSES = frozenset({Phase.ATTENTION, Phase.ATTENTION_BACKWARD})
AFTER_LOAD = ALWAYS - {Phase.LOAD}


def held(device: Device) -> frozenset[Phase]:
    """Phases of a buffer that is taken once the weights are there, and kept.

    On the card it is part of what loading ends with. In the host loading needs room of its own before, and no buffer
    is there yet when that is highest.
    """
    return ALWAYS if device is Device.GPU else AFTER_LOAD


WHILE_TRAINING = Phase.BACKWARD
"""A phase of every step: what is on the disk in it is there to train with, and not what a run leaves behind."""
GROUPS = (
    "weights",
    "adapters",
    "averages",
    "activations",
    "attention",
    "gradients",
    "optimizer",
    "loss",
    "buffers",
    "runtime",
)


@dataclass(frozen=True)
class Term:
    """One term of memory.

    Attributes:
        name: ``group/name``; the group is one of ``GROUPS``.
        count: elements, as a function of the letters.
        bits: bits of one element, as a function of the letters.
        phases: the phases in which it lives.
        meaning: one sentence for people.
        source: the paper, the line of code or the record that the formula rests on.
    """

    name: str
    count: Formula
    bits: Formula
    phases: frozenset[Phase]
    meaning: str
    source: str
    device: Device = Device.GPU
    basis: Basis = Basis.DERIVED

    def __post_init__(self) -> None:
        assert self.name.split("/")[0] in GROUPS, self.name

    def bytes(self, letters: Letters) -> Number:
        """Bytes of the term: a whole number, an array of them, or an expression, as the letters are."""
        return ceil_div(self.count(letters) * self.bits(letters), 8)


class Resource(StrEnum):
    """What a piece of work keeps busy; two kinds can go on at once, one kind cannot."""

    LINEAR = "linear"  # FLOPs of matrix products with weights
    ATTENTION = "attention"  # FLOPs of the attention kernel
    MEMORY = "memory"  # bytes through the device's own memory
    LINK = "link"  # bytes between device and host, one way
    DISK = "disk"  # bytes between host and disk, beside everything else
    PREFETCH = "prefetch"  # bytes to the device that whatever else goes on in a phase can hide
    EXPOSED = "exposed"  # of the bytes over the link those that nothing hides
    LAUNCH = "launch"  # kernels that the host launches, beside everything else


@dataclass(frozen=True)
class Work:
    """One piece of work of a step: so many FLOPs, bytes or kernels of one resource in one phase.

    Attributes:
        stage: work of a phase that is done by itself, before or after that of its other stages.
    """

    name: str
    amount: Formula
    resource: Resource
    phase: Phase
    meaning: str
    stage: str = ""


ATTRIBUTES = frozenset({"count", "bits", "device", "phases"})


@dataclass(frozen=True)
class Ledger:
    """All terms and all work of one configuration. Immutable: a rewrite gives a new ledger."""

    terms: Mapping[str, Term] = field(default_factory=dict)
    work: Mapping[str, Work] = field(default_factory=dict)

    def with_terms(self, *terms: Term) -> Ledger:
        """Add terms; a name can be made once."""
        added = {term.name: term for term in terms}
        clash = self.terms.keys() & added.keys()
        assert not clash, f"made twice: {sorted(clash)}"
        return Ledger({**self.terms, **added}, self.work)

    def with_work(self, *work: Work) -> Ledger:
        """Add pieces of work."""
        return Ledger(self.terms, {**self.work, **{piece.name: piece for piece in work}})

    def claimed(self, name: str, **attributes: Any) -> Ledger:
        """Replace attributes of one term (``count``, ``bits``, ``device``, ``phases``)."""
        assert set(attributes) <= ATTRIBUTES, attributes
        return Ledger({**self.terms, name: replace(self.terms[name], **attributes)}, self.work)

    def bytes(self, letters: Letters) -> dict[str, Number]:
        """Bytes of every term."""
        return {name: term.bytes(letters) for name, term in self.terms.items()}

    def by_phase(self, letters: Letters, devices: Iterable[Device]) -> dict[Phase, dict[str, Number]]:
        """For each phase the bytes of the terms alive in it on any of the devices."""
        wanted, sizes = frozenset(devices), self.bytes(letters)
        return {
            phase: {
                name: sizes[name] for name, term in self.terms.items() if phase in term.phases and term.device in wanted
            }
            for phase in Phase
        }
