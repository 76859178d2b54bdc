"""Cards as data: one YAML file per card, read into a frozen profile whose every number carries its source.

A card is never guessed from its likes: what is not known stays unknown and says why. Reading one card by its
id opens one file; for an alias or a printed name every file is searched as text, and only those that have it are
read as cards.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from planner.errors import PlanError, did_you_mean, raise_all
from planner.measured import DTYPES, Measured, MeasuredBlock
from planner.units import format_bytes, parse_bandwidth, parse_bytes, parse_flops, parse_watts

Basis = Literal["measured", "datasheet", "derived", "assumed"]

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
    for folder in _folders() if _ID.fullmatch(asked.lower()) else []:
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


def squashed(name: str) -> str:
    """A name as it is compared: lower case, without spaces, underscores and dashes."""
    return re.sub(r"[\s_-]+", "", name.lower())


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


# --- The file ---------------------------------------------------------------------------------------------

_ID = re.compile(r"[a-z0-9][a-z0-9.-]*")
_SafeLoader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class _Loader(_SafeLoader):  # type: ignore[misc]
    """YAML that refuses a key given twice, of which YAML itself silently takes the last."""

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        keys = [key.value for key, _ in node.value]
        for index, (key, _) in enumerate(node.value):
            if key.value in keys[:index]:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} is given twice", key.start_mark)
        return super().construct_mapping(node, deep)


class _Fact(BaseModel):
    """``{value, source, basis}``, or ``{value: unknown, why}``."""

    model_config = ConfigDict(extra="forbid")
    value: Any
    source: str = ""
    why: str = ""
    basis: Basis = "datasheet"

    def sourced(self) -> Sourced:
        return Sourced(self.value, self.source.strip(), self.why.strip(), self.basis)


def _reads(read: Callable[[Any], Any], most: float | None = None, told: str = "", above: float = 0) -> AfterValidator:
    """Read the fact's value in its own unit; ``most``, as ``told``, is beyond any card and catches slips of the pen."""

    def check(fact: _Fact) -> _Fact:
        if fact.value == "unknown":
            if not fact.why.strip():
                raise PlanError("unknown", "has no reason.", "Add why: and say why it is not known.")
            return fact.model_copy(update={"value": None})
        if not isinstance(fact.value, (str, int, float)):
            raise PlanError("the value", "is neither a number with its unit nor unknown.")
        errors = []
        if not fact.source.strip():
            errors.append(PlanError(str(fact.value), "has no source.", "Add source: and say where it comes from."))
        try:
            value = read(fact.value)
            if most is not None and not above < value <= most:
                raise PlanError(str(fact.value), "is no figure of a card.", f"It lies between 0 and {told}.")
        except PlanError as error:
            errors.append(error)
        raise_all(errors)
        return fact.model_copy(update={"value": value})

    return AfterValidator(check)


def _capability(raw: Any) -> tuple[int, int] | str:
    """CUDA's compute capability, or the gfx name of an AMD card, which has none."""
    if re.fullmatch(r"gfx[0-9a-f]{3,5}", str(raw)):
        return str(raw)
    match = re.fullmatch(r"([0-9]{1,2})\.([0-9])", str(raw))
    if match is None:
        nearest = 'Write one such as "8.6", or for an AMD card its gfx name, such as gfx1100.'
        raise PlanError(repr(raw), "is not a compute capability.", nearest)
    return int(match.group(1)), int(match.group(2))


def _exactly(kind: type, what: str) -> Callable[[Any], Any]:
    def read(raw: Any) -> Any:
        if type(raw) is not kind:  # not isinstance: True is an int
            raise PlanError(repr(raw), f"is not {what}.")
        return raw

    return read


def _sized(raw: Any) -> int:
    """A size; a bare 8 is as suspect here as on the command line, where it is text."""
    return parse_bytes(str(raw) if type(raw) is int else raw)


_Bytes = Annotated[_Fact, _reads(_sized, 2.0**44, "16 TiB")]
_Bandwidth = Annotated[_Fact, _reads(parse_bandwidth, 1e15, "1 PB/s")]
_Flops = Annotated[_Fact, _reads(parse_flops, 1e18, "1 EFLOP/s")]
_Flag = Annotated[_Fact, _reads(_exactly(bool, "true or false"))]
_Word = Annotated[str, Field(min_length=1)]


class _Rates(BaseModel):
    model_config = ConfigDict(extra="forbid")
    fp32: _Flops
    tf32: _Flops
    fp16: _Flops
    bf16: _Flops


class _Card(BaseModel):
    model_config = ConfigDict(extra="forbid")
    id: Annotated[str, Field(pattern=rf"^{_ID.pattern}$")]
    name: _Word
    aliases: list[_Word] = []
    vendor: _Word
    architecture: _Word
    compute_capability: Annotated[_Fact, _reads(_capability)]
    sm_count: Annotated[_Fact, _reads(_exactly(int, "a whole number"), 1e5, "100,000")]
    tdp: Annotated[_Fact, _reads(parse_watts, 1e5, "100 kW")]
    memory: _Bytes
    visible_memory: _Bytes
    cuda_context: Annotated[_Fact, _reads(_sized, 2.0**44, "16 TiB", above=-1)]  # none on a CPU
    memory_bandwidth: _Bandwidth
    pcie_bandwidth: _Bandwidth
    rates: _Rates
    bf16: _Flag
    flash_attention_2: _Flag
    notes: list[str] = []
    kind: Literal["gpu", "cpu"] = "gpu"
    measured: MeasuredBlock | None = None


