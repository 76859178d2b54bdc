"""The memory of a plan: peaks, and every term by phase, on the card, in the host and on disk."""

from __future__ import annotations

from planner.evaluate import Limits
from planner.ledger import PASSES, Device, Phase
from planner.plan import DiskMemory, GpuMemory, HostMemory, Memory, Peak
from planner.solver import Search


def memory_of(found: Search, limits: Limits) -> Memory:
    """What the best configuration takes, beside what there is."""
    return Memory(gpu=_gpu_memory(found, limits), host=_host_memory(found, limits), disk=_disk_memory(found, limits))


def _gpu_memory(found: Search, limits: Limits) -> GpuMemory:
    best, index = found.best, found.index
    by_phase = found.phases((Device.GPU,))
    totals = {phase: sum(terms.values()) for phase, terms in by_phase.items()}
    return GpuMemory(
        budget_bytes=limits.gpu_bytes,
        peak_bytes=Peak(low=int(best.low[index]), expected=int(best.expected[index]), high=int(best.high[index])),
        peak_phase=max(totals, key=lambda phase: totals[phase]).value,
        phases={phase.value: terms for phase, terms in by_phase.items() if terms and _happens(phase, found)},
    )


def _happens(phase: Phase, found: Search) -> bool:
    """Whether a run has the phase: merging has to be asked for, and attention is one where layers run in passes."""
    if phase in PASSES:
        return found.best.configuration.settings["executor"] == "streamed"
    return phase is not Phase.MERGE or found.situation.merge


def _disk_memory(found: Search, limits: Limits) -> DiskMemory:
    by_phase = found.phases((Device.DISK,))
    largest = {name: size for terms in by_phase.values() for name, size in terms.items()}
    return DiskMemory(
        budget_bytes=limits.disk_bytes,
        training_bytes=int(found.best.disk[found.index]),
        peak_bytes=max(sum(terms.values()) for terms in by_phase.values()),
        terms=largest,
    )


def _host_memory(found: Search, limits: Limits) -> HostMemory:
    largest: dict[str, int] = {}
    for terms in found.phases((Device.HOST, Device.PINNED)).values():
        for name, size in terms.items():
            largest[name] = max(size, largest.get(name, 0))
    kind, executor = found.situation.gpu.kind, str(found.best.configuration.settings["executor"])
    bound, peak = found.constants.host_process_bytes(kind), int(found.best.host[found.index])
    largest["runtime/process"] = bound
    return HostMemory(
        budget_bytes=limits.host_bytes,
        peak_bytes=peak,
        expected_bytes=peak - bound + found.constants.host_process_expected(kind, executor),
        pinned_bytes=int(found.best.pinned[found.index]),
        terms=largest,
    )
