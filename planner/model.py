"""Models by name: a shipped id, a folder, a config.json, a GGUF file or a hub id becomes a ModelShape.

Shipped models are data: ``planner/models/<id>/config.json`` is the published one, ``model.yaml`` beside it says
where the numbers come from. Nothing here runs code that a model brings along.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from planner.errors import PlanError, did_you_mean, raise_all
from planner.model_config import LARGEST_FILE, parse_config, read_shape
from planner.model_shape import Linear, ModelShape

__all__ = ["Linear", "ModelFacts", "ModelShape", "list_models", "load_model"]

SHIPPED = Path(__file__).parent / "models"
LISTING = "plan models"
_SHIPPED_ID = re.compile(r"[a-z0-9][a-z0-9.-]{0,99}")

# libyaml where PyYAML was built with it, ten times faster.
_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@dataclass(frozen=True)
class ModelFacts:
    """What is known of a shipped model beside its shape (``model.yaml``).

    Attributes:
        hub_gated: whether the hub wants the licence accepted first; None if nobody looked.
        hub_part: which part of the repository the model is; empty where it is all of it.
        published: an exact parameter count found in public; ``published_what`` says of what.
        counted: parameters as transformers builds the model, each once; what ``ModelShape.parameters`` gives.
        difference: why published and counted differ; empty where they do not.
        native_context: tokens it was trained for; ``config_context``: what config.json declares.
        same_shape: hub ids with the same layers and counts.
        sources: where the facts come from, one line each.
    """

    id: str
    hub_id: str
    licence: str
    hub_gated: bool | None
    hub_part: str
    published: int
    published_what: str
    counted: int
    difference: str
    native_context: int
    config_context: int
    same_shape: tuple[str, ...]
    notes: tuple[str, ...]
    sources: tuple[str, ...]


def load_model(name: str | os.PathLike[str]) -> ModelShape:
    """The shape of a model.

    Args:
        name: the first of these that fits: a shipped id (``phi-2``); a path to a folder with a config.json or
            one GGUF file, to a config.json, or to a GGUF file; a hub id (``org/name``). A shipped model's hub id
            is answered without network.

    Raises:
        PlanError: no such model; a family that is not known; remote code; a config.json that makes no sense.
    """
    text = os.fspath(name)
    if _SHIPPED_ID.fullmatch(text.lower()) and shipped_folder(text.lower()) is not None:
        return _load_shipped(text.lower())
    path = Path(text)
    try:
        path = path.expanduser()
        if text and path.is_dir():
            return _load_folder(path)
        if path.is_file():
            return _load_gguf(path) if path.suffix.lower() == ".gguf" else _load_config(path)
    except (OSError, RuntimeError) as error:  # a name too long, a folder one may not enter, ~ of nobody
        raise PlanError(f"model {text[:80]!r}", f"cannot be looked up: {error}.") from error
    if text.startswith((".", "~", os.sep)) or path.suffix.lower() in (".json", ".gguf"):
        raise PlanError(f"model {text!r}", "there is no such file or folder.", did_you_mean(path.stem, _shipped_ids()))
    from planner.model_hub import HUB_ID  # network modules: not for a model that is here

    if HUB_ID.fullmatch(text):
        return _load_from_hub(text)
    raise PlanError(
        f"model {text!r}",
        "neither a shipped model nor a file or folder, and a hub id has the form org/name.",
        did_you_mean(text.lower(), _shipped_ids(), LISTING),
    )


def list_models() -> list[ModelFacts]:
    """The facts of every shipped model, the smallest first."""
    return sorted((_read_facts(id) for id in _shipped_ids()), key=lambda facts: (facts.counted, facts.id))


def shipped_folder(name: str) -> Path | None:
    """The folder with config.json of a shipped model; None where ``name`` is no shipped id."""
    return SHIPPED / name if (SHIPPED / name / "model.yaml").is_file() else None


def _shipped_ids() -> list[str]:
    return sorted(path.parent.name for path in SHIPPED.glob("*/model.yaml"))


def _load_shipped(id: str) -> ModelShape:
    facts = _read_facts(id)
    return _load_config(SHIPPED / id / "config.json", id, None if facts.hub_part else facts.hub_id)


def _mentions(id: str, hub_id: str) -> bool:
    """Whether the facts of a shipped model hold a hub id anywhere; they are not parsed for that."""
    try:
        return hub_id.lower().encode() in (SHIPPED / id / "model.yaml").read_bytes().lower()
    except OSError:
        return True  # reading it in full says what is wrong


def _load_folder(folder: Path) -> ModelShape:
    id = folder.resolve().name
    if (folder / "config.json").is_file():
        return _load_config(folder / "config.json")
    ggufs = sorted(path for path in folder.iterdir() if path.suffix.lower() == ".gguf")
    if len(ggufs) == 1:
        return _load_gguf(ggufs[0], id)
    if ggufs:
        names = ", ".join(path.name for path in ggufs)
        raise PlanError(str(folder), f"has no config.json and several GGUF files: {names}.", "Name one of them.")
    raise PlanError(str(folder), "has neither a config.json nor a GGUF file.")


def _load_config(path: Path, id: str | None = None, hub_id: str | None = None) -> ModelShape:
    try:
        with path.open("rb") as file:
            content = file.read(LARGEST_FILE + 1)  # a weights file named by mistake is not read to its end
    except OSError as error:
        raise PlanError(str(path), f"cannot be read: {error.strerror or error}.") from error
    return read_shape(parse_config(content, str(path)), str(path), id or path.resolve().parent.name, hub_id)


def _load_gguf(path: Path, id: str | None = None) -> ModelShape:
    from planner.gguf_header import config_of_gguf, read_gguf_header

    header = read_gguf_header(path)
    shape = read_shape(config_of_gguf(header, str(path)), str(path), id or path.stem)
    if shape.parameters != header.parameters:
        raise PlanError(
            str(path),
            f"its tensors hold {header.parameters:,} parameters, a {shape.model_type} model of these sizes has"
            f" {shape.parameters:,}.",
            "A folder with the model's config.json says what it is.",
        )
    return shape


def _load_from_hub(hub_id: str) -> ModelShape:
    from planner.model_hub import download_config

    # One model's facts take ten times as long to read as to look through for a word, and a run names one model.
    mentioned = [_read_facts(id) for id in _shipped_ids() if _mentions(id, hub_id)]
    for facts in mentioned:
        if facts.hub_id.lower() == hub_id.lower():
            if facts.hub_part:
                why = f"of this repository only {facts.hub_part} is known, and the whole of it would be loaded."
                raise PlanError(f"model {hub_id!r}", why, f"The shipped {facts.id} is {facts.hub_part}.")
            return _load_shipped(facts.id)
    twins = [facts.id for facts in mentioned if hub_id.lower() in map(str.lower, facts.same_shape)]
    if twins:
        nearest = f"The shipped {twins[0]} has the same layers and parameters."
    else:
        nearest = did_you_mean(hub_id, [facts.hub_id for facts in list_models()])
    where = f"{hub_id} config.json"
    return read_shape(parse_config(download_config(hub_id, nearest), where), where, hub_id, hub_id)


def _read_facts(id: str) -> ModelFacts:
    """``model.yaml`` of a shipped model, every field of it checked: who adds a model is told what is wrong."""
    path = SHIPPED / id / "model.yaml"
    try:
        document = yaml.load(path.read_text("utf-8"), Loader=_Loader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise PlanError(str(path), f"cannot be read: {error}.") from error
    if not isinstance(document, dict):
        raise PlanError(str(path), "holds no fields.")
    errors: list[PlanError] = []

    def take(block: Mapping[str, Any], name: str, kind: type, label: str = "", absent: Any = None) -> Any:
        value = block.get(name, absent)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            errors.append(PlanError(f"{path}: {label or name}", f"is {value!r}, not {_KINDS[kind]}."))
            return kind()
        return value

    def lines(name: str) -> tuple[str, ...]:
        return tuple(str(line) for line in take(document, name, list, absent=[]))

    parameters = take(document, "parameters", dict)
    context = take(document, "context", dict)
    for block, label, known in (
        (document, "", _FIELDS),
        (parameters, "parameters.", _PARAMETER_FIELDS),
        (context, "context.", _CONTEXT_FIELDS),
    ):
        for name in block:
            if name not in known:
                errors.append(PlanError(f"{path}: {label}{name}", "unknown field.", did_you_mean(str(name), known)))
    facts = ModelFacts(
        id=id,
        hub_id=take(document, "hub_id", str),
        licence=take(document, "licence", str),
        hub_gated=take(document, "hub_gated", bool) if "hub_gated" in document else None,
        hub_part=take(document, "hub_part", str, absent=""),
        published=take(parameters, "published", int, "parameters.published"),
        published_what=take(parameters, "published_what", str, "parameters.published_what"),
        counted=take(parameters, "counted", int, "parameters.counted"),
        difference=take(parameters, "difference", str, "parameters.difference", absent=""),
        native_context=take(context, "native", int, "context.native"),
        config_context=take(context, "config", int, "context.config"),
        same_shape=lines("same_shape"),
        notes=lines("notes"),
        sources=lines("sources"),
    )
    raise_all(errors)
    return facts


_FIELDS = ("hub_id", "licence", "hub_gated", "hub_part", "parameters", "context", "same_shape", "notes", "sources")
_PARAMETER_FIELDS = ("published", "published_what", "counted", "difference")
_CONTEXT_FIELDS = ("native", "config")
_KINDS: dict[type, str] = {
    str: "text",
    int: "a whole number",
    bool: "true or false",
    dict: "a block",
    list: "a list",
}
