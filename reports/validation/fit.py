"""Fits the constants of a step's time to the runs on record, and tells how far off runs of models left out would be.

    python -m reports.validation.fit [OUT]

What is fitted are the logarithms of the shares, and of the seconds of a launch, in ``planner/calibration.yaml``: least
squares on the logarithms of measured over estimated seconds, of steps and of their phases. Runs count that constants
may be fitted to (``reports.validation.sets``). Then each model is left out in turn: constants are fitted to the
others alone, and held against its runs. Nothing is written to the calibration: a person rounds, and says so there.
OUT gets the figures as JSON.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from planner.calibration import Calibration, calibration
from planner.cli_check import same_settings
from planner.compose import Configuration
from planner.hardware import HardwareProfile
from planner.model import SHIPPED
from planner.plan import Plan
from planner.plan_time import StepClock
from planner.planning import Request, solved
from planner.timecost import phase_times, update_bytes, update_launches, update_seconds
from reports.render.records import Record, card_named, on_cards, records
from reports.validation.sets import set_of_record

Values = np.ndarray[Any, np.dtype[np.float64]]
LEFT_OUT: Mapping[str, str] = {
    "h200-smollm2-135m-4096-float32": "the only run in float32: its row is what explains it",
    "h200-phi-2-2048-eager": "the only run of eager attention: its row is what explains it",
    "h100-8gib-phi-2-131072-disk": "how fast that machine's disk is was not measured",
    "h100-8gib-llama-3.1-70b-16384-streamed": "381 retries of the allocator in four steps, which no formula knows of",
    "h100-8gib-phi-2-32768-blocks": "the host took 5.91 s for phi-2 at 32,768 tokens without blocks, not the 4.87 s on "
    "record (others/h100-control-phi-2-32768-streamed.json); the runs of the hold-out set were made on that host too",
}
KERNELS = ("cudnn", "flash", "efficient")
STEP, PHASE = 0.02, 0.06  # standard deviations of logarithms: what is taken for noise of a step, and of one phase
NEAR = 0.15  # an estimate that is no further off, as a share of the time, counts as near
OUTLIER = 2.0  # standard deviations from which on a residual counts by its size, not by its square (Huber)
# Assumed, since no record has a copy, a product or traffic by itself; runs alone would let these trade with each other.
# Logarithms are held near it, the link's within a hundredth, the others within a tenth.
HELD: Mapping[str, tuple[float, float]] = {"link": (0.81, 0.01), "linear": (0.70, 0.1), "memory": (0.70, 0.1)}
MOST_STEPS = 100  # of the fit; it takes some ten
SHORT = "optimizer"  # a phase of hundredths of a step, in which the host waits for the norm of the gradients


@dataclass(frozen=True)
class Constant:
    """One number of the calibration, by the keys that lead to it."""

    name: str
    keys: tuple[str | int, ...]

    def of(self, document: Mapping[str, Any]) -> dict[str, Any]:
        """Its entry: value, basis, source."""
        entry: Any = document
        for key in self.keys:
            entry = entry[key]
        return dict(entry)


@dataclass(frozen=True)
class Run:
    """One measured run and the work that the formulas count for it.

    Attributes:
        amounts: of each piece of work of a micro-batch.
        update: bytes and kernels of the optimiser's step.
        measured: seconds of the median step, and of its phases where they were measured.
    """

    name: str
    model: str
    holdout: bool
    configuration: Configuration
    amounts: Mapping[str, Any]
    gpu: HardwareProfile
    accumulation: int
    update: tuple[int, int]
    measured: Mapping[str, float]

    def estimated(self, constants: Calibration) -> dict[str, float]:
        """Seconds of the step and of each of its phases."""
        times = phase_times(self.configuration, self.amounts, self.gpu, constants)
        found = {phase.value: float(time.estimate) * self.accumulation for phase, time in times.items()}
        update = update_seconds(*self.update, self.gpu, constants)
        assert update is not None
        return {**found, "step": sum(found.values()) + update}

    def off(self, constants: Calibration) -> dict[str, float]:
        """The logarithm of measured over estimated seconds, of the step and of each phase."""
        estimated = self.estimated(constants)
        return {name: float(np.log(seconds / estimated[name])) for name, seconds in self.measured.items()}


def request_of(record: Mapping[str, Any], plan: Plan, folder: Path) -> Request:
    """What to ask for to plan a record's run today, of as many layers as ran; ``folder`` gets the config of a part."""
    request = same_settings(plan, card_named(plan.gpu.id))
    if record["layers_run"] == record["layers"]:
        return request
    config = json.loads((SHIPPED / plan.model.id / "config.json").read_text(encoding="utf-8"))
    assert "layer_types" not in config, "layers that differ: which of them ran?"
    cut = config | {"num_hidden_layers": record["layers_run"]}
    (folder / "config.json").write_text(json.dumps(cut), encoding="utf-8")
    return replace(request, model=f"random:{folder}")


