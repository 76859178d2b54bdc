"""What is said of a run that got no more memory, and whose bytes the driver's are."""

from __future__ import annotations

import os
import sys
from types import SimpleNamespace

import pytest
import torch

from planner.planning import Request, make_plan
from planner.units import GIB, MIB, format_bytes
from trainer.measure import driver_reader
from trainer.out_of_memory import explained, is_out_of_memory

PLAN = make_plan(Request("rtx2060s", "random:llama-3.2-1b", total_tokens=1024, excluded=("streamed",)))
TOLD = "CUDA out of memory. Tried to allocate 126.00 MiB. GPU 0 has a total capacity of 139.80 GiB of which"


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """What the allocator says it holds, as if there were one."""
    held = SimpleNamespace(allocated=0, reserved=0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: held.allocated)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: held.reserved)
    return held


def test_memory_that_lay_unused_is_told_from_tensors_that_took_more(card: SimpleNamespace) -> None:
    planned = sum(PLAN.memory.gpu.phases["backward"].values())
    card.allocated, card.reserved = planned - 200 * MIB, planned + 30 * MIB
    told = explained(torch.OutOfMemoryError(TOLD), PLAN, "backward")
    assert "126.00 MiB more were asked for in the phase backward" in told and "230.00 MiB lay unused" in told
    assert f"The plan has {format_bytes(planned)} for that" in told and told.endswith("could not be used.")
    largest = max(PLAN.memory.gpu.phases["backward"].items(), key=lambda each: each[1])
    assert f"{largest[0]} {format_bytes(largest[1])}" in told and "total capacity" not in told
    card.allocated = planned - 100 * MIB
    assert explained(torch.OutOfMemoryError(TOLD), PLAN, "backward").endswith("took more than was planned.")


def test_what_is_not_known_is_not_told(card: SimpleNamespace) -> None:
    card.allocated = card.reserved = GIB
    told = explained(torch.OutOfMemoryError(TOLD), PLAN, "between")
    assert "in no phase of a step" in told and "The plan has" not in told
    other = RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 5 bytes.")
    assert is_out_of_memory(other) and explained(other, PLAN, "load").endswith(str(other))
    assert not is_out_of_memory(RuntimeError("expected scalar type Half"))


class _Driver:
    """The part of pynvml that is asked."""

    NVMLError = RuntimeError

    def __init__(self, *pids: int) -> None:
        self.pids = pids

    def nvmlInit(self) -> None:
        """Nothing to begin."""

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        """The name itself."""
        return uuid

    def nvmlDeviceGetComputeRunningProcesses(self, _: str) -> list[SimpleNamespace]:
        """Each holds its own number of bytes."""
        return [SimpleNamespace(pid=pid, usedGpuMemory=1000 + pid) for pid in self.pids]


@pytest.mark.parametrize(
    ("pids", "found"),
    [
        ((os.getpid(), 1), 1000 + os.getpid()),
        ((2**22 + 7,), 1000 + 2**22 + 7),  # a number that nobody has here: as seen from outside of a container
        ((1,), None),  # another process of this machine, before ours has begun to use the card
        ((2**22 + 7, 2**22 + 8), None),
    ],
)
def test_the_drivers_bytes_are_never_another_process_s(
    monkeypatch: pytest.MonkeyPatch, pids: tuple[int, ...], found: int | None
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", _Driver(*pids))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(uuid="x"))
    assert driver_reader(torch.device("cuda", 0))() == found
