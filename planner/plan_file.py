"""Reads a plan file: plain data alone, every mistake at once, and no setting that a plan could not have made."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from planner.errors import PlanError, did_you_mean, raise_all
from planner.optimizations import all_optimizations
from planner.optimizations.base import Knob
from planner.plan import SCHEMA, Choice, Plan, Scalar, Strict
from planner.settings import out_of_bounds
from planner.tiers import TIERS

MAX_FILE_BYTES = 4 * 2**20


class _PlainData(yaml.SafeLoader):
    """YAML without aliases, which could make a few lines unfold without end, and without a key given twice."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise yaml.composer.ComposerError(None, None, "a plan has no aliases", mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[object] = set()
        for key, _ in node.value:
            name = key.value if isinstance(key, yaml.ScalarNode) else None
            if name is not None and name in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{name} is there twice", key.start_mark)
            seen.add(name)
        return super().construct_mapping(node, deep)


def load_plan(path: Path) -> Plan:
    """Read a plan file, YAML or JSON.

    Raises:
        PlanError: the file cannot be read, is no YAML, or is no plan; all mistakes together.
    """
    asked = f"plan file {path}"
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise PlanError(asked, f"is larger than {MAX_FILE_BYTES // 2**20} MiB, so it is no plan file.")
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"it is not UTF-8 text (byte {error.start})"
        raise PlanError(asked, f"cannot be read: {reason}.", "`plan --gpu … --out plan.yaml` writes one.") from error
    try:
        document = yaml.load(text, Loader=_PlainData)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise PlanError(asked, f"is not valid YAML: {where}{getattr(error, 'problem', None) or first}.") from error
    if not isinstance(document, dict):
        raise PlanError(asked, "holds no plan (a mapping was expected).")
    if document.get("schema") != SCHEMA:
        raise PlanError(asked, f"has schema {document.get('schema')!r}; this version reads {SCHEMA!r}.")
    try:
        plan = Plan.model_validate_json(json.dumps(document))
    except (ValidationError, TypeError, ValueError) as error:
        if not isinstance(error, ValidationError):
            raise PlanError(asked, f"cannot be read as a plan: {error}.") from error
        raise_all([_mistake(asked, item) for item in error.errors()])
        raise AssertionError("unreachable") from error
    raise_all([PlanError(f"{asked}, {place}", why, nearest) for place, why, nearest in _impossible(plan)])
    return plan


def _mistake(asked: str, item: Any) -> PlanError:
    place = ".".join(str(part) for part in item["loc"]) or "the whole file"
    nearest = ""
    if item["type"] == "extra_forbidden":
        nearest = did_you_mean(str(item["loc"][-1]), _all_keys())
    return PlanError(f"{asked}, {place}", item["msg"][0].lower() + item["msg"][1:] + ".", nearest)


def _all_keys() -> list[str]:
    models: list[type[BaseModel]] = [Plan, *Strict.__subclasses__()]
    return sorted({field.alias or name for model in models for name, field in model.model_fields.items()})


def _impossible(plan: Plan) -> Iterator[tuple[str, str, str]]:
    """Place, reason and nearest of everything that types allow and no plan has."""
    known, seen = all_optimizations(), set()
    for section in ("choices", "rejected"):
        for number, entry in enumerate(getattr(plan, section)):
            place = f"{section}.{number}.id"
            if entry.id not in known:
                yield place, f"no optimisation is called '{entry.id}'.", did_you_mean(entry.id, known)
            elif entry.id in seen:
                yield place, f"{entry.id} is there twice.", "Keep it once, under choices or under rejected."
            seen.add(entry.id)
    for number, choice in enumerate(plan.choices):
        if choice.id in known:
            yield from _knobs(f"choices.{number}.knobs", choice, known[choice.id].knobs)
    rank = plan.knobs("lora").get("rank")
    if rank is not None and rank != plan.lora_rank:
        yield "lora_rank", f"is {plan.lora_rank}, and the knob rank of lora is {rank}.", "Make them the same."
    if plan.tier is not None and not 1 <= plan.tier <= len(TIERS):
        yield "tier", f"is {plan.tier}; tiers go from 1 to {len(TIERS)}.", "null stands for a length of its own."
    elif plan.tier is not None and plan.total_tokens != (total := TIERS[plan.tier - 1].total):
        yield "total_tokens", f"is {plan.total_tokens:,}, and tier {plan.tier} has {total:,}.", ""
    if plan.time.limit_seconds <= 0:
        yield "time.limit_seconds", "leaves no time.", ""
    yield from _sums(plan)


def _sums(plan: Plan) -> Iterator[tuple[str, str, str]]:
    """Figures of one file that do not go together, whatever card, model and version they are from."""
    gpu, host = plan.memory.gpu, plan.memory.host
    peak, nearest = gpu.peak_bytes, "Plan again: a plan's figures are never written by hand."
    totals = {phase: sum(terms.values()) for phase, terms in gpu.phases.items()}
    highest = max(totals.values(), default=0)
    if peak.expected != highest:
        why = f"is {peak.expected:,}, and the terms of the highest phase are {highest:,} together."
        yield "memory.gpu.peak_bytes.expected", why, nearest
    elif totals and totals.get(gpu.peak_phase) != highest:
        yield "memory.gpu.peak_phase", f"is {gpu.peak_phase}, which is not the highest.", nearest
    if not peak.low <= peak.expected <= peak.high:
        yield "memory.gpu.peak_bytes", "has a low above the expected, or an expected above the high.", nearest
    if host.pinned_bytes > host.peak_bytes:
        yield "memory.host.pinned_bytes", "is more than the peak that it is a part of.", nearest
    over = [
        name
        for name, taken, there in (("gpu", peak.high, gpu.budget_bytes), ("host", host.peak_bytes, host.budget_bytes))
        if taken > there
    ]
    late = plan.time.step_seconds.bound is not None and plan.time.step_seconds.bound > plan.time.limit_seconds
    if plan.verdict == "fits" and (over or late):
        what = f"memory.{over[0]} is beyond its budget" if over else "a step cannot be within time.limit_seconds"
        yield "verdict", f"is fits, and {what}.", nearest
    if plan.gpu.kind == "gpu" and gpu.budget_bytes > max(0, plan.gpu.visible_bytes - plan.gpu.context_bytes):
        yield "memory.gpu.budget_bytes", "is more than the visible memory of the card less its context.", nearest


def _knobs(place: str, choice: Choice, knobs: tuple[Knob, ...]) -> Iterator[tuple[str, str, str]]:
    names = {knob.name: knob for knob in knobs}
    for name in choice.knobs:
        if name not in names:
            has = f"It has {', '.join(names)}." if names else "It has none."
            yield f"{place}.{name}", f"{choice.id} has no knob '{name}'.", did_you_mean(name, names) or has
    for name, knob in names.items():
        if name not in choice.knobs:
            yield f"{place}.{name}", "is missing.", ""
        elif wrong := _value(knob, choice.knobs[name]):
            yield f"{place}.{name}", wrong, ""


def _value(knob: Knob, value: Scalar) -> str:
    """What is wrong with the value of a knob, as far as it does not depend on card and model; else empty."""
    if knob.low is None:
        return "" if isinstance(value, str) else f"is {value!r}, not a name."
    if isinstance(value, bool) or not isinstance(value, int if knob.whole else (int, float)):
        return f"is {value!r}, not a {'whole ' if knob.whole else ''}number."
    wrong = out_of_bounds(knob, value)
    return f"is {value}; it {wrong}" if wrong else ""
