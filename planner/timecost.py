"""Time of one step: a roofline with a lower bound and an estimate.

Matrix products and attention share the matrix units, so their times add; copies over the link run beside them, and so
do those to and from the disk, for which the link is taken to wait.
The bound takes the most that a card can do, the estimate what is expected of it (`planner.rates`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from planner.calibration import Calibration
from planner.compose import Configuration
from planner.hardware import HardwareProfile
from planner.ledger import Device, Ledger, Phase, Resource
from planner.rates import ON_DISK, TO_DEVICE, TO_HOST, Rates, kind_of, rates_of
from planner.symbols import Letters, greatest

# Rates that stand in where a card's are unknown: they rank configurations and are never shown.
NOMINAL: Mapping[str, float] = {
    "linear": 1e12, "attention": 1e12, "memory": 1e11, TO_HOST: 1e10, TO_DEVICE: 1e10, ON_DISK: 1e9
}  # fmt: skip
TIMED = (Phase.FORWARD, Phase.ATTENTION, Phase.LOSS, Phase.BACKWARD, Phase.ATTENTION_BACKWARD)
# What a choice can change of the clock itself: all else of it changes amounts of work alone.
CLOCK = frozenset({"letter E", "letter L", "letter p", "setting attention", "setting dtype"})


@dataclass(frozen=True)
class StepTime:
    """Seconds of one micro-batch; numbers or numpy arrays.

    Attributes:
        bound: no step can be faster; None where the card's peak rates are unknown.
        estimate: what is expected; None where it is unknown what the card reaches.
        rank: what configurations are ranked by: the estimate, or the same sum at nominal rates.
    """

    bound: Any
    estimate: Any
    rank: Any

    def times(self, count: int) -> StepTime:
        """The time of so many, one after the other."""
        bound = None if self.bound is None else self.bound * count
        return StepTime(bound, None if self.estimate is None else self.estimate * count, self.rank * count)


def step_time(
    configuration: Configuration, amounts: Mapping[str, Any], gpu: HardwareProfile, constants: Calibration
) -> StepTime:
    """Time of one forward and backward pass, given the amount of every piece of work; see `update_seconds`."""
    phases = phase_times(configuration, amounts, gpu, constants).values()
    bound = None if any(each.bound is None for each in phases) else sum(each.bound for each in phases)
    estimate = None if any(each.estimate is None for each in phases) else sum(each.estimate for each in phases)
    return StepTime(bound, estimate, sum(each.rank for each in phases))


def phase_times(
    configuration: Configuration, amounts: Mapping[str, Any], gpu: HardwareProfile, constants: Calibration
) -> dict[Phase, StepTime]:
    """Time of each phase of one forward and backward pass.

    The bound leaves out what caches may serve (all traffic to the device's own memory and the disk), and one layer of L
    where it could be saved: the last layer's input need not cross the link, and the first layer's needs no gradient.

    What is fetched ahead of a whole pass is in the estimate of one phase, though another of that pass may hide it.
    Approximate: the estimate is too high by as much, and the bound leaves it out.

    Short sequences leave a card waiting: the host cannot launch a layer's kernels faster than it does, so no estimate
    of a card is below that. Approximate: the same time for every layer, host and card.
    """
    layers, rates = configuration.letters["L"], rates_for(configuration, gpu, constants)
    kinds = {name: kind_of(work) for name, work in configuration.ledger.work.items()}
    used = set(kinds.values())
    likely = rates.likely if all(rates.likely[kind] for kind in used) else NOMINAL
    bounded = all(rates.most[kind] for kind in used if kind not in ("memory", ON_DISK))
    waits = launches(configuration, gpu, constants, known=likely is not NOMINAL)
    found = {}
    for phase in TIMED:
        ideal: Any = 0.0
        busy: Any = 0.0
        ideal_link: Any = 0.0
        busy_link: Any = 0.0
        for work in configuration.ledger.work.values():
            if work.phase is not phase:
                continue
            kind, amount = kinds[work.name], amounts[work.name]
            most, rate = rates.most[kind], likely[kind]
            assert rate is not None
            if work.resource in (Resource.PREFETCH, Resource.DISK):
                busy_link = busy_link + amount / rate
            elif work.resource is Resource.LINK:
                busy_link = busy_link + amount / rate
                ideal_link = ideal_link + (amount / most * (layers - 1) / layers if most else 0.0)
            else:
                busy = busy + amount / rate
                if most and work.resource is not Resource.MEMORY:
                    spared = work.resource is Resource.LINEAR and phase is Phase.BACKWARD
                    ideal = ideal + amount / most * ((layers - 1) / layers if spared else 1.0)
        expected = overlapped(busy, busy_link, layers, waits[phase])
        bound = greatest(ideal, ideal_link) if bounded else None
        found[phase] = StepTime(bound, None if likely is NOMINAL else expected, expected)
    return found


def rates_for(configuration: Configuration, gpu: HardwareProfile, constants: Calibration) -> Rates:
    """The rates that a configuration's work goes by; of what is chosen nothing but ``CLOCK`` decides them."""
    settings = configuration.settings
    return rates_of(settings["attention"], settings["dtype"], configuration.letters["E"], gpu, constants)


def launches(
    configuration: Configuration, gpu: HardwareProfile, constants: Calibration, *, known: bool
) -> dict[Phase, float]:
    """Seconds that the host takes to launch the kernels of each phase; none where rates are not known."""
    once = configuration.letters["L"] * constants.launch_seconds() if gpu.kind == "gpu" and known else 0.0
    passes = {Phase.FORWARD: 1, Phase.BACKWARD: 1 + configuration.letters["p"]}
    return {phase: once * passes.get(phase, 0) for phase in TIMED}


def overlapped(busy: Any, link: Any, layers: int, least: Any) -> Any:
    """Seconds of a phase that computes for so long and copies over the link for so long; grows with each of them."""
    # One layer's copy has nothing to hide behind: the last out, the first back.
    return greatest(greatest(busy, link) + link / layers, least)


def update_bytes(ledger: Ledger, letters: Letters) -> int:
    """Bytes through the card's memory in one optimiser step, `trainer.step.update`.

    Adapters and optimiser state are read and written. Gradients are read for their norm, scaled in place, read for
    the step, and set to zero. Averages are read and written, and what they are averages of is read once more.
    """
    passes = {"adapters": 2, "optimizer": 2, "gradients": 5, "averages": 3}
    return sum(
        passes[group] * int(term.bytes(letters))
        for name, term in ledger.terms.items()
        if (group := name.partition("/")[0]) in passes and term.device is Device.GPU and Phase.OPTIMIZER in term.phases
    )


def update_seconds(size: int, gpu: HardwareProfile, constants: Calibration) -> float | None:
    """Expected time of moving so many bytes through the device's memory; None where its rate is unknown."""
    # Kernel, dtype and head size have no part in this.
    rate = rates_of("eager", "fp32", 1, gpu, constants).likely["memory"]
    return size / rate if rate else None
