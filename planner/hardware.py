"""Cards as data: one YAML file per card, read into a frozen profile whose every number carries its source.

A card is never guessed from its likes: what is not known stays unknown and says why. Reading one card by its
id opens one file; for an alias or a printed name every file is searched as text, and only those that have it are
read as cards.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from planner.card_file import ID, Basis, Fact, read_card, squashed
from planner.errors import PlanError, did_you_mean, raise_all
from planner.measured import DTYPES, Measured

FOLDERS_VARIABLE = "TIERPLAN_HWPROFILES"
"""Environment variable: folders of further cards, separated as in PATH, that come before the shipped ones."""

SHIPPED = Path(__file__).resolve().parent.parent / "hwprofiles"
RATES = DTYPES


@dataclass(frozen=True)
class Sourced:
    """A number with where it comes from. A value of None is unknown, and ``why`` says why."""

    value: float | int | None
    source: str
    why: str = ""
    basis: Basis = "datasheet"


NOTHING_IN_USE = Sourced(0, "the whole card is taken to be free", basis="assumed")


@dataclass(frozen=True)
class HardwareProfile:
    """What a plan needs to know of a card: sizes in bytes, rates in dense FLOP/s, bandwidths in bytes/s."""

    id: str
    name: str
    vendor: str
    aliases: tuple[str, ...]
    kind: Literal["gpu", "cpu"]
    architecture: str
    compute_capability: tuple[int, int] | None
    """CUDA's; None where it is unknown and for what has none: a CPU, an AMD card (see ``gfx``)."""
    memory_bytes: Sourced
    """As sold."""
    visible_bytes: Sourced
    """What CUDA can see of it: the lowest figure known for the card."""
    context_bytes: Sourced
    """Taken by the CUDA context of one training process, outside the allocator."""
    bandwidth: Sourced
    rates: Mapping[str, Sourced] = field(hash=False)
    """By name: fp32, tf32, fp16, bf16; the half precisions accumulate in FP32."""
    pcie_bytes_per_second: Sourced
    """One way."""
    supports_bf16: bool
    supports_flash_attention_2: bool
    sm_count: Sourced
    tdp_w: Sourced
    in_use_bytes: Sourced = NOTHING_IN_USE
    """Held by other processes when a local card was looked at; nothing for a card only planned for."""
    gfx: str = ""
    """What AMD calls the instruction set of its card, such as gfx1100; empty for all others."""
    notes: tuple[str, ...] = ()
    measured: Measured | None = None
    """What was found on the machine itself; None where nobody measured."""
    uuid: str = ""
    """What the driver calls this very card; empty for a card that is only planned for."""

    def budget_bytes(self) -> int | None:
        """What the allocator may reserve: visible less in use less context; None if one is unknown."""
        visible, in_use, context = (f.value for f in (self.visible_bytes, self.in_use_bytes, self.context_bytes))
        if visible is None or in_use is None or context is None:
            return None
        return max(0, int(visible) - int(in_use) - int(context))

    def facts(self) -> dict[str, Sourced]:
        """Every sourced number under the name it has in a profile file."""
        return {
            "memory": self.memory_bytes,
            "visible_memory": self.visible_bytes,
            "cuda_context": self.context_bytes,
            "memory_bandwidth": self.bandwidth,
            "pcie_bandwidth": self.pcie_bytes_per_second,
            **{f"rates.{name}": rate for name, rate in self.rates.items()},
            "sm_count": self.sm_count,
            "tdp": self.tdp_w,
        }

    def missing(self) -> list[str]:
        """The unknown facts that a plan of memory and time needs, each as ``"name: why"``."""
        needed = ["visible_memory", "cuda_context", "memory_bandwidth"]
        needed += ["pcie_bandwidth"] if self.kind == "gpu" else []  # a CPU reaches host memory without a bus
        needed.append("rates.bf16" if self.supports_bf16 else "rates.fp16")
        facts = self.facts()
        return self.unknown_kernels() + [f"{name}: {facts[name].why}" for name in needed if facts[name].value is None]

    def unknown_kernels(self) -> list[str]:
        """What is missing where nobody knows which attention kernels and number formats a card has."""
        if self.kind == "cpu" or self.compute_capability is not None:
            return []
        of = f"{self.gfx}, an AMD card, has none" if self.gfx else "not in its profile"
        return [f"compute_capability: {of}, and which kernels there are, and what they take, goes by it"]


