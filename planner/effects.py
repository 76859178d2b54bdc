"""What each optimisation does to a run: bytes of every term, the peak, and the time of a step, with it and without it.

Where it is on in a plan, that is the plan against the plan without it. Where it is off, it is put into the plan's set,
and what cannot stand beside it leaves. Where more leaves than the one, exact ones and those of the plan that take
memory off the card come in its place, as they would in a plan.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from planner.calibration import calibration
from planner.compose import problems
from planner.evaluate import Candidates, Evaluator, Outcome
from planner.explain_formulas import Run, planned_run, run_of, run_without
from planner.ledger import Device
from planner.optimizations import all_optimizations
from planner.plan import Plan
from planner.plan_time import seconds_at
from planner.sets import trains
from planner.solver import ENDLESS_LIMITS
from planner.stages import NAME, Shape, shapes


@dataclass(frozen=True)
class Effect:
    """What changes when an optimisation is switched on; what it drives off, or cannot be without, changes with it.

    Attributes:
        terms: bytes more of each term that becomes another, less where negative; on whatever device it lies.
        moved: terms that lie elsewhere with it: gpu, pinned, host or disk.
        peak_bytes: bytes more at the peak of the card.
        step: how many times as long a step takes, on average over a run in stages; None where the card's rates are
            unknown.
        beside: what else is on with it and off without it, or the other way round.
    """

    terms: dict[str, int]
    moved: dict[str, str]
    peak_bytes: int
    step: float | None
    beside: tuple[str, ...]


def effects(plan: Plan, gpu: str = "") -> dict[str, Effect]:
    """For each optimisation that can be used here, and without which something is trained, what it does.

    Args:
        gpu: the card as the user named it, where the plan's id does not find it again.
    """
    run, found = planned_run(plan, gpu), {}
    for name in all_optimizations():
        with_it = run if name in run.configuration.ids else run_with(name, run)
        if with_it is None:
            continue
        without = run_without(name, with_it)
        if len(with_it.configuration.ids) - len(without.configuration.ids) > 1:
            without = _with_stand_ins(without, with_it, but=name)
        if trains(without.configuration.ids):
            found[name] = _between(name, without, with_it)
    return found


def run_with(name: str, run: Run) -> Run | None:
    """The configuration with an optimisation in it and without what cannot stand beside it; None where it cannot be."""
    if all_optimizations()[name].reasons(replace(run.situation, chosen=frozenset())):
        return None
    ids = {*run.configuration.ids, name}
    while broken := {*problems(ids, run.situation)} - {name}:
        ids -= broken
    if problems(ids, run.situation):  # what it needs left with what it cannot stand beside; another may give it
        others = (ids | {other} for other in all_optimizations())
        ids = next((each for each in others if not problems(each, run.situation)), ids)
    if problems(ids, run.situation) or not trains(tuple(ids)):
        return None
    found = run_of(run.plan, run.situation, ids, run.configuration.knobs)
    return found if ids > {*run.configuration.ids} else _with_stand_ins(found, run, but="")


def _with_stand_ins(left: Run, run: Run, *, but: str) -> Run:
    """What is left of a run, with what lowers its peak on the card in place of what had to leave; one may not."""
    known, there = all_optimizations(), {*run.configuration.ids}
    may = [each for each in known if each != but and (each in there or (known[each].exact and not known[each].asked))]
    peak, before = int(_evaluated(left).expected[0]), -1
    while len(left.configuration.ids) != before:
        before = len(left.configuration.ids)
        for other in may:
            ids = {*left.configuration.ids, other}
            if other in left.configuration.ids or problems(ids, left.situation):
                continue
            more = run_of(left.plan, left.situation, ids, run.configuration.knobs)
            if (size := int(_evaluated(more).expected[0])) < peak:
                left, peak = more, size
    return left


def _between(name: str, without: Run, with_it: Run) -> Effect:
    before, after = _evaluated(without), _evaluated(with_it)
    old, new = _sizes(without), _sizes(with_it)
    terms = {term: new.get(term, 0) - old.get(term, 0) for term in [*new, *(each for each in old if each not in new)]}
    places = {term: each.device for term, each in without.configuration.ledger.terms.items()}
    moved = {
        term: each.device.value
        for term, each in with_it.configuration.ledger.terms.items()
        if term in places and places[term] is not each.device and new[term]
    }
    slow, fast = (
        seconds_at(outcome, 0, run.plan.lora_rank, run.situation.gpu, calibration())
        for outcome, run in ((before, without), (after, with_it))
    )
    return Effect(
        terms={term: size for term, size in terms.items() if size},
        moved=moved,
        peak_bytes=int(after.expected[0]) - int(before.expected[0]),
        step=None if slow is None or fast is None else fast * _mean_of_stages(with_it, fast) / slow,
        beside=tuple(sorted({*with_it.configuration.ids} ^ {*without.configuration.ids} ^ {name})),
    )


def _mean_of_stages(run: Run, seconds: float) -> float:
    """A step on average over the stages of a run, as a share of one in the last; 1 where rows have one length."""
    knobs, plan = run.configuration.knobs.get(NAME), run.plan
    if knobs is None:
        return 1.0
    mean = 0.0
    for shape in shapes(plan.total_tokens, plan.target, plan.train.batch, int(knobs["stages"])):
        made = _evaluated(run, shape)
        took = seconds_at(made, 0, plan.lora_rank, run.situation.gpu, calibration())
        assert took is not None
        mean += took / int(knobs["stages"])
    return mean / seconds


def _sizes(run: Run) -> dict[str, int]:
    return {name: int(term.bytes(run.letters)) for name, term in run.configuration.ledger.terms.items()}


def _evaluated(run: Run, shape: Shape | None = None) -> Outcome:
    plan = run.plan
    at = shape or Shape(plan.train.batch, plan.total_tokens, plan.target)
    candidates = Candidates(np.array([at.total]), np.array([at.target]), np.array([plan.lora_rank]), at.rows)
    limits = replace(ENDLESS_LIMITS, accumulation=plan.train.accumulation)
    return Evaluator(candidates, run.situation, calibration(), limits)(run.configuration)


def device_words(device: str) -> str:
    """Where that is, for people."""
    return {Device.GPU: "on the card", Device.DISK: "on disk"}.get(Device(device), f"in {device} memory")
