"""For reports/validation.md and README.md: tiers as anyone gets them, run by the plans that were frozen before."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np

from planner.markdown import gib, percent, table
from planner.measurements import Record, read_failures, read_records
from planner.units import MIB
from planner.validation_report import sentences
from reports.render.records import FOLDER
from reports.validation.grid import HELD
from reports.validation.several import is_timed
from reports.validation.tiers import FEW, LONG, SEVERAL, TIER_RUNS, WHY

RUNS = FOLDER / "tiers"
AGAIN = FOLDER / "others" / "weights-in-parts" / "in-parts"
"""Some of the timed runs once more, at another time, by the same executor as their records in ``RUNS``."""
FROZEN = "5dc5ef6"
"""The commit that froze the plans."""
CLOSE = 0.01  # an error of a peak, as a share, beyond which the page says why
FAR_IN_SECONDS = 0.2  # the same of seconds, beyond which they are named
HELD_STEPS = 2
"""The last steps of a timed run, which are held to the bound."""
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


@cache
def timed() -> tuple[Record, ...]:
    """Those whose seconds are compared: with all layers, on a card of the kind that was planned for."""
    names = {case.name for case in TIER_RUNS if is_timed(case)}
    return tuple(record for record in found() if record.name in names)


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
    records, failures, waiting = found(), read_failures(RUNS), len(pending())
    models = {record.content["model"]["id"] for record in records}
    tiers = sorted({tier_of(record) for record in records})
    others = sorted({record.content["card"] for record in records} - {*HELD})
    parts = [record for record in records if record.content["layers_run"] < record.content["layers"]]
    errors, off = [abs(record.error) for record in records], [abs(seconds_off(record)) for record in timed()]
    return (
        "A tier reads a context and trains what follows it. "
        f"{len(records)} runs of tiers {tiers[0]} to {tiers[-1]}, of {len(models)} models, were made on an H200 that "
        f"was held to 8 GiB or stood in for {', '.join(others)}, with the optimisations and knobs that the planner "
        f"chose before; {len(parts)} of them ran some of the layers. {len(failures)} failed, {waiting} more that were "
        f"planned had no machine yet. Held to its bound, {_all(len(records))} went on within it. The "
        f"expected peak was off by {_share(float(np.median(errors)))} in the median and {_share(max(errors))} at most, "
        f"the seconds of a step, in the {len(off)} that were timed, by {_share(float(np.median(off)))} and "
        f"{_share(max(off))}."
    )


def _all(count: int) -> str:
    within = sum(record.over <= 0 for record in found())
    return f"each of the {count}" if within == count else f"{within} of the {count}"


def _share(error: float) -> str:
    return f"{100 * error:.2f} %"


def section() -> str:
    """All of them."""
    waiting = pending()
    told = [
        sentence(),
        f"`reports/validation/tiers.py` lists them, {FROZEN} froze their plans, `python -m "
        "reports.validation.several OUT --tiers` runs them; records in `reports/validation/tiers/`. No constant was "
        f"fitted to any of them. Seconds are the median of {SEVERAL - HELD_STEPS} steps after the probe step, from "
        f"tier {LONG} on of {FEW - HELD_STEPS}, taken with the card's whole budget before the last {HELD_STEPS} steps "
        "were held to the bound; of a card that another stands in for, and of a part of the layers, no seconds are "
        "compared.",
        "".join(f"* {line}\n" for line in sentences(found(), read_failures(RUNS))).rstrip(),
        _far([record for record in found() if abs(record.error) > CLOSE]),
        _slow([record for record in timed() if abs(seconds_off(record)) > FAR_IN_SECONDS]),
        _again(read_records(AGAIN)),
        f"Not run yet, since the time on the machine was over: {', '.join(waiting)}." if waiting else "",
    ]
    text = "\n\n".join(part for part in told if part)
    return f"## Tiers as anyone gets them\n\n{text}\n\n{table(HEADS, map(_row, found()))}"


def _slow(records: Sequence[Record]) -> str:
    names = ", ".join(f"{record.name} ({percent(seconds_off(record), 1)})" for record in records)
    return (
        f"Estimates that are more than {100 * FAR_IN_SECONDS:.0f} % off, for reasons not known: {names}."
        if names
        else ""
    )


def _again(records: Sequence[Record]) -> str:
    """What seconds are worth: the same runs at two times."""
    of = {record.name: record for record in timed()}
    told = ", ".join(
        f"{record.name} {record.step[0]:.2f} s ({percent(seconds_off(record), 1)}) and {of[record.name].step[0]:.2f} s"
        for record in records
    )
    return (
        f"{len(records)} of them were run once more at another time, on an H200 "
        f"(`reports/validation/others/weights-in-parts`), then and in the table: {told}. "
        "The former are in no figure above."
    )


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
