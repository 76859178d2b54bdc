"""From a request to a plan: reads card and model, searches, explains, and writes everything down."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any, Literal

from pydantic import ValidationError

from planner import __version__
from planner.calibration import calibration
from planner.collector import uncollected
from planner.errors import PlanError, raise_all
from planner.evaluate import Limits
from planner.explanations import reasons_for_choices, reasons_for_rejections
from planner.hardware import HardwareProfile, is_file, load_profile
from planner.lengths import NO_TIER_RANK, wanted
from planner.longest import COARSEST
from planner.machine import cpu_profile, detect_local
from planner.micro_batch import rows_mistakes, split_rows
from planner.model import ModelShape, load_model
from planner.on_card import SpaceOnCard
from planner.optimizations.adapters.lora import alpha_of
from planner.optimizations.base import Scalar, Situation
from planner.plan import (
    Choice,
    Longest,
    Model,
    Plan,
    Provenance,
    Rejection,
    Scaling,
    Train,
)
from planner.plan_facts import RANDOM, digest, gpu_facts, profile_data, slug, source_of
from planner.plan_stages import memory_in_stages, plan_stages
from planner.plan_summary import summary_of
from planner.plan_time import Prices, plan_time
from planner.plan_warnings import (
    before_training,
    disk_without_effect,
    knobs_without_effect,
    never_measured,
    schedule_beside,
    settings_without_effect,
    warnings_of,
)
from planner.rope_scaling import rope_mistakes, rope_of
from planner.sets import usable
from planner.settings import check_sets, unknown_names
from planner.solver import Objective, Search, Wanted, never_used, resorts_of, search, space_of
from planner.space import Space
from planner.suggestions import Pins, suggestions
from planner.tiers import TIERS
from planner.units import GIB, format_count, format_seconds

NOT_MODELLED = ("several cards", "what other programs take of the card while it trains")
HOST_BYTES = 32 * GIB  # of host RAM, unless the user says how much there is
LONG_STEP_SECONDS = 1800.0  # from here on a run is stored while it is under way, unless the user says otherwise
SAVE_MINUTES = 15.0


@dataclass(frozen=True)
class Request:
    """What the user asks for; see the help of `plan`."""

    gpu: str = "rtx2060s"
    model: str = "phi-2"
    tier: int | None = None
    total_tokens: int | None = None
    target: int | None = None
    rows: int | None = None  # of an optimiser step, split by the plan; else train.batch times train.accumulation
    rope: Scaling | None = None  # left to the plan
    rope_factor: float | None = None
    objective: Objective = "context"
    host_bytes: int | None = None  # 32 GiB, or with `--gpu cpu` what the machine has
    disk_bytes: int = 0  # to train with, beside what a run leaves behind
    max_step_seconds: float = 86_400.0
    required: tuple[str, ...] = ()
    excluded: tuple[str, ...] = ()
    knobs: Mapping[str, Mapping[str, Scalar]] = field(default_factory=dict)
    train: Mapping[str, Scalar] = field(default_factory=dict)
    price_per_hour: float | None = None  # of the card
    power_price_per_kwh: float | None = None
    command: str = ""


@dataclass(frozen=True)
class Solved:
    """A request with what it is about, and what the search found."""

    request: Request
    situation: Situation
    limits: Limits
    found: Search


ENDLESS_DISK = 2**62  # bytes
SpaceOf = Callable[[Situation, Request], Space]


def make_plan(request: Request) -> Plan:
    """Plan a run.

    Raises:
        PlanError: the request names something unknown, contradicts itself, or the card lacks a fact that is needed.
    """
    with uncollected():
        return plan_of(solved(request))


def solved(request: Request, *, below: bool = True) -> Solved:
    """What a plan is written from.

    Args:
        below: whether to look for a shorter sequence where no tier fits.

    Raises:
        PlanError: as ``make_plan``.
    """
    errors = contradictions(request)
    gpu, model = _read(errors, read_gpu, request.gpu), _read(errors, read_model, request.model)
    raise_all(errors)
    assert isinstance(gpu, HardwareProfile) and isinstance(model, ModelShape)
    if request.rows is not None:
        return split_rows(request, lambda split: solved_for(split, gpu, model, below=below))
    return solved_for(request, gpu, model, below=below)


def space_for(situation: Situation, request: Request) -> Space:
    """Everything that a request leaves to choose."""
    return space_of(situation, request.required, request.excluded, request.knobs)


def solved_for(
    request: Request, gpu: HardwareProfile, model: ModelShape, space_for: SpaceOf = space_for, *, below: bool = True
) -> Solved:
    """The same for a card and a model that have been read, and for a space that may have been made before."""
    host_bytes = HOST_BYTES if request.host_bytes is None else request.host_bytes
    situation = Situation(gpu, model, host_bytes, merge=bool(request.train.get("merge")), disk_bytes=request.disk_bytes)
    wrong = check_sets(request.required, request.excluded, request.knobs, situation)
    raise_all([*wrong, *rope_mistakes(model, request.rope, request.rope_factor)])
    if model.not_planned:
        raise PlanError(
            f"model {request.model}",
            f"what its training takes is unknown: {'; '.join(model.not_planned)}.",
            "`plan models` lists what can be planned.",
        )
    if why := model.quantized_otherwise:
        nearest = "Give the original 16-bit weights: nf4_weights quantises them while loading."
        raise PlanError(f"model {request.model}", f"{why}.", nearest)
    budget = gpu.budget_bytes()
    if budget is None or gpu.unknown_kernels():
        why = f"what a plan needs is unknown: {'; '.join(gpu.missing())}."
        own = request.gpu if is_file(request.gpu) else f"a copy of hwprofiles/{gpu.id}.yaml"
        nearest = f"Write your card's own figure into {own}, and give its path to --gpu."
        if gpu.gfx:
            nearest = "`plan gpus` lists the cards; those of NVIDIA are planned for."
        raise PlanError(f"card {gpu.id}", why, nearest)
    if gpu.kind == "cpu":
        # The card's memory and the host's are one: what there is, or less where the user says so.
        budget = budget if request.host_bytes is None else min(budget, request.host_bytes)
        host_bytes = budget
    accumulation = int(request.train.get("accumulation", 1))
    limits = Limits(budget, host_bytes, request.max_step_seconds, accumulation, request.disk_bytes)
    constants = calibration()

    def on_card(required: tuple[str, ...]) -> SpaceOnCard:
        space = space_for(situation, replace(request, required=required))
        return SpaceOnCard(space, gpu, constants, accumulation)

    whole = on_card(request.required)
    raise_all(never_used(request.knobs, whole.space.names, situation))
    resorts = resorts_of(situation, request.required, request.excluded, on_card)
    batch = int(request.train.get("batch", 1))

    def find(lengths: list[Wanted]) -> Search:
        return search(
            situation,
            limits,
            constants,
            lengths,
            objective=request.objective,
            batch=batch,
            on_card=whole,
            resorts=resorts,
        )

    found = find(wanted(request, model))
    open_length = request.tier is None and request.total_tokens is None
    if below and open_length and not found.best.fits[found.index]:
        found = _below_the_tiers(request, found, find) or found
    if request.max_step_seconds != Request.max_step_seconds and found.best.time.estimate is None:
        lacking = "; ".join(gpu.missing()) or "a rate that its optimisations go by"
        why = f"whether a step is within it is unknown, as {gpu.id} lacks {lacking}."
        nearest = "Leave the limit off: memory is planned without rates."
        raise PlanError(f"--max-step-time {format_seconds(request.max_step_seconds)}", why, nearest)
    return Solved(request, situation, limits, found)


def _below_the_tiers(request: Request, tiers: Search, find: Callable[[list[Wanted]], Search]) -> Search | None:
    """The longest sequence that fits at a smaller rank where no tier does; every token trained, or as many as asked."""
    rank = int(request.knobs.get("lora", {}).get("rank", NO_TIER_RANK))
    shortest = max(COARSEST, request.target or 0)
    longest = tiers.longest_for(Wanted(None, shortest, request.target or shortest, rank), request.target)
    return find([Wanted(None, longest, request.target or longest, rank)]) if longest else None


def contradictions(request: Request) -> list[PlanError]:
    """What is wrong with a request whatever card and model it is for."""
    errors = unknown_names(request.required, request.excluded) + rows_mistakes(request.rows, request.train)
    both = sorted(set(request.required) & set(request.excluded))
    errors += [PlanError(f"--with {name} --without {name}", "asks for both.", "Drop one.") for name in both]
    if request.tier is not None and request.total_tokens is not None:
        errors.append(PlanError("--tier with --context", "each sets the length.", "Give one of them."))
    if request.tier is not None and not 1 <= request.tier <= len(TIERS):
        errors.append(PlanError(f"--tier {request.tier}", f"tiers go from 1 to {len(TIERS)}."))
    if request.total_tokens is not None and not 2 <= request.total_tokens <= 2**26:
        asked = format_count(request.total_tokens)
        errors.append(PlanError(f"--context {asked}", "must be from 2 to 67,108,864 tokens.", "Try --context 8K."))
    longest, whose = _longest_asked(request)
    if (request.target or 0) > longest:
        why = f"is more than the {format_count(longest)} tokens of {whose}."
        errors.append(PlanError(f"--set train.target={request.target}", why))
    if request.host_bytes is not None and request.host_bytes <= 0:
        errors.append(PlanError(f"--host-ram {request.host_bytes}", "leaves no memory.", "Try --host-ram 16GiB."))
    if request.disk_bytes < 0:
        errors.append(PlanError(f"--disk {request.disk_bytes}", "is less than nothing.", "Try --disk 200GiB."))
    if request.max_step_seconds <= 0:
        errors.append(PlanError("--max-step-time 0", "leaves no time.", "Try --max-step-time 10m."))
    if request.objective != "context" and request.tier is None and request.total_tokens is None:
        asked = f"--objective {request.objective}"
        errors.append(PlanError(asked, "needs a length.", "Add --context 8K or --tier 1, say."))
    return errors


def _longest_asked(request: Request) -> tuple[int, str]:
    """The longest sequence that a request can lead to, and what sets it."""
    if request.total_tokens is not None:
        return request.total_tokens, "--context"
    number = min(request.tier or len(TIERS), len(TIERS))
    return TIERS[number - 1].total, f"tier {number}"


def _read(errors: list[PlanError], reader: Any, name: str) -> Any:
    try:
        return reader(name)
    except PlanError as error:
        errors.append(error)
        return None


def read_gpu(name: str) -> HardwareProfile:
    """The card as ``--gpu`` names it; this machine's own as it was measured, where it was."""
    if name not in ("local", "cpu"):
        return load_profile(name)
    from planner.own_profile import with_own_measurement

    return with_own_measurement({"local": detect_local, "cpu": cpu_profile}[name]())


