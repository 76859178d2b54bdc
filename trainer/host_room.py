"""Is there host memory for a plan here and now? Asked before the first byte of it is taken.

Pinning takes pages for good: where there are too few, the system ends processes instead of saying no.
"""

from __future__ import annotations

from planner.errors import PlanError
from planner.machine import free_host_bytes
from planner.plan import Plan
from planner.units import GIB, format_bytes
from trainer.measure import host_anonymous_bytes

BY_TOKENS = ("activations", "attention", "buffers", "loss")
"""Groups of terms that are as long as the sequence wherever they lie in the host."""
_STEP = 64  # tokens, the least difference between two plans


def check_host(plan: Plan) -> None:
    """Refuse a plan that takes more host memory than can be had now.

    Raises:
        PlanError: how much is missing, how many tokens would do with the same settings.
    """
    host = plan.memory.host
    # What the process holds already is a part of what was planned for it.
    there = free_host_bytes() + host_anonymous_bytes()
    if host.peak_bytes <= there:
        return
    pinned = f", {format_bytes(host.pinned_bytes)} of it pinned," if host.pinned_bytes else ""
    why = (
        f"the plan takes {format_bytes(host.peak_bytes)} of host memory{pinned} and {format_bytes(there)} can be had "
        f"here now, {format_bytes(host.peak_bytes - there)} less."
    )
    raise PlanError(f"{plan.total_tokens:,} tokens on {plan.gpu.name}", why, _nearest(plan, there))


def _nearest(plan: Plan, there: int) -> str:
    """What would fit: fewer tokens, and planning for what there is."""
    gib = there // GIB
    again = f"--host-ram {gib}GiB plans for what there is." if gib else "Free some."
    tokens = longest_within(plan, there)
    if tokens is None:
        return again
    return f"With the same settings {tokens:,} tokens would do: --context {tokens}. {again}"


def longest_within(plan: Plan, there: int) -> int | None:
    """Tokens of a sequence whose host memory is surely no more than this, all else equal; None: not even a few.

    What is as long as the sequence is proportional to it; the rest stays, and all of it is taken to be there at once.
    """
    terms = plan.memory.host.terms
    growing = sum(size for name, size in terms.items() if name.partition("/")[0] in BY_TOKENS)
    if not growing:
        return None
    rest = sum(terms.values()) - growing
    tokens = (there - rest) * plan.total_tokens // growing
    tokens -= tokens % _STEP
    return tokens if tokens >= max(_STEP, plan.target if plan.context else 1) else None
