"""What is said of a run that got no more memory, and whose bytes the driver's are."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from planner.planning import Request, make_plan
from planner.units import GIB, MIB, format_bytes
from trainer.measure import driver_reader
from trainer.out_of_memory import explained, is_out_of_memory

PLAN = make_plan(Request("rtx2060s", "random:llama-3.2-1b", total_tokens=1024, excluded=("streamed",)))
RECORDS = Path(__file__).resolve().parents[1] / "reports" / "validation" / "grid-first"


def _error(held: int, unused: int, asked: int) -> torch.OutOfMemoryError:
    """As torch words it, in the record of a run that failed."""
    whole = (RECORDS / "h200-8gib-phi-3.5-mini-1024-small.failed.txt").read_text(encoding="utf-8")
    text = whole[whole.index("CUDA out of memory") :]
    for was, now in (("126.00 MiB", asked), ("2.42 GiB is allocated", held), ("221.60 MiB is reserved", unused)):
        rest = was.partition("B")[2]
        assert was in text
        text = text.replace(was, f"{now / MIB:.2f} MiB{rest}" if rest else f"{now / MIB:.2f} MiB")
    return torch.OutOfMemoryError(text)


def test_memory_that_lay_unused_is_told_from_tensors_that_took_more() -> None:
    planned = sum(PLAN.memory.gpu.phases["backward"].values())
    told = explained(_error(planned - 200 * MIB, 230 * MIB, 126 * MIB), PLAN, "backward")
    assert "126.00 MiB more were asked for in the phase backward" in told and "230.00 MiB lay unused" in told
    assert f"The plan has {format_bytes(planned)} for that" in told
    assert told.endswith("took no more than was planned; what lay between them could not be used.")
    largest = max(PLAN.memory.gpu.phases["backward"].items(), key=lambda each: each[1])
    assert f"{largest[0]} {format_bytes(largest[1])}" in told and "total capacity" not in told
    a_little = explained(_error(planned - 100 * MIB, 230 * MIB, 126 * MIB), PLAN, "backward")
    assert "26.00 MiB more than was planned, and what lay between them could not be used." in a_little
    far = explained(_error(planned + 900 * MIB, 0, 100 * MIB), PLAN, "backward")
    assert "more than was planned, and that is more than the bound leaves." in far


def test_what_is_not_known_is_not_told() -> None:
    told = explained(_error(GIB, MIB, MIB), PLAN, "between")
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
    ids=("ours", "outside", "another", "two"),
)
def test_the_drivers_bytes_are_not_those_of_another_process_of_this_machine(
    monkeypatch: pytest.MonkeyPatch, pids: tuple[int, ...], found: int | None
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", _Driver(*pids))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(uuid="x"))
    assert driver_reader(torch.device("cuda", 0))() == found