def read_model(name: str) -> ModelShape:
    """The model as ``--model`` names it."""
    return load_model(name.removeprefix(RANDOM))


def plan_of(solved: Solved) -> Plan:
    """The plan of what was found, with reasons, and where it does not fit with what would."""
    request, situation, limits, found = solved.request, solved.situation, solved.limits, solved.found
    gpu, model, best, index = situation.gpu, situation.model, found.best, found.index
    want = found.wanted[index]
    fits = bool(best.fits[index])
    knobs: dict[str, dict[str, str | int | float | bool | None]] = {
        name: dict(values) for name, values in best.configuration.knobs.items()
    }
    if "lora" in knobs:
        alpha = alpha_of(int(knobs["lora"]["alpha"] or 0), want.rank, by_root="rslora" in knobs)
        knobs["lora"] |= {"rank": want.rank, "alpha": alpha}
    chosen = reasons_for_choices(found, limits, request.objective, request.required)
    rejected = reasons_for_rejections(found, limits, request.objective, request.excluded)
    executor = _executor(best.configuration.settings["executor"])
    train, source = _train(request, f"runs/{slug(model.id)}-{want.total}", executor), source_of(request.model, model)
    rope = rope_of(model, want.total, request.rope, request.rope_factor)
    prices = Prices(request.price_per_hour, request.power_price_per_kwh)
    pins = Pins(request.required, request.excluded, request.knobs)
    stages = plan_stages(found, limits, train.batch)
    time, warnings = plan_time(found, request.max_step_seconds, train, source, prices)
    if "save_minutes" not in request.train and (time.step_seconds.estimate or 0) >= LONG_STEP_SECONDS:
        train = train.model_copy(update={"save_minutes": SAVE_MINUTES})
    return Plan(
        verdict="fits" if fits else "does-not-fit",
        summary=summary_of(situation, limits, fits, want),
        gpu=gpu_facts(gpu, request.gpu),
        model=Model(
            id=model.id,
            source=source,
            architecture=model.architecture,
            parameters=model.parameters,
            layers=model.layers,
            native_context=model.native_context,
        ),
        executor=executor,
        objective=request.objective,
        tier=want.tier,
        context=want.total - want.target,
        target=want.target,
        total_tokens=want.total,
        lora_rank=want.rank,
        longest=Longest(with_target=found.longest_with_target, all_trained=found.longest_all_trained),
        choices=[Choice(id=name, reason=chosen[name], knobs=knobs[name]) for name in best.ids],
        rejected=[Rejection(id=name, reasons=list(reasons)) for name, reasons in rejected.items()],
        memory=memory_in_stages(found, limits, train.batch),
        time=time,
        stages=stages,
        rope=rope,
        train=train,
        nearest=[]
        if fits
        else suggestions(
            found, limits, pins, partial(_replanned, solved, want), partial(_with_disk, solved, want, pins)
        ),
        warnings=[
            *warnings_of(situation, want.total, rope, here=request.gpu in ("local", "cpu")),
            *knobs_without_effect(request.knobs, rejected),
            *disk_without_effect(request.disk_bytes, rejected),
            *settings_without_effect(request.train, best.configuration.settings),
            *schedule_beside(best.configuration.knobs, train, best.configuration.settings["schedule"]),
            *never_measured(best.ids),
            *before_training(best.configuration.knobs, time),
            *warnings,
        ],
        not_modelled=list(NOT_MODELLED),
        provenance=Provenance(
            tierplan=__version__,
            command=request.command,
            profile_sha256=digest(profile_data(gpu)),
            model_sha256=digest(asdict(model)),
            calibration_sha256=found.constants.sha256,
        ),
    )


