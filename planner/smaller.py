"""The next smaller plan: the same training in less memory, for a run that could not have what it was planned for.

What changes a result stays as it was planned: rank, formats of weights and checkpoints, 16-bit compute, optimiser,
averages, packing. What only changes where things lie and when they are computed is searched again. What the user asked
for or ruled out by name stays so.
"""

from __future__ import annotations

import shlex
from dataclasses import replace
from itertools import zip_longest

from planner.cli_check import card_of, same_settings
from planner.hardware import HardwareProfile, Sourced
from planner.optimizations import all_optimizations
from planner.plan import Plan
from planner.planning import Request, Solved, plan_of, read_gpu, read_model, solved_for


def smaller_plan(plan: Plan, limit: int, host: int | None = None, *, shorter: bool = False) -> Plan | None:
    """A plan of the same training whose bound is within a limit; None where there is none.

    Args:
        limit: bytes of the card that its bound may take; with the CPU alone, of memory.
        host: bytes of host memory beside a card; None: as many as the plan was made for.
        shorter: whether the sequence may be shorter, where as long a one does not fit: the longest that does.

    Raises:
        PlanError: card or model are not to be found any more.
    """
    card = card_of(plan)
    whole, model, request = read_gpu(card), read_model(plan.model.source), same_training(plan)
    gpu = _with_less(whole, limit)
    if plan.gpu.kind == "cpu":  # one memory holds what a card would, and the process
        request = replace(request, host_bytes=plan.memory.host.peak_bytes - plan.memory.gpu.peak_bytes.high + limit)
    elif host is not None:
        request = replace(request, host_bytes=host)
    found = solved_for(request, gpu, model)
    longest = found.found.longest_with_target if plan.context else found.found.longest_all_trained
    if shorter and longest and not _fits(found):
        target = plan.target if plan.context else None
        found = solved_for(replace(request, tier=None, total_tokens=longest, target=target), gpu, model)
    if not _fits(found):
        return None
    # The settings are those of less memory. The card is what it is, and so is what the allocator may have of it.
    settings = same_settings(plan_of(found), card)
    if plan.gpu.kind == "cpu":
        settings = replace(settings, host_bytes=plan.memory.host.budget_bytes)
    made = plan_of(solved_for(settings, whole, model, below=False))
    return made.model_copy(update={"train": plan.train})


def _fits(solved: Solved) -> bool:
    return bool(solved.found.best.fits[solved.found.index])


def same_training(plan: Plan) -> Request:
    """The request that leaves open what does not change a plan's result."""
    request, known = same_settings(plan, card_of(plan)), all_optimizations()
    chosen = {choice.id for choice in plan.choices}
    fixed = {name for name, each in known.items() if not each.exact or each.asked}
    wanted, unwanted, pinned = _by_name(plan.provenance.command)
    knobs = {
        name: {knob: value for knob, value in of.items() if name in fixed or f"{name}.{knob}" in pinned}
        for name, of in request.knobs.items()
    }
    return replace(
        request,
        required=tuple(sorted(chosen & (fixed | wanted))),
        excluded=tuple(sorted((fixed - chosen) | unwanted)),
        knobs={name: of for name, of in knobs.items() if of},
    )


def _by_name(command: str) -> tuple[set[str], set[str], set[str]]:
    """What a command insists on, what it rules out, and the knobs that it sets."""
    found: dict[str, set[str]] = {"--with": set(), "--without": set(), "--set": set()}
    try:
        words = shlex.split(command)
    except ValueError:  # a plan file says what its author likes
        words = command.split()
    for word, following in zip_longest(words, words[1:], fillvalue=""):
        option, equals, value = word.partition("=")
        if option in found:
            found[option].add((value if equals else following).partition("=")[0])
    return found["--with"], found["--without"], found["--set"]


def _with_less(gpu: HardwareProfile, limit: int) -> HardwareProfile:
    """A card with no more memory to have than so much."""
    budget, in_use = gpu.budget_bytes(), int(gpu.in_use_bytes.value or 0)
    if gpu.kind == "cpu" or budget is None or budget <= limit:
        return gpu
    held = Sourced(in_use + budget - limit, "what a run could not have", basis=gpu.in_use_bytes.basis)
    return replace(gpu, in_use_bytes=held)
