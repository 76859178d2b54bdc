"""Which attention kernel is the fastest on the card that is there, measured before a run begins.

A plan chooses by what is known of a kind of card. Which kernel wins depends on the card, its clocks, versions of
libraries and the size of a head, and some calls of each show it. Another kernel takes other memory, so where another is
clearly faster the plan is made anew with it, and taken only where it fits.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from planner.cli_check import card_of, same_settings
from planner.errors import PlanError
from planner.model import load_model
from planner.plan import Plan
from planner.plan_facts import RANDOM
from planner.planning import make_plan
from trainer.kernel_cache import on_this_card, place, remember, remembered
from trainer.streamed.kernels import KERNELS

TOKENS = 8192  # long enough to fill a card, and some milliseconds for the slowest kernel
REPEATS = 3
CLEARLY = 0.95  # of the planned kernel's time; less than that is no noise
OWNERS = ("streamed", "exact_attention")


def planned_kernel(plan: Plan) -> tuple[str, str] | None:
    """Which optimisation has a kernel, and which; None where none has one of several, or where a user asked for it."""
    for owner in OWNERS:
        kernel = plan.knobs(owner).get("kernel")
        if kernel in KERNELS and kernel != "cpu":
            pinned = f"{owner}.kernel=" in plan.provenance.command
            return None if pinned else (owner, str(kernel))
    return None


@dataclass(frozen=True)
class Timed:
    """What kernels are timed by: a group of a plan's heads, at no more than ``TOKENS`` tokens."""

    heads: int
    key_heads: int
    head_size: int
    tokens: int
    dtype: str

    @staticmethod
    def of(plan: Plan) -> Timed:
        """Those of a plan."""
        shape = load_model(plan.model.source.removeprefix(RANDOM))
        heads = min(shape.heads, int(plan.knobs("streamed").get("heads") or 8))
        key_heads = max(1, heads * shape.kv_heads // shape.heads)
        dtype = str(plan.knobs("mixed_precision").get("dtype", "float32"))
        return Timed(heads, key_heads, shape.head_size, min(TOKENS, plan.total_tokens), dtype)

    def __str__(self) -> str:
        heads = f"{self.heads} heads of {self.head_size} on {self.key_heads}"
        return f"{heads}, {self.tokens} tokens, {self.dtype}"


def kernel_seconds(timed: Timed, device: torch.device) -> dict[str, float]:
    """Seconds forward and back by kernel; of those that take such heads here.

    Raises:
        torch.OutOfMemoryError: the card has no room for that.
    """
    dtype = getattr(torch, timed.dtype)

    def some(count: int) -> Tensor:
        return torch.randn(1, count, timed.tokens, timed.head_size, dtype=dtype, device=device)

    query, key, value, gradient = some(timed.heads), some(timed.key_heads), some(timed.key_heads), some(timed.heads)
    found = {}
    for name in (each for each in KERNELS if each != "cpu"):
        try:
            found[name] = _seconds(name, query, key, value, gradient, device)
        except torch.OutOfMemoryError:  # somebody else has the card; that says nothing about the kernel
            raise
        except RuntimeError:  # it does not know this card, this dtype or this size of a head
            continue
    return found


def _seconds(name: str, query: Tensor, key: Tensor, value: Tensor, gradient: Tensor, device: torch.device) -> float:
    kernel, scale, best = KERNELS[name], query.shape[-1] ** -0.5, float("inf")
    for _ in range(REPEATS + 1):  # the first time it is found and loaded
        torch.cuda.synchronize(device)
        began = time.perf_counter()
        output, sums = kernel.forward(query, key, value, True, scale)
        kernel.backward(gradient, query, key, value, output, sums, True, scale)
        torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - began)
    return best


def with_fastest_kernel(plan: Plan, seconds: Mapping[str, float], when: str = "here") -> tuple[Plan, str]:
    """The plan with the fastest kernel that it fits with, and a sentence about it.

    Args:
        seconds: of each kernel, as measured on the card; ``when``: now or before.
    """
    chosen = planned_kernel(plan)
    assert chosen is not None
    owner, kernel = chosen
    order = sorted(seconds, key=lambda name: seconds[name])
    told = ", ".join(f"{name} {1000 * seconds[name]:.2f} ms" for name in order)
    told += "" if kernel in seconds else f"; {kernel} does not run"
    for name in order:
        if kernel in seconds and seconds[name] > CLEARLY * seconds[kernel]:
            break
        if name != kernel and (other := _planned_with(plan, owner, name)) is not None:
            return (
                other,
                f"Attention, measured {when}: {told}. Planned anew with {name} instead of {kernel}, which fits.",
            )
    return plan, f"Attention, measured {when}: {told}. It goes by {kernel}, as planned."


def _planned_with(plan: Plan, owner: str, kernel: str) -> Plan | None:
    """The same settings with another kernel, if they fit with it."""
    try:
        request = same_settings(plan, card_of(plan))
        knobs = {**request.knobs, owner: {**request.knobs.get(owner, {}), "kernel": kernel}}
        command = f"{plan.provenance.command} --set {owner}.kernel={kernel}"
        made = make_plan(replace(request, knobs=knobs, command=command))
    except PlanError:  # this model or this card has not that kernel
        return None
    if made.verdict != "fits":
        return None
    return made.model_copy(update={"train": plan.train})


def choose_kernel(plan: Plan, device: torch.device) -> tuple[Plan, str]:
    """Measure the kernels and take the fastest that fits; a plan that has nothing to choose stays as it is.

    What was measured on this card before, for heads like these, is not measured again.

    Gives the plan to run, and a sentence about the choice; empty where there was none.
    """
    if device.type != "cuda" or planned_kernel(plan) is None:
        return plan, ""
    timed = Timed.of(plan)
    entry = on_this_card(device, str(timed))
    _, planned = planned_kernel(plan) or ("", "")
    before = remembered(entry)
    if before is not None and {planned} <= {*before} <= {*KERNELS}:
        return with_fastest_kernel(plan, before, f"here before ({place()})")
    try:
        seconds = kernel_seconds(timed, device)
    except torch.OutOfMemoryError:
        return plan, "Attention was not measured: the card has no room for it at the moment."
    torch.cuda.empty_cache()
    if len(seconds) > 1 and planned in seconds:  # why one did not run may be of the moment
        remember(entry, seconds)
    return with_fastest_kernel(plan, seconds) if len(seconds) > 1 else (plan, "")
