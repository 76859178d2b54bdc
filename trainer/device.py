"""The device of a plan: is it here, and how much of it may be used."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

from planner.errors import PlanError
from planner.plan import Plan
from trainer.allocator import rounded_up

_REHEARSING = ContextVar("rehearsing", default=False)


@contextmanager
def rehearsing() -> Iterator[None]:
    """Meanwhile any card with enough memory stands in for the one that a plan names, held to the plan's budget."""
    before = _REHEARSING.set(True)
    try:
        yield
    finally:
        _REHEARSING.reset(before)


def take_device(plan: Plan) -> torch.device:
    """The device that was planned for, held to the planned budget.

    Raises:
        PlanError: this machine has no such card, or less of its memory.
    """
    if plan.gpu.kind == "cpu":
        return torch.device("cpu")
    asked = f"GPU {plan.gpu.name}"
    if not torch.cuda.is_available():
        why = "the plan needs it, and PyTorch sees no GPU here."
        raise PlanError(asked, why, "`plan --gpu local` plans for the card that is there, `plan --gpu cpu` for none.")
    here = torch.cuda.get_device_properties(0)
    other = " ".join(here.name.lower().split()) != " ".join(plan.gpu.name.lower().split())
    if other and not _REHEARSING.get():
        raise PlanError(asked, f"this machine has a {here.name}.", "`plan --gpu local` plans for that.")
    needed = plan.memory.gpu.peak_bytes.high + plan.gpu.context_bytes
    if here.total_memory < needed:
        why = f"the plan needs {needed:,} bytes of it, and this {here.name} shows {here.total_memory:,}."
        here_too = "`plan --gpu local` plans for what it shows."
        raise PlanError(asked, why, "Only a card with more memory can stand in." if other else here_too)
    hold(torch.device("cuda", 0), plan.memory.gpu.budget_bytes)
    return torch.device("cuda", 0)


def hold(device: torch.device, limit: int) -> None:
    """Let the allocator have no more of a card than so many bytes from here on.

    Beyond them a run fails at once; it never spills into memory that is not the card's own. Held to less than it has,
    the allocator gives pages back that it holds unused before it asks for more.
    """
    if device.type == "cuda":
        whole = torch.cuda.get_device_properties(device).total_memory
        allowed = max(0, limit - rounded_up(allocator_settings()))
        torch.cuda.set_per_process_memory_fraction(min(1.0, allowed / whole), device)


def allocator_settings() -> str:
    """What the environment sets of the allocator."""
    return os.environ.get("PYTORCH_ALLOC_CONF") or os.environ.get("PYTORCH_CUDA_ALLOC_CONF") or ""
