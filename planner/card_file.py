"""A card's YAML file: its keys, how each is read in its own unit, and what cannot be true together.

`planner.hardware` makes a profile of it, and `planner.profile_file` writes one.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from planner.errors import PlanError, did_you_mean, raise_all
from planner.measured import MeasuredBlock
from planner.units import format_bytes, parse_bandwidth, parse_bytes, parse_flops, parse_watts

Basis = Literal["measured", "datasheet", "derived", "assumed"]
ID = re.compile(r"[a-z0-9][a-z0-9.-]*")
_SafeLoader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class _Loader(_SafeLoader):  # type: ignore[misc]
    """YAML that refuses a key given twice, of which YAML itself silently takes the last."""

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        keys = [key.value for key, _ in node.value]
        for index, (key, _) in enumerate(node.value):
            if key.value in keys[:index]:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} is given twice", key.start_mark)
        return super().construct_mapping(node, deep)


class Fact(BaseModel):
    """``{value, source, basis}``, or ``{value: unknown, why}``."""

    model_config = ConfigDict(extra="forbid")
    value: Any
    source: str = ""
    why: str = ""
    basis: Basis = "datasheet"


def _reads(read: Callable[[Any], Any], most: float | None = None, told: str = "", above: float = 0) -> AfterValidator:
    """Read the fact's value in its own unit; ``most``, as ``told``, is beyond any card and catches slips of the pen."""

    def check(fact: Fact) -> Fact:
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


_Bytes = Annotated[Fact, _reads(_sized, 2.0**44, "16 TiB")]
_Bandwidth = Annotated[Fact, _reads(parse_bandwidth, 1e15, "1 PB/s")]
_Flops = Annotated[Fact, _reads(parse_flops, 1e18, "1 EFLOP/s")]
_Flag = Annotated[Fact, _reads(_exactly(bool, "true or false"))]
_Word = Annotated[str, Field(min_length=1)]


class _Rates(BaseModel):
    model_config = ConfigDict(extra="forbid")
    fp32: _Flops
    tf32: _Flops
    fp16: _Flops
    bf16: _Flops


class CardFile(BaseModel):
    """The keys of the file; sizes in bytes, rates in FLOP/s, bandwidths in bytes/s."""

    model_config = ConfigDict(extra="forbid")
    id: Annotated[str, Field(pattern=rf"^{ID.pattern}$")]
    name: _Word
    aliases: list[_Word] = []
    vendor: _Word
    architecture: _Word
    compute_capability: Annotated[Fact, _reads(_capability)]
    sm_count: Annotated[Fact, _reads(_exactly(int, "a whole number"), 1e5, "100,000")]
    tdp: Annotated[Fact, _reads(parse_watts, 1e5, "100 kW")]
    memory: _Bytes
    visible_memory: _Bytes
    cuda_context: Annotated[Fact, _reads(_sized, 2.0**44, "16 TiB", above=-1)]  # none on a CPU
    memory_bandwidth: _Bandwidth
    pcie_bandwidth: _Bandwidth
    rates: _Rates
    bf16: _Flag
    flash_attention_2: _Flag
    notes: list[str] = []
    kind: Literal["gpu", "cpu"] = "gpu"
    measured: MeasuredBlock | None = None


_KEYS = sorted({key for part in (CardFile, _Rates, Fact, MeasuredBlock) for key in part.model_fields})


def squashed(name: str) -> str:
    """A name as it is compared: lower case, without spaces, underscores and dashes."""
    return re.sub(r"[\s_-]+", "", name.lower())


def read_card(path: Path, named_by_id: bool = False) -> CardFile:
    """What a file says of a card.

    Args:
        named_by_id: whether the file has to be called as the card is.

    Raises:
        PlanError: with the file and the key, all errors of the file at once.
    """
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
        card = CardFile.model_validate(data)
    except ValidationError as failed:
        raise_all([error for each in failed.errors() for error in _told(each, file)])
        raise AssertionError("pydantic refused a card without saying why") from failed
    wrong = _contradictions(card, path.stem if named_by_id else card.id)
    raise_all([PlanError(f"{file}: {key}", why) for key, why in wrong.items()])
    return card


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


def _contradictions(card: CardFile, stem: str) -> dict[str, str]:
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
