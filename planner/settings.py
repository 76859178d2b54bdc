"""Reads and checks what the user pins: ``--with``, ``--without`` and ``--set``; all mistakes at once."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from types import NoneType
from typing import Literal, get_args, get_origin

from pydantic import ValidationError

from planner.compose import problems
from planner.errors import PlanError, did_you_mean, raise_all
from planner.micro_batch import MOST_ROWS
from planner.optimizations import all_optimizations, given_items
from planner.optimizations.base import Knob, Scalar, Situation
from planner.plan import Rope, Scaling, Train
from planner.units import format_count, parse_count

Pinned = tuple[dict[str, dict[str, Scalar]], dict[str, Scalar]]
# Settings of training that a plan writes down elsewhere than under ``train``.
ELSEWHERE = ("target", "rows", "rope", "rope_factor")
TRAIN_KEYS = (*Train.model_fields, *ELSEWHERE)


def parse_settings(assignments: Sequence[str]) -> Pinned:
    """Read ``lora.rank=16`` and ``train.lr=1e-4`` into knobs by optimisation, and training settings.

    Raises:
        PlanError: an assignment is malformed, names nothing known, or has a value of the wrong kind.
    """
    knobs: dict[str, dict[str, Scalar]] = {}
    train: dict[str, Scalar] = {}
    errors: list[PlanError] = []
    seen: dict[tuple[str, str], str] = {}
    for assignment in dict.fromkeys(assignments):
        try:
            owner, name, text = _split(assignment)
            if (before := seen.setdefault((owner, name), assignment)) != assignment:
                asked = f"--set {before} --set {assignment}"
                raise PlanError(asked, f"gives {owner}.{name} two values.", "Keep one of them.")
            if owner == "train":
                train[name] = _train_value(assignment, name, text)
            else:
                knobs.setdefault(owner, {})[name] = _knob_value(assignment, owner, name, text)
        except PlanError as error:
            errors.append(error)
    raise_all(errors)
    return knobs, train


def _split(assignment: str) -> tuple[str, str, str]:
    place, equals, text = assignment.partition("=")
    owner, dot, name = place.strip().partition(".")
    if not (equals and dot and name and text.strip()):
        asked = f"--set {assignment}"
        raise PlanError(asked, "is not of the form <optimisation>.<knob>=<value>.", "For example --set lora.rank=16.")
    return owner, name.strip(), text.strip()


def _knob_value(assignment: str, owner: str, name: str, text: str) -> Scalar:
    asked, known = f"--set {assignment}", all_optimizations()
    if owner not in known:
        raise PlanError(
            asked,
            f"no optimisation is called '{owner}'.",
            did_you_mean(owner, [*known, "train"], "plan optimizations"),
        )
    knobs = {knob.name: knob for knob in known[owner].knobs}
    if name not in knobs:
        has = f"It has {', '.join(knobs)}." if knobs else "It has none."
        raise PlanError(asked, f"{owner} has no knob '{name}'.", did_you_mean(name, knobs) or has)
    knob = knobs[name]
    if knob.low is None:
        if knob.names and text not in knob.names:
            there_are = f"There are {', '.join(knob.names)}."
            raise PlanError(asked, f"is no {name}.", did_you_mean(text, knob.names) or there_are)
        return text
    value = _count(asked, text) if knob.whole else _fraction(asked, text)
    if wrong := out_of_bounds(knob, value):
        raise PlanError(asked, wrong)
    return value


def out_of_bounds(knob: Knob, value: float) -> str:
    """What a number should be; empty where the knob may have it, or has no bounds."""
    if knob.low is None or knob.low <= value <= (value if knob.high is None else knob.high):
        return ""
    low, high = (format_count(int(edge)) if knob.whole else f"{edge:g}" for edge in (knob.low, knob.high or value))
    return f"must be from {low} to {high}."


def _fraction(asked: str, text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise PlanError(asked, f"'{text}' is not a number.") from error


def _count(asked: str, text: str) -> int:
    """A whole number; a negative one is one too, whatever bounds say of it."""
    try:
        return -parse_count(text[1:]) if text.startswith("-") else parse_count(text)
    except PlanError as error:
        why = "is larger than any number may be." if text.isdecimal() else f"'{text}' is not a whole number."
        raise PlanError(asked, why, "Write one such as 4096 or 4K.") from error


def _train_value(assignment: str, name: str, text: str) -> Scalar:
    asked = f"--set {assignment}"
    if name not in TRAIN_KEYS:
        raise PlanError(
            asked, f"there is no training setting '{name}'.", did_you_mean(name, TRAIN_KEYS) or _train_list()
        )
    if name in ELSEWHERE:
        return _elsewhere(asked, name, text)
    kinds = _kinds(name)
    try:
        value = _read(asked, text, kinds)
    except PlanError:
        raise
    except ValueError as error:
        raise PlanError(asked, f"'{text}' is not {'true or false' if bool in kinds else 'a number'}.") from error
    try:
        Train.model_validate({name: value})
    except ValidationError as error:
        message = error.errors()[0]["msg"]
        raise PlanError(asked, message.replace("Input should be", "must be", 1) + ".") from error
    return value


def _read(asked: str, text: str, kinds: tuple[object, ...]) -> Scalar:
    """A text as what it is to be; ``ValueError`` where it is not."""
    if bool in kinds:
        if text.lower() not in ("true", "false"):
            raise ValueError(text)
        return text.lower() == "true"
    return _count(asked, text) if int in kinds else float(text) if float in kinds else text


def _elsewhere(asked: str, name: str, text: str) -> Scalar:
    if name == "target":
        tokens = _count(asked, text)
        if tokens < 1:
            raise PlanError(asked, "at least one token must be trained.")
        return tokens
    if name == "rows":
        rows = _count(asked, text)
        if not 1 <= rows <= MOST_ROWS:
            raise PlanError(asked, f"must be from 1 to {MOST_ROWS:,}.")
        return rows
    if name == "rope":
        known = get_args(Scaling)
        if text not in known:
            nearest = did_you_mean(text, known) or f"It is one of {', '.join(known)}."
            raise PlanError(asked, f"'{text}' is no scaling of the rotary embedding.", nearest)
        return text
    try:
        return Rope(factor=float(text)).factor
    except ValueError as error:  # pydantic's is one
        raise PlanError(asked, "must be a number from 1 to 67,108,864.") from error


def _train_list() -> str:
    return f"There are {', '.join(TRAIN_KEYS)}."


def _kinds(name: str) -> tuple[object, ...]:
    annotation = Train.model_fields[name].annotation
    if get_origin(annotation) is Literal:
        return (str,)
    return tuple(kind for kind in get_args(annotation) if kind is not NoneType) or (annotation,)


def unknown_names(required: Sequence[str], excluded: Sequence[str]) -> list[PlanError]:
    """One mistake for each name that no optimisation has."""
    known, given = all_optimizations(), given_items()
    return [
        PlanError(f"{option} {name}", "no plan switches it on or off.", f"`plan explain {name}` says why.")
        if name in given
        else PlanError(
            f"{option} {name if name.strip() else repr(name)}",
            "no optimisation has that name.",
            _named_like(name.strip().lower()),
        )
        for option, names in (("--with", required), ("--without", excluded))
        for name in names
        if name not in known
    ]


def _named_like(word: str) -> str:
    """What somebody may mean who knows an optimisation by a part of its name, or by what its knob can be."""
    known = all_optimizations()
    for owner, each in known.items():
        for knob in each.knobs:
            if word in knob.names:
                return f"It is a {knob.name} of {owner}: --set {owner}.{knob.name}={word}."
    within = [name for name in known if len(word) > 2 and re.sub(r"[\s-]+", "_", word) in name]
    return f"Did you mean {' or '.join(within)}?" if within else did_you_mean(word, known, "plan optimizations")


def check_sets(
    required: Sequence[str],
    excluded: Sequence[str],
    knobs: Mapping[str, Mapping[str, Scalar]],
    situation: Situation,
) -> list[PlanError]:
    """What is wrong with what the user pins, given card and model; empty where nothing is.

    Names must be known: ``unknown_names`` finds those that are not, before card and model are.
    """
    known = all_optimizations()
    errors: list[PlanError] = []
    for name in required:
        errors += [PlanError(f"--with {name}", reason + ".") for reason in known[name].reasons(situation)]
    if not errors:
        errors += _clashes(required)
    for owner, values in knobs.items():
        if owner in excluded:
            asked = " ".join(f"--set {owner}.{name}={value}" for name, value in values.items())
            why = f"{owner} is switched off by --without."
            errors.append(PlanError(f"{asked} --without {owner}", why, "Drop one of them."))
        errors += [
            error
            for knob in known[owner].knobs
            if knob.name in values and (error := _not_offered(owner, knob, values[knob.name], situation))
        ]
    return errors


def _clashes(required: Sequence[str]) -> list[PlanError]:
    """Pinned optimisations that claim the same thing; what one of them lacks, the search adds."""
    claims: dict[str, str] = {}
    clashes: dict[tuple[str, str], list[str]] = {}
    known = all_optimizations()
    for name in sorted(set(required)):
        for claim in sorted(known[name].claims):
            if claim in claims:
                clashes.setdefault((claims[claim], name), []).append(claim)
            claims.setdefault(claim, name)
    return [
        PlanError(
            f"--with {first} --with {second}",
            f"both claim {both[0]}{f' and {len(both) - 1} more' if len(both) > 1 else ''}.",
            "Keep one of them.",
        )
        for (first, second), both in clashes.items()
    ]


def _not_offered(owner: str, knob: Knob, value: Scalar, situation: Situation) -> PlanError | None:
    choices = knob.choices(situation)
    if knob.may_be(value, situation) or known_unusable(owner, situation):
        return None
    offered = f"It can be {' or '.join(map(str, choices))}." if choices else ""
    where = f"for {situation.model.id} on {situation.gpu.name}"
    return PlanError(f"--set {owner}.{knob.name}={value}", f"is not to be had {where}.", offered)


def known_unusable(owner: str, situation: Situation) -> bool:
    """Whether an optimisation cannot be used here at all, so that its knobs do not matter."""
    return owner in problems([owner], situation) and bool(all_optimizations()[owner].reasons(situation))