def run_of(record: Record) -> Run:
    """A record's run, planned as today."""
    content = record.content
    plan = Plan.model_validate_json(json.dumps(content["plan"]))
    with tempfile.TemporaryDirectory() as folder:
        request = request_of(content, plan, Path(folder))
        found = solved(request).found
    accumulation = int(request.train.get("accumulation", 1))
    clock, want = StepClock(found, accumulation), found.wanted[found.index]
    letters = clock.letters(found.candidates.batch, want.total, want.target)
    phases = content["step_seconds"].get("phases") or {}
    return Run(
        record.name,
        content["model"]["id"],
        set_of_record(content) == "holdout",
        clock.configuration,
        clock.amounts(letters),
        found.situation.gpu,
        accumulation,
        (update_bytes(clock.configuration.ledger, letters), update_launches(clock.configuration.ledger, letters)),
        {
            "step": content["step_seconds"]["median"],
            **{name: seconds for name, seconds in phases.items() if name != SHORT},
        },
    )


def constants_of(document: Mapping[str, Any]) -> tuple[Constant, ...]:
    """The shares of linear, memory and link, the seconds of a launch, and attention's rows measured on these cards."""
    shares = [Constant(name, ("efficiency", name)) for name in ("linear", "memory", "link")]
    rows = [
        Constant(_row_name(kernel, row), ("efficiency", "attention", kernel, number))
        for kernel in KERNELS
        for number, row in enumerate(document["efficiency"]["attention"][kernel])
        if row["basis"] == "measured" and "dtype" not in row
    ]
    return (*shares, Constant("launch_seconds", ("launch_seconds",)), *rows)


def _row_name(kernel: str, row: Mapping[str, Any]) -> str:
    least = row.get("least_head_size")
    return f"attention, {kernel}" + (f", head size from {least}" if least else "")


def with_values(constants: Sequence[Constant], values: Values) -> Calibration:
    """The shipped calibration with these values in place of its own."""
    document = copy.deepcopy(calibration().document)
    for constant, value in zip(constants, values, strict=True):
        entry: Any = document
        for key in constant.keys:
            entry = entry[key]
        entry["value"] = float(value)
    return Calibration(document, "fitted")


def fit(constants: Sequence[Constant], runs: Sequence[Run]) -> Values:
    """The values that explain the runs best: damped Gauss-Newton steps with weights for large residuals.

    A constant that no run depends on keeps the value that the calibration has.
    """
    place = {constant.name: number for number, constant in enumerate(constants)}
    at = np.log([constant.of(calibration().document)["value"] for constant in constants])

    def residuals(logs: Values) -> Values:
        changed = with_values(constants, np.exp(logs))
        found = [
            value / (STEP if name == "step" else PHASE) for run in runs for name, value in run.off(changed).items()
        ]
        held = [(logs[place[name]] - np.log(value)) / spread for name, (value, spread) in HELD.items()]
        return np.array([*found, *held])

    def loss(found: Values) -> float:
        size = np.abs(found)
        return float(np.where(size <= OUTLIER, size**2 / 2, OUTLIER * (size - OUTLIER / 2)).sum())

    now, damping, small = residuals(at), 1e-3, 1e-4
    for _ in range(MOST_STEPS):
        slopes = np.column_stack([(residuals(at + small * unit) - now) / small for unit in np.eye(len(constants))])
        weights = np.minimum(1, OUTLIER / np.maximum(np.abs(now), 1e-12))
        curvature = slopes.T @ (slopes * weights[:, None])
        step = -np.linalg.solve(curvature + damping * np.eye(len(constants)), slopes.T @ (weights * now))
        step = np.clip(step, -0.3, 0.3)
        then = residuals(at + step)
        if loss(then) < loss(now):
            at, now, damping = at + step, then, damping / 3
            if np.abs(step).max() < 1e-4:
                break
        else:
            damping *= 10
            if damping > 1e6:  # no step makes it better
                break
    else:
        raise RuntimeError(f"the fit did not settle within {MOST_STEPS} steps")
    return np.exp(at)


