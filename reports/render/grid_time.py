"""For reports/validation.md: seconds of a step, as estimated, and with what a launch took the very host.

Below some thousand tokens a step waits for the host, and how fast that is differs from host to host: `plan measure`
measures it, and plans for the machine at hand use that. Plans of the grid were made elsewhere, by the constant.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from functools import cache

import numpy as np

from planner.calibration import calibration
from planner.markdown import table
from planner.measurements import Record, Spread
from planner.plan import LAUNCH_BOUND
from planner.validation_page import spread_cells
from planner.validation_report import spreads
from reports.render.grid_records import planned_again, record_of
from reports.validation.fit import Constant, run_of, with_values

ON_CARD = "those that wait for the card"
ON_HOST = "those that wait for the host, which launches kernels"
BY_HOST = "all, with the seconds of a launch that each host took"
LAUNCH = (Constant("launch_seconds", ("launch_seconds",)),)
DIGITS = 6  # of a plan's seconds


def launch_seconds(record: Record) -> float | None:
    """Seconds of a launch in the process that made the run; None where they were not measured."""
    found = record.content.get("launches")
    return found["seconds"] / found["kernels"] if found else None


def is_timed(record: Record) -> bool:
    """Whether its seconds are compared, and those of its host's launches are known."""
    return record.alone and None not in record.step and launch_seconds(record) is not None


@cache
def estimates(name: str) -> tuple[float, float]:
    """Seconds of a run's step by today's formulas: with the shipped constants, and with its own seconds of a launch."""
    record = record_of(name)
    own = launch_seconds(record)
    assert own is not None, name
    run = run_of(record)
    with_own = run.estimated(with_values(LAUNCH, np.array([own])))
    return run.estimated(calibration())["step"], with_own["step"]


@cache
def launch_bound(name: str) -> bool:
    """Whether a run's step is expected to wait for the host, by its settings as they are planned today."""
    return planned_again(name).time.step_seconds.launch_bound


def by_what_they_wait_for(records: Sequence[Record]) -> dict[str, Spread | None]:
    """How far off estimates were that were made before the runs: of steps that wait for the card, and for the host."""
    timed = [record for record in records if is_timed(record)]
    return {
        told: Spread.of([(float(each.step[1] or 0), float(each.step[0] or 0)) for each in of])
        for told, of in (
            (ON_CARD, [record for record in timed if not launch_bound(record.name)]),
            (ON_HOST, [record for record in timed if launch_bound(record.name)]),
        )
    }


def unsteady(records: Iterable[Record]) -> float:
    """How many times as long as the fastest step of a run its slowest is, in the middle of launch-bound runs.

    Steps that are held to the bound do not count.
    """
    each = (
        record.content["step_seconds"]["each"][: record.before_held["steps"] if record.before_held else None]
        for record in records
        if launch_bound(record.name)
    )
    return statistics.median(max(steps) / min(steps) for steps in each)


def spread_by_host(records: Sequence[Record]) -> Spread | None:
    """How far estimates are off that are made with the seconds of a launch that each run's host took."""
    return Spread.of([(estimates(each.name)[1], float(each.step[0] or 0)) for each in records if is_timed(each)])


def spread_today(records: Sequence[Record]) -> Spread | None:
    """How far estimates by today's formulas are off, with the shipped constants."""
    return Spread.of(
        [(round(estimates(each.name)[0], DIGITS), float(each.step[0] or 0)) for each in records if is_timed(each)]
    )


def section(sets: Sequence[tuple[str, Sequence[Record]]]) -> str:
    """A table by title and records of each set: as estimated before the runs, and with each host's own launches."""
    rows = []
    for title, records in sets:
        timed = [record for record in records if is_timed(record)]
        before, today, own = spreads(timed).get("time"), spread_today(timed), spread_by_host(timed)
        if before is None or today is None or own is None:
            continue
        rows.append((title, "as estimated before the run", *spread_cells(before)))
        for told, spread in by_what_they_wait_for(timed).items():
            if spread is not None:
                rows.append((title, told, *spread_cells(spread)))
        if spread_cells(today) != spread_cells(before):
            rows.append((title, "by today's formulas", *spread_cells(today)))
        rows.append((title, BY_HOST, *spread_cells(own)))
    heads = ("runs", "estimated>", "runs>", "median>", "95th percentile>", "largest>", "too low>")
    every = {record.name: record for _, records in sets for record in records if is_timed(record)}
    took = sorted(1e6 * (launch_seconds(record) or 0) for record in every.values())
    constant = 1e6 * calibration().launch_seconds()
    told = (
        f"How long a host takes to launch a kernel was measured after each run, in the same process: {took[0]:.0f} to "
        f"{took[-1]:.0f} µs, {statistics.median(took):.0f} in the middle of {len(took)} timed runs; the constant that "
        f"plans are made with has {constant:.0f}. The last row of each set is the estimate with what its own process "
        "took, which was not known before the run. A step waits for the host where the card alone, by today's "
        f"formulas, would need less than {LAUNCH_BOUND:.0%} of its time: a split that was made after the runs. A "
        "host's speed is no constant: of the steps of one run that waits for it the slowest took "
        f"{unsteady(every.values()):.1f} times as long as the fastest, in the middle of these runs."
    )
    return f"## Seconds of a step\n\n{told}\n\n{table(heads, rows)}"
