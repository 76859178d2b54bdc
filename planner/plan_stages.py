"""What each stage of a run whose rows grow takes: planned by its own length, with the settings of the run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from planner.errors import PlanError
from planner.evaluate import Candidates, Evaluator, Limits
from planner.plan import Memory, Peak, Stage
from planner.plan_memory import memory_of
from planner.plan_time import seconds_at
from planner.solver import Search, Wanted
from planner.stages import NAME, cuts, shapes
from planner.units import format_bytes, format_count, format_seconds


def check_stages(want: Wanted, stages: int) -> None:
    """Whether rows of that length can be cut in equal pieces.

    Raises:
        PlanError: they cannot.
    """
    pieces = cuts(stages)[0]
    if want.total % pieces:
        why = f"cuts rows in {pieces}, and {format_count(want.total)} tokens are no multiple of that."
        below = want.total // pieces * pieces
        nearest = f"--context {below} is one." if below >= 2 * pieces else "Ask for fewer stages, or a longer context."
        raise PlanError(f"{NAME}.stages={stages}", why, nearest)


def plan_stages(found: Search, limits: Limits, batch: int) -> list[Stage]:
    """Each stage of what was found, by its own length; empty where rows have one length.

    Raises:
        PlanError: rows of the length that was found cannot be cut so, or the last stage fits and another does not.
    """
    each = list(_searches(found, limits, batch))
    stages = [
        Stage(
            rows=one.candidates.batch,
            total_tokens=one.wanted[0].total,
            target=one.wanted[0].target,
            peak_bytes=Peak(low=int(one.best.low[0]), expected=int(one.best.expected[0]), high=int(one.best.high[0])),
            host_peak_bytes=int(one.best.host[0]),
            step_seconds=seconds_at(one.best, 0, one.wanted[0].rank, one.situation.gpu, one.constants),
        )
        for one in each
    ]
    if stages and found.best.fits[found.index]:
        _check_room(stages, limits)
    return stages


def memory_in_stages(found: Search, limits: Limits, batch: int) -> Memory:
    """The memory of a run: that of the stage that takes most, of the card and of the host, or of the only one."""
    each = [*_searches(found, limits, batch)]
    if not each:
        return memory_of(found, limits)
    # Where several take as much it is the last, which all else of a plan is about.
    card = max(reversed(each), key=lambda one: int(one.best.expected[0]))
    host = max(reversed(each), key=lambda one: int(one.best.host[0]))
    last = memory_of(found, limits)
    return last.model_copy(update={"gpu": memory_of(card, limits).gpu, "host": memory_of(host, limits).host})


def _searches(found: Search, limits: Limits, batch: int) -> Iterator[Search]:
    """What was found, at the largest micro-batch of each stage."""
    configuration, want = found.best.configuration, found.wanted[found.index]
    if NAME not in configuration.ids:
        return
    stages = int(configuration.knobs[NAME]["stages"])
    check_stages(want, stages)
    for shape in shapes(want.total, want.target, batch, stages):
        candidates = Candidates(np.array([shape.total]), np.array([shape.target]), np.array([want.rank]), shape.rows)
        made = Evaluator(candidates, found.situation, found.constants, limits)(configuration)
        at = Wanted(None, shape.total, shape.target, want.rank)
        yield replace(found, candidates=candidates, wanted=(at,), taken=made, index=0)


def _check_room(stages: Sequence[Stage], limits: Limits) -> None:
    for number, stage in enumerate(stages, 1):
        over = (stage.peak_bytes.high - limits.gpu_bytes, stage.host_peak_bytes - limits.host_bytes)
        for where, size in zip(("card", "host"), over, strict=True):
            if size > 0:
                what = f"stage {number}, {stage.rows:,} rows of {stage.total_tokens:,} tokens,"
                why = f"{what} takes {format_bytes(size)} more than the {where} has, which the last stage does not."
                raise PlanError(f"{NAME}.stages={len(stages)}", why, "Ask for fewer stages, or a shorter --context.")
        slow = stage.step_seconds or 0.0
        if slow > max(limits.step_seconds, stages[-1].step_seconds or 0.0):
            took, limit = format_seconds(slow), format_seconds(limits.step_seconds)
            why = f"a step of stage {number}, of {stage.total_tokens:,} tokens, takes {took}, and the limit is {limit}."
            raise PlanError(f"{NAME}.stages={len(stages)}", why, "Ask for fewer stages, or a longer --max-step-time.")