_KEYS = sorted({key for part in (_Card, _Rates, _Fact, MeasuredBlock) for key in part.model_fields})


def _read(path: Path, named_by_id: bool = False) -> HardwareProfile:
    """The card in a file. Raises PlanError with the file and the key, all errors of the file at once."""
    file = str(path)
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except FileNotFoundError:
        raise PlanError(file, "there is no such file.", "`plan gpus` lists the known cards.") from None
    except OSError as error:
        raise PlanError(file, f"cannot be read ({error.strerror}).", "Name the file of one card.") from None
    except (yaml.YAMLError, ValueError, TypeError, LookupError, RecursionError) as error:
        where = str(error).replace('in "<unicode string>",', "at")  # the file has been named
        raise PlanError(file, f"is not YAML: {' '.join(where.split())}") from None
    if not isinstance(data, dict):
        raise PlanError(file, "does not hold the keys of a card.", "See hwprofiles/README.md.")
    try:
        card = _Card.model_validate(data)
    except ValidationError as failed:
        raise_all([error for each in failed.errors() for error in _told(each, file)])
        raise AssertionError("pydantic refused a card without saying why") from failed
    wrong = _contradictions(card, path.stem if named_by_id else card.id)
    raise_all([PlanError(f"{file}: {key}", why) for key, why in wrong.items()])
    capability = card.compute_capability.value
    return HardwareProfile(
        id=card.id,
        name=card.name,
        vendor=card.vendor,
        aliases=tuple(card.aliases),
        kind=card.kind,
        architecture=card.architecture,
        compute_capability=capability if isinstance(capability, tuple) else None,
        memory_bytes=card.memory.sourced(),
        visible_bytes=card.visible_memory.sourced(),
        context_bytes=card.cuda_context.sourced(),
        bandwidth=card.memory_bandwidth.sourced(),
        rates={name: fact.sourced() for name, fact in card.rates},
        pcie_bytes_per_second=card.pcie_bandwidth.sourced(),
        supports_bf16=card.bf16.value is True,  # unknown is no
        supports_flash_attention_2=card.flash_attention_2.value is True,
        sm_count=card.sm_count.sourced(),
        tdp_w=card.tdp.sourced(),
        gfx=capability if isinstance(capability, str) else "",
        notes=tuple(card.notes),
        measured=card.measured.measured(file) if card.measured else None,
    )


def _told(problem: Any, file: str) -> list[PlanError]:
    """One of pydantic's findings in our words."""
    key = ".".join(map(str, problem["loc"]))
    asked, cause = f"{file}: {key}", problem.get("ctx", {}).get("error")
    if isinstance(cause, PlanError):
        causes = getattr(cause, "errors", [cause])
        return [PlanError(asked, f"{each.asked} {each.why}", each.nearest) for each in causes]
    if problem["type"] == "extra_forbidden":
        return [PlanError(asked, "is not a key here.", did_you_mean(key.rpartition(".")[2], _KEYS))]
    if problem["type"] == "missing":
        return [PlanError(asked, "is missing.", "What is not known is written {value: unknown, why: ...}.")]
    if problem["type"] == "model_type" and key != "rates":
        return [PlanError(asked, "is not a sourced value.", "Write {value: ..., source: ...}.")]
    return [PlanError(asked, f"{problem['msg'].lower()}.")]


def _contradictions(card: _Card, stem: str) -> dict[str, str]:
    """What cannot be true together, by key."""
    memory, visible, context = (f.value for f in (card.memory, card.visible_memory, card.cuda_context))
    wrong = {}
    if card.id != stem:
        wrong["id"] = f"is {card.id!r}, but the file is named {stem!r}."
    if card.id == "local" or (card.id == "cpu" and card.kind != "cpu"):
        wrong["id"] = f"{card.id!r} is kept for the machine itself."
    # A tenth is left for cards sold as "8 GB" that hold 8 GiB.
    if memory is not None and visible is not None and visible > 1.1 * memory:
        wrong["visible_memory"] = f"{format_bytes(visible)} is more than the memory, {format_bytes(memory)}."
    if visible is not None and context is not None and context >= visible:
        wrong["cuda_context"] = f"{format_bytes(context)} leaves nothing of {format_bytes(visible)}."
    capability = card.compute_capability.value
    if capability is not None and isinstance(capability, str) != (squashed(card.vendor) == "amd"):
        wrong["compute_capability"] = "is a gfx name for an AMD card, and CUDA's figure for all others."
    if card.bf16.value is False and card.rates.bf16.value is not None:
        wrong["rates.bf16"] = "has a value, but bf16 is false."
    return wrong
