"""For reports/validation.md and README.md: tiers as anyone gets them, run by the plans that were frozen before."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np

from planner.markdown import gib, percent, table
from planner.measurements import Record, read_failures, read_records
from planner.units import MIB
from reports.render.records import FOLDER
from reports.validation.grid import HELD
from reports.validation.several import is_timed
from reports.validation.tiers import TIER_RUNS, WHY

RUNS = FOLDER / "tiers"
FROZEN = "5dc5ef6"
"""The commit that froze the plans."""
CLOSE = 0.01  # an error of a peak, as a share, beyond which the page says why
HEADS = (
    "run",
    "context>",
    "trained>",
    "layers",
    "expected, GiB>",
    "error>",
    "left of the bound, MiB>",
    "step, s>",
    "estimate>",
)


@cache
def found() -> tuple[Record, ...]:
    """The records, in the order of their cases."""
    records = {record.name: record for record in read_records(RUNS)}
    return tuple(records[case.name] for case in TIER_RUNS if case.name in records)


def timed() -> list[Record]:
    """Those whose seconds are compared: all layers, alone on a card of the kind that was planned for."""
    names = {case.name for case in TIER_RUNS if is_timed(case)}
    return [record for record in found() if record.name in names]


def pending() -> list[str]:
    """Those that have neither record nor failure."""
    ended = {record.name for record in found()} | {failure.name for failure in read_failures(RUNS)}
    return [case.name for case in TIER_RUNS if case.name not in ended]


def tier_of(record: Record) -> int:
    """Which tier it is."""
    return int(record.content["plan"]["tier"])


def seconds_off(record: Record) -> float:
    """By what share of the measured seconds of a step the estimate was off."""
    measured, estimate = record.step
    assert measured and estimate
    return estimate / measured - 1


def sentence() -> str:
    """What came of them, in short."""
    records, failures = found(), read_failures(RUNS)
    models = {record.content["model"]["id"] for record in records}
    errors = [abs(record.error) for record in records]
    tiers = sorted({tier_of(record) for record in records})
    others = sorted({record.content["card"] for record in records} - {*HELD})
    off = [abs(seconds_off(record)) for record in timed()]
    ended = "Every one ended" if not failures else f"{len(failures)} failed"
    return (
        "Tiers as anyone gets them, with nothing said but card, model and tier, so that a context is read and not "
        f"trained: {len(records)} runs of tiers {tiers[0]} to {tiers[-1]} of {len(models)} models on an H200, held to "
        f"8 GiB or standing in for {', '.join(others)}, by plans frozen before. {ended}, "
        f"{sum(record.over <= 0 for record in records)} of {len(records)} within their bound. The expected peak was "
        f"off by {_share(float(np.median(errors)))} in the median, {_share(max(errors))} at most; the seconds of a "
        f"step, in the {len(off)} that were timed, by {_share(float(np.median(off)))} and {_share(max(off))}."
    )


def _share(error: float) -> str:
    return f"{100 * error:.2f} %"


def section() -> str:
    """All of them."""
    waiting = pending()
    told = [
        sentence(),
        f"`reports/validation/tiers.py` lists them, {FROZEN} froze their plans, `python -m "
        "reports.validation.several OUT --tiers` runs them; records in `reports/validation/tiers/`. "
        "Steps are timed, and the last two held to the bound, as in the grid; of a card that another stands in for, "
        "and of a part of the layers, no seconds are compared. No constant was fitted to any of them.",
        _far([record for record in found() if abs(record.error) > CLOSE]),
        f"Not run yet, since the time on the machine was over: {', '.join(waiting)}." if waiting else "",
    ]
    text = "\n\n".join(part for part in told if part)
    return f"## Tiers as anyone gets them\n\n{text}\n\n{table(HEADS, map(_row, found()))}"


def _far(records: Sequence[Record]) -> str:
    return " ".join(f"{record.name} is {percent(record.error)} off: {WHY[record.name]}" for record in records)


def _row(record: Record) -> tuple[str, ...]:
    plan, measured = record.content["plan"], record.step[0]
    run, whole = (record.content[name] for name in ("layers_run", "layers"))
    compared = record in timed()
    return (
        record.name,
        f"{plan['context']:,}",
        f"{plan['target']:,}",
        "all" if run == whole else f"{run} of {whole}",
        gib(record.expected),
        percent(record.error),
        f"{-record.over / MIB:,.0f}",
        f"{measured:.2f}" if compared and measured else "–",
        percent(seconds_off(record), 1) if compared else "–",
    )