def depends(run: Run, constants: Sequence[Constant], values: Values, number: int) -> bool:
    """Whether a run's estimate is another where one constant is."""
    doubled = values.copy()
    doubled[number] *= 2
    before, after = (run.estimated(with_values(constants, each)) for each in (values, doubled))
    return before != after


def report(runs: Iterable[Run]) -> dict[str, Any]:
    """Everything that is told: constants as fitted, and each run's measured over estimated seconds."""
    known = [run for run in runs if run.name not in LEFT_OUT]
    fitted_to, held_out = ([run for run in known if run.holdout is out] for out in (False, True))
    constants = constants_of(calibration().document)
    shipped = np.array([constant.of(calibration().document)["value"] for constant in constants])
    whole = fit(constants, fitted_to)
    without, left_out = {}, {}
    for model in sorted({run.model for run in fitted_to}):
        others = [run for run in fitted_to if run.model != model]
        values = fit(constants, others)
        without[model] = values
        unknown = {
            number
            for number in range(len(constants))
            if not any(depends(run, constants, whole, number) for run in others)
        }
        for run in (run for run in fitted_to if run.model == model):
            alone = [constants[number].name for number in sorted(unknown) if depends(run, constants, whole, number)]
            ratio = float(np.exp(run.off(with_values(constants, values))["step"]))
            left_out[run.name] = {"ratio": round(ratio, 4), "known_from_it_alone": alone}

    def ratios(values: Values, of: Iterable[Run]) -> dict[str, float]:
        changed = with_values(constants, values)
        return {run.name: round(float(np.exp(run.off(changed)["step"])), 4) for run in of}

    return {
        "constants": {
            constant.name: {
                "shipped": float(shipped[number]),
                "fitted": float(f"{whole[number]:.4g}"),
                "without_one_model": [
                    float(f"{bound(values[number] for values in without.values()):.4g}") for bound in (min, max)
                ],
            }
            for number, constant in enumerate(constants)
        },
        "fitted_to": {"shipped": ratios(shipped, fitted_to), "fitted": ratios(whole, fitted_to)},
        "left_out_in_turn": left_out,
        "holdout": {"shipped": ratios(shipped, held_out), "fitted": ratios(whole, held_out)},
        "not_looked_at": dict(LEFT_OUT),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Fit, print, and write."""
    parser = argparse.ArgumentParser(prog="python -m reports.validation.fit", description=__doc__.splitlines()[0])
    parser.add_argument("out", nargs="?", type=Path, help="file for the figures as JSON")
    given = parser.parse_args(arguments)
    found = report(run_of(record) for record in on_cards(records()))
    print(f"{'constant':42} {'shipped':>10} {'fitted':>10}   without one model")
    for name, each in found["constants"].items():
        low, high = each["without_one_model"]
        print(f"{name:42} {each['shipped']:10.4g} {each['fitted']:10.4g}   {low:.4g} to {high:.4g}")
    known, alone = split(found)
    for title, of in (
        ("measured over estimated seconds, shipped constants", found["fitted_to"]["shipped"]),
        ("the same, fitted constants", found["fitted_to"]["fitted"]),
        ("models left out in turn, all known from others", known),
        ("models left out in turn, something known from it alone", alone),
        ("runs of the hold-out set, shipped constants", found["holdout"]["shipped"]),
    ):
        print(f"\n{title}: {_told(of)}")
    if given.out:
        given.out.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def split(found: Mapping[str, Any]) -> tuple[dict[str, float], dict[str, float]]:
    """Ratios of runs left out of the fit: of those that other runs tell all of, and of the others.

    Where no other run depends on a constant, it keeps the value that was fitted to the very run: that is no test of it.
    """
    told: tuple[dict[str, float], dict[str, float]] = {}, {}
    for name, one in found["left_out_in_turn"].items():
        told[bool(one["known_from_it_alone"])][name] = one["ratio"]
    return told


def errors_of(ratios: Mapping[str, float]) -> tuple[int, float, float, int]:
    """How many, the median and the largest error, and how many are near: the larger over the smaller, less one."""
    errors = [max(ratio, 1 / ratio) - 1 for ratio in ratios.values()]
    return len(errors), statistics.median(errors), max(errors), sum(error <= NEAR for error in errors)


def _told(ratios: Mapping[str, float]) -> str:
    many, median, largest, near = errors_of(ratios)
    return f"{many} runs, median error {median:.1%}, largest {largest:.1%}, {near} within {NEAR:.0%}"


if __name__ == "__main__":
    main()