def _executor(name: str) -> Literal["resident", "streamed"]:
    return "streamed" if name == "streamed" else "resident"


def _replanned(made: Solved, want: Wanted, pins: Pins, disk_bytes: int | None = None) -> Search:
    """The same length on the same card with other pins, or with another disk.

    Raises:
        PlanError: no valid set is left by the pins.
    """
    knobs = {**pins.knobs, "lora": {**pins.knobs.get("lora", {}), "rank": want.rank}}
    length = replace(made.request, tier=None, total_tokens=want.total, target=want.target)
    request = replace(length, required=pins.required, excluded=pins.excluded, knobs=knobs)
    if disk_bytes is not None:
        request = replace(request, disk_bytes=disk_bytes)
    return solved_for(request, made.situation.gpu, made.situation.model, below=False).found


def _with_disk(made: Solved, want: Wanted, pins: Pins) -> Search | None:
    """The same with as much disk as it takes, by sets that use it; None where none can.

    Where nothing fits, more disk does nothing for a set that leaves it alone.
    """
    without, roomy = (replace(made.situation, disk_bytes=size) for size in (0, ENDLESS_DISK))
    users = {*usable(roomy, pins.required, pins.excluded)} - {*usable(without, pins.required, pins.excluded)}
    if not users:
        return None
    asked = pins if len(users) > 1 else replace(pins, required=(*pins.required, *users))
    try:
        return _replanned(made, want, asked, ENDLESS_DISK)
    except PlanError:  # a knob is pinned of what cannot stand beside it: all sets are looked at, as far as they use it
        return _replanned(made, want, pins, ENDLESS_DISK)


# A row is judged by a forward pass, about a quarter of a step; where layers run in passes, steps are long.
EVALUATION_ROWS = {"resident": 64, "streamed": 4}


def _train(request: Request, out: str, executor: str) -> Train:
    given = {name: value for name, value in request.train.items() if name != "target"}
    try:
        return Train.model_validate({"out": out, "evaluation_rows": EVALUATION_ROWS[executor], **given})
    except ValidationError as error:
        raise_all([PlanError(f"train.{item['loc'][0]}", item["msg"] + ".") for item in error.errors()])
        raise AssertionError("unreachable") from error
