"""Which lengths a request wants looked at: the one it names, the tiers, or all a model has positions for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from planner.errors import PlanError
from planner.model_shape import ModelShape
from planner.solver import Wanted
from planner.tiers import TIERS
from planner.units import format_count

if TYPE_CHECKING:
    from planner.planning import Request

NO_TIER_RANK = 8  # rank where no tier sets one, as long as the user sets none


def wanted(request: Request, model: ModelShape) -> list[Wanted]:
    """The lengths to look at, the best last.

    Where no tier is within the positions that a model has, it is all of these.

    Raises:
        PlanError: the length or the tier that is asked for is beyond them.
    """
    rank, most = request.knobs.get("lora", {}).get("rank"), model.most_tokens
    if request.total_tokens is not None:
        check_length(f"--context {format_count(request.total_tokens)}", request.total_tokens, model)
        return [_of_length(request, request.total_tokens)]
    if request.tier is not None:
        check_length(f"--tier {request.tier}", TIERS[request.tier - 1].total, model)
    tiers = [tier for tier in TIERS if request.tier in (None, tier.number) and (most is None or tier.total <= most)]
    if not tiers:
        assert most is not None
        return [_of_length(request, most)]
    return [
        Wanted(tier.number, tier.total, min(request.target or tier.target, tier.total), int(rank or tier.rank))
        for tier in tiers
    ]


def check_length(asked: str, total: int, model: ModelShape) -> None:
    """See whether a model has positions for so many tokens.

    Raises:
        PlanError: it has a learned row for each position, and fewer.
    """
    most = model.most_tokens
    if most is not None and total > most:
        why = (
            f"is {format_count(total)} tokens: {model.id} has a learned row for each of {format_count(most)} positions"
        )
        raise PlanError(asked, f"{why}, and none beyond.", f"--context {most} is the longest.")


def _of_length(request: Request, total: int) -> Wanted:
    rank = int(request.knobs.get("lora", {}).get("rank", NO_TIER_RANK))
    return Wanted(None, total, min(request.target or total, total), rank)
