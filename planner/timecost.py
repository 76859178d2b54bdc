"""Time of one step: a roofline with a lower bound and an estimate.

A phase is gone through in stages, one after the other. In a stage matrix products, attention and the memory's traffic
follow each other, and copies over the link go on beside them, either way at once. The host launches kernels beside all
of it, and so far ahead that a phase takes no less than all its launches. What nothing hides is added.
The bound takes the most that a card can do, the estimate what is expected of it (`planner.rates`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from planner.calibration import Calibration
from planner.compose import Configuration
from planner.hardware import HardwareProfile
from planner.launches import EIGHT_BIT_UPDATE
from planner.ledger import Device, Ledger, Phase, Resource, Work
from planner.rates import AT_ONCE, LAUNCH, ON_DISK, TO_DEVICE, TO_HOST, UNBOUNDED, Rates, kind_of, rates_of
from planner.symbols import Letters, greatest

# Rates that stand in where a card's are unknown: they rank configurations and are never shown.
NOMINAL: Mapping[str, float] = {
    "linear": 1e12, "attention": 1e12, "memory": 1e11, TO_HOST: 1e10, TO_DEVICE: 1e10, ON_DISK: 1e9, LAUNCH: AT_ONCE
}  # fmt: skip
TIMED = (Phase.FORWARD, Phase.ATTENTION, Phase.LOSS, Phase.BACKWARD, Phase.ATTENTION_BACKWARD)
STAGES: tuple[tuple[Phase, str], ...] = (
    (Phase.FORWARD, "project"),
    (Phase.FORWARD, ""),
    (Phase.ATTENTION, ""),
    (Phase.LOSS, ""),
    (Phase.BACKWARD, "again"),
    (Phase.BACKWARD, ""),
    (Phase.BACKWARD, "project"),
    (Phase.ATTENTION_BACKWARD, "again"),
    (Phase.ATTENTION_BACKWARD, ""),
)
"""The stages that work may name, phase by phase; most work is of the one without a name."""
BUSY, INWARD, OUTWARD, EXPOSED, AHEAD, LAUNCHED = "busy", "inward", "outward", "exposed", "ahead", "launched"
OF_STAGE, OF_PHASE = (BUSY, INWARD, OUTWARD), (EXPOSED, AHEAD, LAUNCHED)
Part = tuple[str, Phase, str]
"""What adds up to seconds of its own: which of these, of which phase, in which of its stages."""
PARTS: tuple[Part, ...] = (
    *((what, *stage) for what in OF_STAGE for stage in STAGES),
    *((what, phase, "") for what in OF_PHASE for phase in TIMED),
)
# What a choice can change of the clock itself: all else of it changes amounts of work alone.
CLOCK = frozenset({"letter E", "letter L", "setting attention", "setting dtype"})


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
    """
    layers, rates = configuration.letters["L"], rates_for(configuration, gpu, constants)
    kinds = {name: kind_of(work) for name, work in configuration.ledger.work.items()}
    used = set(kinds.values())
    likely = rates.likely if all(rates.likely[kind] for kind in used) else NOMINAL
    bounded = all(rates.most[kind] for kind in used - UNBOUNDED)
    seconds: dict[Part, Any] = dict.fromkeys(PARTS, 0.0)
    ideal: dict[tuple[Phase, str], Any] = {(phase, what): 0.0 for phase in TIMED for what in OF_STAGE}
    for work in configuration.ledger.work.values():
        if work.phase not in TIMED:
            continue
        kind, amount, part = kinds[work.name], amounts[work.name], part_of(work)
        most, rate = rates.most[kind], likely[kind]
        assert rate is not None
        seconds[part] = seconds[part] + amount / rate
        what = (work.phase, part[0])
        if most and what in ideal and kind not in UNBOUNDED:
            spared = part[0] != BUSY or (work.resource is Resource.LINEAR and work.phase is Phase.BACKWARD)
            ideal[what] = ideal[what] + amount / most * ((layers - 1) / layers if spared else 1.0)
    found = {}
    for phase in TIMED:
        expected = phase_seconds(phase, layers, seconds)
        bound = greatest(ideal[phase, BUSY], greatest(ideal[phase, INWARD], ideal[phase, OUTWARD])) if bounded else None
        found[phase] = StepTime(bound, None if likely is NOMINAL else expected, expected)
    return found


def part_of(work: Work) -> Part:
    """Which seconds a piece of work adds to."""
    if work.resource is Resource.LINK:
        return (OUTWARD if kind_of(work) == TO_HOST else INWARD, work.phase, work.stage)
    whole = {
        Resource.EXPOSED: EXPOSED,
        Resource.PREFETCH: AHEAD,
        Resource.DISK: AHEAD,
        Resource.LAUNCH: LAUNCHED,
    }.get(work.resource)
    return (BUSY, work.phase, work.stage) if whole is None else (whole, work.phase, "")


def phase_seconds(phase: Phase, layers: int, seconds: Mapping[Part, Any]) -> Any:
    """Seconds of a phase, from those of its parts; grows with each of them.

    The link is taken to wait for the disk, as for what is fetched ahead, of which one layer has nothing to hide behind.
    """
    stages: Any = seconds[EXPOSED, phase, ""]
    inward = ahead = seconds[AHEAD, phase, ""]
    for of, stage in STAGES:
        if of is phase:
            busy, there, back = (seconds[what, phase, stage] for what in OF_STAGE)
            stages, inward = stages + greatest(greatest(busy, there), back), inward + there
    return greatest(greatest(stages, inward), seconds[LAUNCHED, phase, ""]) + ahead / layers


def rates_for(configuration: Configuration, gpu: HardwareProfile, constants: Calibration) -> Rates:
    """The rates that a configuration's work goes by; of what is chosen nothing but ``CLOCK`` decides them."""
    settings = configuration.settings
    return rates_of(settings["attention"], settings["dtype"], configuration.letters["E"], gpu, constants)


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


def update_launches(ledger: Ledger, letters: Letters) -> int:
    """Kernels of one optimiser step: two for each adapted linear, one for each of its matrices.

    Approximate: clipping and the step itself take many matrices at once, and only setting to zero goes one by one.
    With moments in eight bits each takes as long as several. What optimisations do to gradients before is added.
    """
    more = sum(int(work.amount(letters)) for work in ledger.work.values() if work.phase is Phase.OPTIMIZER)
    return more + 2 * int(letters.I * letters.L) * (EIGHT_BIT_UPDATE if "optimizer/scales" in ledger.terms else 1)


def update_seconds(size: int, launched: int, gpu: HardwareProfile, constants: Calibration) -> float | None:
    """Expected time of one optimiser step; None where the rate of the device's memory is unknown.

    Args:
        size: bytes that it moves through that memory, `update_bytes`; ``launched``: kernels, `update_launches`.
    """
    # Kernel, dtype and head size have no part in this.
    likely = rates_of("eager", "fp32", 1, gpu, constants).likely
    rate, launch = likely["memory"], likely[LAUNCH]
    return max(size / rate, launched / launch) if rate and launch else None
