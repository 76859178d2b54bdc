"""Every tier on one card: whether it fits, with which settings, what it takes, and if not, what is lacking."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from planner.errors import PlanError, raise_all
from planner.evaluate import Outcome
from planner.lengths import check_length
from planner.micro_batch import rows_at_many_lengths
from planner.optimizations import all_optimizations
from planner.optimizations.adapters.lora import alpha_of
from planner.optimizations.base import Scalar
from planner.plan_time import seconds_at
from planner.planning import Request, Solved, solved
from planner.suggestions import Need, needed
from planner.tiers import TIERS
from planner.units import format_bytes, format_seconds


@dataclass(frozen=True)
class TierRow:
    """One tier. Bytes and seconds are of the settings that are chosen, or where none fit of those that come nearest.

    ``lacks`` says by how much each limit is missed: bytes of ``card``, ``host`` and ``disk``, ``seconds`` a step.
    """

    tier: int
    context: int
    target: int
    total_tokens: int
    rank: int
    fits: bool
    optimizations: tuple[str, ...]
    knobs: Mapping[str, Mapping[str, Scalar]]
    gpu_high_bytes: int
    host_bytes: int
    disk_bytes: int
    step_seconds: float | None
    lacks: Mapping[str, float]

    @property
    def reason(self) -> str:
        """What is lacking, in a few words; empty where it fits."""
        return lacking(self.lacks)


@dataclass(frozen=True)
class TierTable:
    """All tiers on one card."""

    gpu: str
    model: str
    gpu_budget_bytes: int
    host_budget_bytes: int
    limit_seconds: float
    tiers: tuple[TierRow, ...]

    def document(self) -> dict[str, Any]:
        """As plain data."""
        told = asdict(self)
        for row, tier in zip(told["tiers"], self.tiers, strict=True):
            row["reason"] = tier.reason
        return told


def tier_table(request: Request) -> TierTable:
    """Plan every tier.

    Raises:
        PlanError: as ``make_plan``, and where the request names a length.
    """
    if request.tier is not None or request.total_tokens is not None:
        raise PlanError("plan tiers", "plans every tier, so it takes no length.", "`plan --tier N` plans one.")
    raise_all(rows_at_many_lengths(request.rows))
    made = solved(request, below=False)
    if made.found.wanted[0].tier is None:
        check_length("tier 1", TIERS[0].total, made.situation.model)
    rows = tuple(_row(made, index) for index in range(len(made.found.wanted)))
    limits = made.limits
    gpu, model = made.situation.gpu.id, made.situation.model.id
    return TierTable(gpu, model, limits.gpu_bytes, limits.host_bytes, limits.step_seconds, rows)


def _row(made: Solved, index: int) -> TierRow:
    found = made.found
    want, best = found.wanted[index], found.best_at(index)
    need = needed(best, made.limits, index, shared=made.situation.gpu.kind == "cpu")
    missed, seconds = lacks(need), seconds_at(best, index, want.rank, made.situation.gpu, found.constants)
    if "seconds" in missed and seconds is not None:
        missed["seconds"] = seconds - made.limits.step_seconds  # the optimiser's own step with it
    assert want.tier is not None
    return TierRow(
        tier=want.tier,
        context=want.total - want.target,
        target=want.target,
        total_tokens=want.total,
        rank=want.rank,
        fits=bool(best.fits[index]),
        optimizations=best.ids,
        knobs=knobs_of(best, want.rank),
        gpu_high_bytes=int(best.high[index]),
        host_bytes=int(best.host[index]),
        disk_bytes=int(best.disk[index]),
        step_seconds=seconds,
        lacks=missed,
    )


def lacks(need: Need) -> dict[str, float]:
    """By how much each limit is missed; only those that are."""
    return {name: size for name in ("card", "host", "disk", "seconds") if (size := getattr(need, name)) > 0}


def lacking(lacks: Mapping[str, float]) -> str:
    """By how much each limit is missed, in words."""
    parts = []
    if "card" in lacks:
        parts.append(f"card lacks {format_bytes(int(lacks['card']))}")
    if "host" in lacks:
        parts.append(f"host lacks {format_bytes(int(lacks['host']))}")
    if "disk" in lacks:
        parts.append(f"disk lacks {format_bytes(int(lacks['disk']))}")
    if "seconds" in lacks:
        parts.append(f"step takes {format_seconds(lacks['seconds'])} too long")
    return ", ".join(parts)


def knobs_of(outcome: Outcome, rank: int) -> dict[str, dict[str, Scalar]]:
    """The knobs of what is on, as a plan has them."""
    knobs = {name: dict(values) for name, values in outcome.configuration.knobs.items() if values}
    if "lora" in knobs:
        knobs["lora"] |= {
            "rank": rank,
            "alpha": alpha_of(int(knobs["lora"]["alpha"]), rank, by_root="rslora" in outcome.configuration.ids),
        }
    return knobs


def in_every_row(table: TierTable) -> tuple[str, ...]:
    """The optimisations that every tier has on."""
    return tuple(name for name in all_optimizations() if all(name in row.optimizations for row in table.tiers))
