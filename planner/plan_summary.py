"""The sentence that a plan begins with."""

from __future__ import annotations

from planner.evaluate import Limits
from planner.optimizations.base import Situation
from planner.solver import Wanted
from planner.units import GIB, format_bytes, format_count, format_seconds


def summary_of(situation: Situation, limits: Limits, fits: bool, want: Wanted) -> str:
    """What is trained on which card, or does not fit, and under which conditions."""
    tokens = f"{format_count(want.total)} tokens"
    what = f"tier {want.tier}, {tokens}" if want.tier else tokens
    used = limits.disk_bytes and situation.gpu.kind == "gpu"  # with the CPU alone nothing is streamed
    disk = f"{_round_gib(limits.disk_bytes)} of disk" if used else "no disk offload"
    conditions = (
        f"with {_round_gib(limits.host_bytes)} host RAM, {disk}, at most {format_seconds(limits.step_seconds)} a step"
    )
    verb = "trains" if fits else "does not fit"
    return f"{situation.model.id} on {situation.gpu.name} {verb} {what}, {conditions}."


def _round_gib(size: int) -> str:
    return f"{size // GIB} GiB" if size % GIB == 0 else format_bytes(size)