def load_profile(name_or_path: str) -> HardwareProfile:
    """The card of that id, alias or printed name (case, spaces and dashes do not matter), or of that file.

    Raises PlanError for an unknown or ambiguous name and, all at once, for everything wrong in a file.
    """
    asked = name_or_path.strip()
    if is_file(asked):
        return _read(Path(asked).expanduser())
    for folder in _folders() if ID.fullmatch(asked.lower()) else []:
        if (path := folder / f"{asked.lower()}.yaml").is_file():
            return _read(path, named_by_id=True)
    wanted = squashed(asked)
    cards = _read_all(path for path in _files() if _mentions(path, wanted))
    matches = [card for card in cards if wanted in _names(card)]
    if not matches:  # YAML can write a name in ways that no search of the text finds, with escapes for one
        cards = list_profiles()
        matches = [card for card in cards if wanted in _names(card)]
    if len(matches) == 1:
        return matches[0]
    if matches:
        ids = ", ".join(card.id for card in matches)
        raise PlanError(asked, f"names more than one card: {ids}.", "Give one of these ids.")
    within = [card.id for card in cards if len(asked) > 2 and asked.lower() in card.id]
    known = [*(card.id for card in cards), "local", "cpu"]
    near = f"Did you mean {' or '.join(within)}?" if within else did_you_mean(asked.lower(), known)
    raise PlanError(asked or "''", "no card has this id or name.", f"{near} `plan gpus` lists them.".strip())


def is_file(name: str) -> bool:
    """Whether that is the file of a profile, and no id or name."""
    return "/" in name or os.sep in name or name.lower().endswith((".yaml", ".yml"))


def list_profiles() -> list[HardwareProfile]:
    """Every card there is a file for, by id. Raises PlanError for all that is wrong in any file, at once."""
    return _read_all(_files())


def _names(card: HardwareProfile) -> set[str]:
    printed = squashed(card.name)
    bare = printed.removeprefix(squashed(card.vendor))
    return {printed, bare, bare.removeprefix("geforce"), *map(squashed, (card.id, *card.aliases))}


def _mentions(path: Path, wanted: str) -> bool:
    """Whether a file may be of the card of that squashed name: a look at the text, far quicker than reading YAML."""
    try:
        return wanted in squashed(path.read_text(encoding="utf-8", errors="replace"))
    except OSError:
        return True  # to be told when it is read as a card


def _read_all(paths: Iterable[Path]) -> list[HardwareProfile]:
    cards: list[HardwareProfile] = []
    errors: list[PlanError] = []
    for path in paths:
        try:
            cards.append(_read(path, named_by_id=True))
        except PlanError as error:
            errors += getattr(error, "errors", [error])
    raise_all(errors)
    return cards


def _files() -> list[Path]:
    """The file of every card, by id. Of two with one id the first folder's wins."""
    paths: dict[str, Path] = {}
    for folder in _folders():
        for path in folder.glob("*.yaml"):
            paths.setdefault(path.stem, path)
    return [path for _, path in sorted(paths.items())]


def _folders() -> list[Path]:
    parts = os.environ.get(FOLDERS_VARIABLE, "").split(os.pathsep)
    named = [Path(part).expanduser() for part in parts if part]
    for folder in named:
        if not folder.is_dir():
            raise PlanError(f"{FOLDERS_VARIABLE}={folder}", "is not a folder.", "Name folders of card files.")
    return [*named, SHIPPED]


def _read(path: Path, named_by_id: bool = False) -> HardwareProfile:
    """The card in a file; see `read_card`."""
    card = read_card(path, named_by_id)
    capability = card.compute_capability.value
    return HardwareProfile(
        id=card.id,
        name=card.name,
        vendor=card.vendor,
        aliases=tuple(card.aliases),
        kind=card.kind,
        architecture=card.architecture,
        compute_capability=capability if isinstance(capability, tuple) else None,
        memory_bytes=_sourced(card.memory),
        visible_bytes=_sourced(card.visible_memory),
        context_bytes=_sourced(card.cuda_context),
        bandwidth=_sourced(card.memory_bandwidth),
        rates={name: _sourced(fact) for name, fact in card.rates},
        pcie_bytes_per_second=_sourced(card.pcie_bandwidth),
        supports_bf16=card.bf16.value is True,  # unknown is no
        supports_flash_attention_2=card.flash_attention_2.value is True,
        sm_count=_sourced(card.sm_count),
        tdp_w=_sourced(card.tdp),
        gfx=capability if isinstance(capability, str) else "",
        notes=tuple(card.notes),
        measured=card.measured.measured(str(path)) if card.measured else None,
    )


def _sourced(fact: Fact) -> Sourced:
    return Sourced(fact.value, fact.source.strip(), fact.why.strip(), fact.basis)
