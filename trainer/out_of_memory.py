"""What is said of a run that got no more memory: in which phase, what tensors held, and what the plan has for it."""

from __future__ import annotations

import re

import torch

from planner.plan import Plan
from planner.units import format_bytes

_ASKED = re.compile(r"Tried to allocate ([\d.]+) ([KMG]iB|bytes)")
_LAY = re.compile(
    r"Of the allocated memory ([\d.]+) ([KMG]iB|bytes) is allocated by PyTorch, "
    r"and ([\d.]+) ([KMG]iB|bytes) is reserved"
)
_UNITS = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
_LIBRARIES = ("CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")
_TOLD = ("can't allocate memory", "CUDA error: out of memory", *_LIBRARIES)
"""What the CPU's allocator says, and libraries that take of a card for themselves."""
MOST_TERMS = 3


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether an error says that memory ran out, on a card or in the host."""
    return isinstance(error, torch.OutOfMemoryError) or any(told in str(error) for told in _TOLD)


def asked_bytes(error: RuntimeError) -> int:
    """What was asked for and not given, as torch tells it of a card; 0 where it does not."""
    found = _ASKED.search(str(error))
    return _size(found, 1) if found else 0


def explained(error: RuntimeError, plan: Plan, phase: str, allowed: int | None = None) -> str:
    """Why a plan's run had too little memory, in some sentences; ``phase`` is the one that it was in.

    ``allowed``: bytes that the allocator was held to, where these were not the plan's budget.

    Torch tells what was asked for on a card, what tensors held and what lay unused between them, at that moment: the
    one is what formulas predict, the other is in the bound alone. Once the error is caught, tensors are gone already.
    """
    peak, whole = plan.memory.gpu.peak_bytes, str(error)
    bound = f"ran out of memory, though the plan's bound is {format_bytes(peak.high)}"
    asked, lay = _ASKED.search(whole), _LAY.search(whole)
    if asked is None or lay is None:
        return f"{bound}: {whole.splitlines()[0]}"
    more, held, unused = _size(asked, 1), _size(lay, 1), _size(lay, 3)
    told = (
        f"{bound}: {format_bytes(more)} more were asked for in {_named(phase)}, while tensors held "
        f"{format_bytes(held)} and {format_bytes(unused)} lay unused between them, of "
        f"{format_bytes(allowed or plan.memory.gpu.budget_bytes)} allowed."
    )
    terms = plan.memory.gpu.phases.get(phase)
    if not terms:
        return told
    planned = sum(terms.values())
    largest = sorted(terms.items(), key=lambda each: -each[1])[:MOST_TERMS]
    listed = ", ".join(f"{name} {format_bytes(size)}" for name, size in largest)
    told += f" The plan has {format_bytes(planned)} for that, the largest of it {listed}."
    if held + more <= planned:
        return f"{told} So tensors took no more than was planned; what lay between them could not be used."
    over = format_bytes(held + more - planned)
    if planned + (peak.high - peak.expected) < held + more:
        return f"{told} So tensors took {over} more than was planned, and that is more than the bound leaves."
    return f"{told} So tensors took {over} more than was planned, and what lay between them could not be used."


def _size(found: re.Match[str], place: int) -> int:
    return int(float(found[place]) * _UNITS[found[place + 1]])


def _named(phase: str) -> str:
    return f"the phase {phase}" if phase != "between" else "no phase of a step"
