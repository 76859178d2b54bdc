"""`plan check FILE`: is it a plan, does it still fit, and what would be planned differently today?"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from planner.cli_output import console, print_json
from planner.cli_request import made, once
from planner.errors import PlanError
from planner.units import format_bytes

if TYPE_CHECKING:
    from planner.plan import Choice, Plan
    from planner.planning import Request

MOST_LINES = 20
# Not compared: words for people; the longest sequence, for which nothing is left free here; and what follows from the
# data, which may have changed or lie elsewhere.
PASSED_OVER = frozenset(
    {
        "summary",
        "rejected",
        "nearest",
        "warnings",
        "not_modelled",
        "time.basis",
        "train.data",
        "time.epoch",
        "time.cost",
        "time.rates",
        "provenance.command",
        "longest",
        "rope.reason",
        "gpu.profile_file",
    }
)
NEW = frozenset({"time.step_seconds.on_card", "train.evaluate_every"})
"""What plans of before did not tell: not compared where a file says nothing of it."""
CAUSES = {
    "provenance.profile_sha256": "the card's profile",
    "provenance.model_sha256": "the model's config",
    "provenance.calibration_sha256": "the calibration",
    "provenance.tierplan": "tierplan itself",
}
# What another profile or another calibration can change. Another model or another tierplan may change everything.
CHANGES = {
    "provenance.profile_sha256": (
        "gpu.",
        "memory.gpu.budget_bytes",
        "memory.host.budget_bytes",
        "memory.gpu.peak_bytes.",
        "stages.",
    ),
    "provenance.calibration_sha256": ("memory.gpu.peak_bytes.", "memory.host.peak_bytes", "stages."),
}
# Terms that the calibration, or the kind of card in a profile, has a part in.
CONSTANTS = ("runtime/",)


@dataclass(frozen=True)
class Difference:
    """A value in the file, and what it would be if the plan were made now."""

    place: str
    file: Any
    now: Any


@click.command(short_help="See whether a plan file still fits.")
@click.argument("file", type=click.Path(path_type=Path))
@once("--gpu", metavar="ID", help="The card, where its id alone does not find it, or another card.")
@click.option("--json", "json_", is_flag=True, help="Print one JSON object instead of sentences.")
def check(file: Path, gpu: str | None, json_: bool) -> int:
    """Check a plan file: plan the same settings again, with today's card, model and calibration.

    Exits 0 if it still fits, 1 if it does not, 2 if it is no plan or cannot be planned any more.

    \b
    plan check plan.yaml
    plan check plan.yaml --gpu rtx3060-12gb
    """
    from planner.plan_file import load_plan

    plan = load_plan(file)
    now = made(same_settings(plan, gpu or card_of(plan)))
    found = list(differences(plan, now))
    fits = now.verdict == "fits"
    if json_:
        answer = {"fits": fits, "summary": now.summary, "differences": [asdict(each) for each in found]}
        print_json(json.dumps(answer, indent=2, ensure_ascii=False))
    else:
        from planner.report import print_parts

        print_parts(console(), list(_sentences(file, plan, now, found)))
    return 0 if fits else 1


def planned_again(plan: Plan) -> Plan:
    """What would be planned for a plan's settings today, before it is run.

    Raises:
        PlanError: the file holds a figure that is another today, and nothing it rests on that changed has a part in
            that figure: it was changed by hand, and its bound is the bound of other settings.
    """
    now = made(same_settings(plan, card_of(plan)))
    if now.verdict != "fits":
        return now
    found = list(differences(plan, now))
    causes = [CAUSES[each.place] for each in found if each.place in CAUSES]
    wrong = [
        each for each in found if each.place.startswith(("memory.", "stages", "choices.", "model.", "gpu.", "rope."))
    ]
    by_hand = [each for each in wrong if not _explained(each, found)] + list(_bound_by_hand(plan, now))
    if by_hand:
        file, today = _told(by_hand[0])
        why = (
            f"its figures are not those of its settings: {by_hand[0].place} is {file} in the file, {today} planned now."
        )
        if causes:
            why += f" That is not for {', '.join(causes)}, which changed."
        raise PlanError("the plan file", why, "`plan check FILE` lists every difference; plan again to run this.")
    if wrong:
        changed = f"Since the plan was made, {', '.join(causes)} changed"
        click.echo(f"{changed}; planned again today it still fits. It is run as it stands.", err=True)
    return now


def _bound_by_hand(plan: Plan, now: Plan) -> Iterator[Difference]:
    """The bound, where it does not follow from the file's own expected peak by a calibration that is today's."""
    from planner.calibration import calibration

    peak = plan.memory.gpu.peak_bytes
    high = peak.expected + int(calibration().reserve_bytes(peak.expected, plan.gpu.kind))
    if plan.provenance.calibration_sha256 == now.provenance.calibration_sha256 and peak.high != high:
        yield Difference("memory.gpu.peak_bytes.high", peak.high, high)


def _explained(difference: Difference, found: Sequence[Difference]) -> bool:
    """Whether something that changed has a part in a value: a hash alone explains no more than what follows from it."""
    causes = {each.place for each in found if each.place in CAUSES}
    if causes - CHANGES.keys():
        return True
    constant = any(f".{term}" in difference.place for term in CONSTANTS)
    return bool(causes) and (
        constant or difference.place.startswith(tuple(p for cause in causes for p in CHANGES[cause]))
    )


def same_settings(plan: Plan, gpu: str) -> Request:
    """The request that leaves the solver nothing to choose: the plan's own settings, each of them pinned."""
    from planner.optimizations import all_optimizations
    from planner.planning import Request

    chosen = tuple(choice.id for choice in plan.choices)
    return Request(
        gpu=gpu,
        model=plan.model.source,
        tier=plan.tier,
        total_tokens=None if plan.tier else plan.total_tokens,
        target=plan.target,
        rope=plan.rope.scaling,
        rope_factor=plan.rope.factor if plan.rope.scaling != "none" else None,
        objective=plan.objective,
        host_bytes=plan.memory.host.budget_bytes,
        disk_bytes=plan.memory.disk.budget_bytes,
        max_step_seconds=plan.time.limit_seconds,
        required=chosen,
        excluded=tuple(name for name in all_optimizations() if name not in chosen),
        knobs={choice.id: _set_knobs(choice) for choice in plan.choices},
        train=plan.train.model_dump() | {"data": None},  # which decides nothing, and takes time to look at
        price_per_hour=plan.time.cost.price_per_hour if plan.time.cost else None,
        power_price_per_kwh=plan.time.cost.power_price_per_kwh if plan.time.cost else None,
        command=plan.provenance.command,
    )


