"""What each stage of a run whose rows grow takes: planned by its own length, with the settings of the run."""

from __future__ import annotations

import numpy as np

from planner.errors import PlanError
from planner.evaluate import Candidates, Evaluator, Limits
from planner.plan import Peak, Stage
from planner.plan_time import seconds_at
from planner.solver import Search, Wanted
from planner.stages import NAME, cuts, shapes
from planner.units import format_count


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
        PlanError: rows of the length that was found cannot be cut so.
    """
    configuration, want = found.best.configuration, found.wanted[found.index]
    if NAME not in configuration.ids:
        return []
    stages = int(configuration.knobs[NAME]["stages"])
    check_stages(want, stages)
    planned = []
    for shape in shapes(want.total, want.target, batch, stages):
        candidates = Candidates(np.array([shape.total]), np.array([shape.target]), np.array([want.rank]), shape.rows)
        made = Evaluator(candidates, found.situation, found.constants, limits)(configuration)
        planned.append(
            Stage(
                rows=shape.rows,
                total_tokens=shape.total,
                target=shape.target,
                peak_bytes=Peak(low=int(made.low[0]), expected=int(made.expected[0]), high=int(made.high[0])),
                host_peak_bytes=int(made.host[0]),
                step_seconds=seconds_at(made, 0, want.rank, found.situation.gpu, found.constants),
            )
        )
    return planned
