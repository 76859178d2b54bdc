"""The section on time of a plan: the chosen configuration's step by phase, and the rates it goes by."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from planner.calibration import Calibration
from planner.compose import Configuration
from planner.errors import PlanError
from planner.evaluate import Outcome
from planner.hardware import HardwareProfile
from planner.ledger import PASSES, Phase, Resource
from planner.plan import PhaseWork, Rate, Seconds, Time, Train
from planner.rates import KINDS, LAUNCH, ON_DISK, TO_DEVICE, TO_HOST, kind_of, rates_of
from planner.solver import Search
from planner.symbols import Letters
from planner.timecost import TIMED, phase_times, step_time, update_bytes, update_launches, update_seconds
from planner.units import format_rate

BASIS = "bound: peak rates of the card; estimate: shares of them from planner/calibration.yaml"
BASIS_MEASURED = "bound: peak rates of the card; estimate: rates measured on it by `plan measure`"
BASIS_UNBOUNDED = "estimate: rates measured on this machine by `plan measure`; peak rates are unknown, so no bound"
UNITS = {"linear": "FLOP/s", "attention": "FLOP/s", LAUNCH: "kernels/s"}
UNKNOWN = "the card's rates are unknown, so no time is given; `plan measure` finds those of the machine at hand"


@dataclass(frozen=True)
class StepClock:
    """Times steps of the configuration that a search chose, at any length.

    Attributes:
        accumulation: micro-batches in one optimiser step.
    """

    found: Search
    accumulation: int

    @property
    def configuration(self) -> Configuration:
        """What was chosen."""
        return self.found.best.configuration

    def letters(self, batch: Any, total: Any, target: Any) -> Letters:
        """All letters at the chosen rank; numbers, or arrays of them."""
        rank = self.found.wanted[self.found.index].rank
        return self.configuration.at(batch=batch, total=total, target=target, workspace=0, rank=rank)

    def amounts(self, letters: Letters) -> dict[str, Any]:
        """FLOPs or bytes of every piece of work of a micro-batch."""
        return {work.name: work.amount(letters) for work in self.configuration.ledger.work.values()}

    def micro_batches(self, batch: Any, total: Any, target: Any, *, attended: Any = 1.0) -> Any:
        """Expected seconds of micro-batches of these sizes; None where they are unknown.

        Args:
            attended: share of the pairs of a row's tokens that an exact kernel attends to, where documents share rows.
        """
        amounts = self.amounts(self.letters(batch, total, target))
        if not self.configuration.letters["e"]:
            for name, work in self.configuration.ledger.work.items():
                if work.resource is Resource.ATTENTION:
                    amounts[name] = amounts[name] * attended
        return step_time(self.configuration, amounts, self.found.situation.gpu, self.found.constants).estimate

    def update(self) -> float | None:
        """Expected seconds of the optimiser's own work; None where they are unknown."""
        letters = self.letters(1, 1, 1)
        size, launched = (of(self.configuration.ledger, letters) for of in (update_bytes, update_launches))
        return update_seconds(size, launched, self.found.situation.gpu, self.found.constants)


def seconds_at(outcome: Outcome, index: int, rank: int, gpu: HardwareProfile, constants: Calibration) -> float | None:
    """The estimated seconds of a step, to six digits as in a plan; None where the card's rates are unknown."""
    estimate, configuration = outcome.time.estimate, outcome.configuration
    letters = configuration.at(batch=1, total=1, target=1, workspace=0, rank=rank)
    size, launched = (of(configuration.ledger, letters) for of in (update_bytes, update_launches))
    update = update_seconds(size, launched, gpu, constants)
    return None if estimate is None or update is None else float(f"{float(estimate[index]) + update:.6g}")


@dataclass(frozen=True)
class Prices:
    """In whatever money: of the card for an hour, of power for a kWh; None where nobody told."""

    per_hour: float | None = None
    power_per_kwh: float | None = None


def plan_time(found: Search, limit_seconds: float, train: Train, source: str, prices: Prices) -> tuple[Time, list[str]]:
    """Time of a step; of an epoch, where there is data here; cost, where there is a price. And warnings.

    Data that is elsewhere, or that the trainer would refuse, is no reason to plan nothing: a warning says so.

    Args:
        source: what the trainer loads the model from.
    """
    time, warnings = step_section(found, limit_seconds, train.accumulation), []
    if train.data is not None:
        from planner.data_profile import profile_data
        from planner.epoch import epoch, packing_hint

        clock = StepClock(found, train.accumulation)
        try:
            data = profile_data(Path(train.data).expanduser(), source, found.constants)
            time = time.model_copy(update={"epoch": epoch(data, train, clock)})
            if (hint := packing_hint(data, train, clock)) is not None:
                warnings.append(hint)
        except PlanError as error:
            warnings.append(f"How long an epoch takes is not known. {error}")
    if prices == Prices():
        return time, warnings
    from planner.cost import cost

    told = cost(time, found.situation.gpu, prices.per_hour, prices.power_per_kwh)
    return time.model_copy(update={"cost": told}), warnings