def _set_knobs(choice: Choice) -> dict[str, int | float | str]:
    return {name: value for name, value in choice.knobs.items() if value is not None}


def card_of(plan: Plan) -> str:
    """What finds the plan's card again: its id, or ``local`` where it is this machine's and has no profile.

    Raises:
        PlanError: nothing finds it.
    """
    from planner.hardware import load_profile
    from planner.own_profile import folder

    measured = Path(plan.gpu.measured_file) if plan.gpu.measured_file is not None else None
    if measured is not None and measured.is_file() and (plan.gpu.kind == "gpu" or measured.parent != folder()):
        return str(measured)
    if plan.gpu.kind == "cpu":
        return "cpu"
    own = plan.gpu.profile_file
    if own is not None and Path(own).is_file():
        return own
    try:
        load_profile(plan.gpu.id)
    except PlanError as unknown:
        if _is_here(plan.gpu.id):
            return "local"
        nearest = "`plan check FILE --gpu CARD` takes the file of its profile, or another card."
        why = unknown.why if own is None else f"its profile {own} is not there any more."
        raise PlanError(f"card {plan.gpu.id}", why, nearest) from unknown
    return plan.gpu.id


def _is_here(card: str) -> bool:
    from planner.machine import detect_local

    try:
        return detect_local().id == card
    except PlanError:  # no card here at all
        return False


def differences(plan: Plan, now: Plan) -> Iterator[Difference]:
    """Every value that differs, save what is passed over, in the order of the file."""
    yield from _walk("", plan.document(), now.document())


def _walk(place: str, old: Any, new: Any) -> Iterator[Difference]:
    if place in PASSED_OVER or (place in NEW and old is None):
        return
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*old, *(key for key in new if key not in old)]:
            yield from _walk(f"{place}.{key}" if place else key, old.get(key), new.get(key))
    elif place == "choices":
        before, after = ({each["id"]: each["knobs"] for each in choices} for choices in (old, new))
        yield from _walk("choices", before, after)
    elif isinstance(old, list) and isinstance(new, list) and place == "stages":
        if len(old) != len(new):
            yield Difference("stages", len(old), len(new))
            return
        for number, (before, after) in enumerate(zip(old, new, strict=True), 1):
            yield from _walk(f"stages.{number}", before, after)
    elif old != new:
        yield Difference(place, old, new)


def _sentences(file: Path, plan: Plan, now: Plan, found: list[Difference]) -> Iterator[str]:
    yield f"{file} is a valid plan."
    answer = "It still fits: " if now.verdict == plan.verdict == "fits" else "Planned again: "
    yield answer + now.summary
    if not found:
        yield "Planned again today, nothing differs."
        return
    changed = [cause for place, cause in CAUSES.items() if any(each.place == place for each in found)]
    if changed:
        yield f"Since it was made, {', '.join(changed)} changed."
    else:
        yield "Card, model and calibration are the same as then, so the file itself was changed."
    shown = [each for each in found if each.place not in CAUSES]
    for each in shown[:MOST_LINES]:
        yield f"  {each.place}: {' in the file, '.join(_told(each))} now"
    if len(shown) > MOST_LINES:
        yield f"  and {len(shown) - MOST_LINES} more; --json lists all"


def _told(difference: Difference) -> tuple[str, str]:
    """Both values, in units for people unless those hide the difference."""
    values = (difference.file, difference.now)
    if difference.place.startswith(("memory.", "gpu.")) and all(type(value) is int for value in values):
        file, now = map(format_bytes, values)
        if file != now:
            return file, now
    file, now = ("nothing" if value is None else f"{value:,}" if type(value) is int else str(value) for value in values)
    return file, now
