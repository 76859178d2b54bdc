"""What a run really took: peaks by phase on the device, the host's peak, and exact bytes of what stays.

On a card the allocator is asked, phase by phase, through the whole run, and the driver besides. On the CPU
the bytes of live tensors are counted, op by op, while the probe step runs.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Self

import psutil
import torch
from torch import Tensor

from trainer.built import BuiltRun
from trainer.counting import TensorBytes
from trainer.four_bit import constants_of
from trainer.host_memory import pinned_now
from trainer.phase_clock import PhaseClock
from trainer.rotary import frequencies_beside_buffers

BETWEEN = "between"
"""Whatever happens outside the phases that have names."""

_EVERY_SECONDS = 0.05


class Recorder:
    """Books peaks under the phase that ``mark`` named last, and samples host and driver from a thread.

    Use it as a context manager around a run.

    Attributes:
        phases: by phase, ``allocated_bytes`` and, on a card, ``reserved_bytes``.
        host_anonymous: peak of the process's anonymous memory, pinned buffers taken off.
        phase: the one that was named last, when all is over, too.
        driver: peak of what the driver says the process holds of the card; None where it does not say.
        clock: hears of the phases, too, and times those of whole steps.
        before: what was held of the card, and how many steps were done, when the run was held to less; see ``held``.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._phase = self.phase = BETWEEN
        self._counter: TensorBytes | None = None
        self._stop, self._lock = threading.Event(), threading.Lock()
        self._driver = driver_reader(device) if self._cuda else None
        self._thread = threading.Thread(target=self._sample_until_stopped, daemon=True)
        self.phases: dict[str, dict[str, int]] = {}
        self.pinned_bytes = 0
        self.host_anonymous = 0
        self.driver: int | None = None
        self.clock = PhaseClock(device)
        self.before: dict[str, int | None] | None = None

    def __enter__(self) -> Self:
        if self._cuda:
            torch.cuda.reset_peak_memory_stats()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._close_phase()
        self._stop.set()
        self._thread.join()

    def mark(self, phase: str) -> None:
        """A phase begins, and the one before it ends."""
        self._close_phase()
        self._phase = self.phase = phase
        self.clock.mark(phase)
        if self._counter is not None:
            self._counter.mark(phase)

    @contextmanager
    def counting(self, resident: Iterable[Tensor]) -> Iterator[None]:
        """Count live tensors meanwhile, where there is no allocator to ask; ``resident`` exist already."""
        if self._cuda:
            yield
            return
        with TensorBytes(resident) as self._counter:
            yield
        for phase, size in self._counter.peaks.items():
            if phase not in ("start", BETWEEN):
                self._book(phase, allocated_bytes=size)
        self._counter = None

    def peak(self, what: str) -> int | None:
        """The largest ``allocated_bytes`` or ``reserved_bytes`` of all phases; None if it is not known."""
        return max((peaks[what] for peaks in self.phases.values() if what in peaks), default=None)

    def held(self, steps: int) -> None:
        """The run has less of the card from here on: what was held so far is told apart, and counts no longer.

        What tensors took stays with what comes: it is no matter of how much there is.

        Args:
            steps: that are done.
        """
        self.mark(BETWEEN)
        retries = torch.cuda.memory_stats()["num_alloc_retries"] if self._cuda else None
        with self._lock:
            self.before = {
                "steps": steps,
                "reserved_bytes": self.peak("reserved_bytes"),
                "driver_bytes": self.driver,
                "retries": retries,
            }
            self.driver = None
        for sizes in self.phases.values():
            sizes.pop("reserved_bytes", None)

    def found(self) -> dict[str, Any]:
        """All peaks and times so far, to be stored."""
        return {
            "phases": self.phases,
            "host_anonymous": self.host_anonymous,
            "driver": self.driver,
            "seconds": self.clock.steps,
        }

    def times(self) -> dict[str, Any]:
        """The times alone: peaks of another plan are none of the one that goes on."""
        return {"phases": {}, "host_anonymous": 0, "driver": None, "seconds": self.clock.steps}

    def add(self, found: Mapping[str, Any]) -> None:
        """Peaks and times of an earlier part of the same run, as `found` gave them."""
        for phase, sizes in found["phases"].items():
            self._book(phase, **sizes)
        self.host_anonymous = max(self.host_anonymous, found["host_anonymous"])
        self.clock.steps += found["seconds"]
        if found["driver"] is not None:
            self.driver = max(self.driver or 0, found["driver"])

    def _close_phase(self) -> None:
        if self._cuda:
            allocated, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
            self._book(self._phase, allocated_bytes=allocated, reserved_bytes=reserved)
            torch.cuda.reset_peak_memory_stats()
        self._phase = BETWEEN

    def _book(self, phase: str, **sizes: int) -> None:
        booked = self.phases.setdefault(phase, {})
        for what, size in sizes.items():
            booked[what] = max(size, booked.get(what, 0))

    def _sample_until_stopped(self) -> None:
        while True:
            self.host_anonymous = max(self.host_anonymous, host_anonymous_bytes() - pinned_now())
            before = self.before
            held = self._driver() if self._driver else None
            with self._lock:  # what was read before the run had less does not count after it
                if held is not None and self.before is before:
                    self.driver = max(held, self.driver or 0)
            if self._stop.wait(_EVERY_SECONDS):
                return


def host_anonymous_bytes() -> int:
    """Anonymous memory of this process that is resident (``RssAnon``); 0 where the system does not tell."""
    try:
        with open("/proc/self/status", encoding="ascii") as status:
            for line in status:
                if line.startswith("RssAnon:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        return 0  # another system than Linux: the record then says 0, never a number of another meaning
    return 0


def driver_reader(device: torch.device) -> Any:
    """A function that gives the driver's bytes of this process, or None; None itself without pynvml."""
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
    except (pynvml.NVMLError, AttributeError):
        return None

    def read() -> int | None:
        try:
            processes = pynvml.nvmlDeviceGetComputeRunningProcesses(handle)
        except pynvml.NVMLError:
            return None
        own = [process for process in processes if process.pid == os.getpid()]
        if not own and len(processes) == 1 and not psutil.pid_exists(processes[0].pid):
            own = processes  # inside a container the driver knows the process by another number, which nobody has here
        return own[0].usedGpuMemory if own else None

    return read


def resident_tensors(built: BuiltRun) -> list[Tensor]:
    """Every tensor that stays from step to step: weights, their constants, gradients, optimiser state."""
    parts = _parts(built)
    return [tensor for tensors in parts.values() for tensor in tensors]


def exact_terms(built: BuiltRun) -> dict[str, int]:
    """Bytes of weights, adapters, gradients and optimiser state, each storage counted once."""
    return {group: _bytes_of(tensors) for group, tensors in _parts(built).items()}


def _parts(built: BuiltRun) -> Mapping[str, list[Tensor]]:
    trained = built.trained
    frozen = [parameter for parameter in built.model.parameters() if not parameter.requires_grad]
    constants = [getattr(*place) for parameter in frozen for place in constants_of(parameter)]
    state = [
        value
        for of_parameter in built.optimizer.state.values()
        for value in of_parameter.values()
        if isinstance(value, Tensor)
    ]
    return {
        "weights": [*frozen, *constants, *built.model.buffers(), *frequencies_beside_buffers(built.model)],
        "adapters": list(trained),
        "averages": built.averages.tensors if built.averages is not None and not built.averages.elsewhere else [],
        "gradients": [parameter.grad for parameter in trained if parameter.grad is not None],
        "optimizer": state,
    }


def _bytes_of(tensors: Iterable[Tensor]) -> int:
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())