def step_section(found: Search, limit_seconds: float, accumulation: int) -> Time:
    """The time of the chosen step; what data and prices add is not in it."""
    clock, want, batch = StepClock(found, accumulation), found.wanted[found.index], found.candidates.batch
    gpu, configuration = found.situation.gpu, found.best.configuration
    letters = clock.letters(batch, want.total, want.target)
    amounts, update = clock.amounts(letters), clock.update()
    times = phase_times(configuration, amounts, gpu, found.constants)
    # Attention is a phase of its own where layers run in passes, and else a part of forward and backward.
    timed = [each for each in TIMED if each not in PASSES or configuration.settings["executor"] == "streamed"]
    phases = {
        phase.value: _phase(configuration, amounts, phase, times[phase].estimate, accumulation) for phase in timed
    }
    size = update_bytes(configuration.ledger, letters)
    phases[Phase.OPTIMIZER.value] = PhaseWork(
        seconds=significant(update),
        flops=0,
        memory_bytes=size,
        to_host_bytes=0,
        to_device_bytes=0,
        kernels=update_launches(configuration.ledger, letters),
    )
    one = step_time(configuration, amounts, gpu, found.constants).times(accumulation)
    estimate = None if one.estimate is None or update is None else float(one.estimate) + update
    free = {name: 0 if kind_of(configuration.ledger.work[name]) == LAUNCH else of for name, of in amounts.items()}
    on_card = step_time(configuration, free, gpu, found.constants).times(accumulation).estimate
    if estimate is not None:
        written = update_seconds(size, 0, gpu, found.constants)
        assert written is not None
        on_card = float(on_card) + written
    tokens = batch * want.total * accumulation
    if estimate is None:
        basis = UNKNOWN
    elif gpu.measured is None:
        basis = BASIS
    else:
        basis = BASIS_UNBOUNDED if one.bound is None else BASIS_MEASURED
    return Time(
        step_seconds=Seconds(
            bound=significant(one.bound),
            estimate=significant(estimate),
            on_card=None if estimate is None else significant(on_card),
        ),
        limit_seconds=limit_seconds,
        basis=basis,
        tokens_per_second=significant(tokens / estimate) if estimate else None,
        phases=phases,
        rates=told_rates(found) if estimate is not None else {},
    )


def _phase(
    configuration: Configuration, amounts: Mapping[str, Any], phase: Phase, seconds: Any, accumulation: int
) -> PhaseWork:
    """The work of one phase in all micro-batches of a step."""

    def amount(wanted: Callable[[str], bool]) -> int:
        works = (
            work
            for work in configuration.ledger.work.values()
            if work.phase is phase and work.resource is not Resource.EXPOSED and wanted(kind_of(work))
        )
        return accumulation * sum(int(amounts[work.name]) for work in works)

    return PhaseWork(
        seconds=significant(None if seconds is None else seconds * accumulation),
        flops=amount(lambda kind: kind in ("linear", "attention")),
        memory_bytes=amount(lambda kind: kind == "memory"),
        to_host_bytes=amount(lambda kind: kind == TO_HOST),
        to_device_bytes=amount(lambda kind: kind == TO_DEVICE),
        disk_bytes=amount(lambda kind: kind == ON_DISK),
        kernels=amount(lambda kind: kind == LAUNCH),
    )


def told_rates(found: Search) -> dict[str, Rate]:
    """The rates that the chosen configuration goes by, each with how it is known."""
    gpu, constants, configuration = found.situation.gpu, found.constants, found.best.configuration
    kernel, dtype, head = (
        configuration.settings["attention"],
        configuration.settings["dtype"],
        configuration.letters["E"],
    )
    rates = rates_of(kernel, dtype, head, gpu, constants)
    here = gpu.measured.rates(kernel, dtype, head) if gpu.measured is not None else {}
    used = {kind_of(work) for work in configuration.ledger.work.values()}
    told = {}
    for kind in KINDS:
        rate = rates.likely[kind]
        if kind not in used or rate is None or (kind == LAUNCH and gpu.kind == "cpu"):
            continue
        unit = UNITS.get(kind, "bytes/s")
        what = {"linear": dtype, "attention": f"kernel {kernel}, {dtype}, head size {head}"}.get(kind, "")
        if here.get(kind) is not None:
            assert gpu.measured is not None
            of = f", the disk of {gpu.measured.disk_folder}" if kind == ON_DISK else ""
            basis, source = "measured", gpu.measured.source + of
        elif kind == ON_DISK:
            basis, source = "assumed", constants.document["disk_bytes_per_second"]["source"]
        elif kind == LAUNCH:
            ours = gpu.id in constants.document["measured_cards"]
            basis, source = "calibrated" if ours else "assumed", constants.document["launch_seconds"]["source"]
        else:
            share = (
                constants.attention_share(kernel, gpu.compute_capability, dtype, head)
                if kind == "attention"
                else constants.share("link" if kind in (TO_HOST, TO_DEVICE) else kind)
            )
            ours = share["basis"] == "measured" and gpu.id in constants.document["measured_cards"]
            basis = "calibrated" if ours else "assumed"
            source = f"{share['value']:.3g} of {format_rate(rate / share['value'], unit)}; {share['source']}"
        told[kind] = Rate.model_validate(
            {
                "per_second": float(f"{rate:.6g}"),
                "unit": unit,
                "basis": basis,
                "source": f"{what}: {source}" if what else source,
            }
        )
    return told


def significant(value: Any) -> float | None:
    """Six digits of a number, or of the one number in an array."""
    return None if value is None else float(f"{float(np.ravel(value)[0]):.6g}")
