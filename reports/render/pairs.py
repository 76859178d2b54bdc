"""For reports/optimizations.md: what changes between two runs that differ in one optimisation, planned and measured."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from planner.calibration import calibration
from planner.markdown import table
from planner.measurements import Record
from planner.plan import LAUNCH_BOUND
from planner.units import MIB
from reports.render.grid_time import LAUNCH, launch_seconds
from reports.validation.fit import run_of, with_values
from reports.validation.measure import HERE
from reports.validation.pairs import CARD, PAIRS, STEPS, TIMED, Pair

FOLDER = HERE / "pairs"
SHARE, SIZE = 0.1, 20e6
"""A difference holds where it is off by no more than this share of the measured one, or by so many bytes."""


@dataclass(frozen=True)
class Difference:
    """What one more optimisation changes: planned before the runs, and measured."""

    planned: float
    measured: float

    @property
    def off(self) -> float:
        """The planned one less the measured one."""
        return self.planned - self.measured

    @property
    def holds(self) -> bool:
        """Whether it is near enough, and of the same sign where it is more than nothing."""
        near = abs(self.off) <= max(SHARE * abs(self.measured), SIZE)
        return near and (abs(self.measured) <= SIZE or self.planned * self.measured > 0)


@cache
def record(name: str) -> Record | None:
    """The record of a run; None where it was not made."""
    place = FOLDER / f"{name}.json"
    return Record(name, json.loads(place.read_text(encoding="utf-8"))) if place.exists() else None


def both(pair: Pair) -> tuple[Record, Record] | None:
    """The records without and with it; None where one is missing."""
    without, with_it = record(pair.without), record(pair.with_it)
    return (without, with_it) if without is not None and with_it is not None else None


def made() -> dict[Pair, tuple[Record, Record]]:
    """Pairs of which both runs were made."""
    return {pair: found for pair in PAIRS if (found := both(pair)) is not None}


def on_card(without: Record, with_it: Record) -> Difference:
    """Bytes more that tensors took at the peak of the card."""
    return Difference(with_it.expected - without.expected, with_it.allocated - without.allocated)


def pinned(without: Record, with_it: Record) -> Difference:
    """Bytes more of pinned host memory."""
    planned, measured = (
        [each.content[side]["host"]["pinned_bytes"] for each in (without, with_it)]
        for side in ("predicted", "measured")
    )
    return Difference(planned[1] - planned[0], measured[1] - measured[0])


def in_host(without: Record, with_it: Record) -> Difference:
    """Bytes more of host memory, pinned or not."""

    def planned(each: Record) -> int:
        return int(each.content["predicted"]["host"]["expected_bytes"])

    def measured(each: Record) -> int:
        host = each.content["measured"]["host"]
        return int(host["anonymous_bytes"]) + int(host["pinned_bytes"])

    return Difference(planned(with_it) - planned(without), measured(with_it) - measured(without))


def ratio(seconds: list[float | None]) -> float | None:
    """How many times as long the second is; None where one is not known."""
    without, with_it = seconds
    return with_it / without if without and with_it else None


def step_ratios(without: Record, with_it: Record) -> tuple[float | None, float | None, float | None]:
    """How many times as long a step is: measured, planned before, and by what a launch took each of the processes."""
    runs = (without, with_it)
    own = [own_estimate(each.name) for each in runs]
    if with_it.content["plan"].get("stages"):
        own = [None, None]  # an estimate is of the last stage alone
    measured, planned = (ratio([seconds(each)[which] for each in runs]) for which in (0, 1))
    return measured, planned, ratio(own)


def seconds(record: Record) -> tuple[float | None, float | None]:
    """Seconds of a step, measured and planned; of a run in stages the mean of theirs."""
    stages = record.content["plan"].get("stages")
    if not stages:
        return record.step
    measured = record.content["step_seconds"]["stages"]
    if None in measured:
        return None, None
    return statistics.mean(measured), statistics.mean(stage["step_seconds"] for stage in stages)


@cache
def own_estimate(name: str) -> float | None:
    """Seconds of a step by today's formulas, with the seconds that a launch took this run's process."""
    found = record(name)
    own = launch_seconds(found) if found is not None else None
    if found is None or own is None:
        return None
    return float(run_of(found).estimated(with_values(LAUNCH, np.array([own])))["step"])


def waits_for_host(record: Record) -> bool:
    """Whether a run's step was expected to wait for the host, by what a launch took its process."""
    own, found = own_estimate(record.name), record.content["plan"]["time"]["step_seconds"]["on_card"]
    return own is not None and found < LAUNCH_BOUND * own


def _near(found: Mapping[Pair, tuple[Record, Record]], pairs: Sequence[Pair]) -> str:
    """How many planned ratios of steps are near the measured ones."""
    ratios = [step_ratios(*found[pair])[:2] for pair in pairs]
    near = sum(abs(planned / measured - 1) <= SHARE for measured, planned in ratios if measured is not None and planned)
    return f"{near} of {len(pairs)} ratios are within {100 * SHARE:.0f} % of what was measured"


def _mib(size: float) -> str:
    if round(size / MIB, 1) == 0:
        return "0"
    return f"{'+' if size > 0 else '−'}{abs(size) / MIB:,.1f}"


def _times(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _row(pair: Pair, without: Record, with_it: Record) -> tuple[str, ...]:
    card, pins, host = (of(without, with_it) for of in (on_card, pinned, in_host))
    pins_told = (_mib(pins.planned), _mib(pins.measured)) if pins.planned or pins.measured else ("", "")
    host_told = (_mib(host.planned), _mib(host.measured)) if pair.host else ("", "")
    measured, planned, own = step_ratios(without, with_it) if pair.timed else (None, None, None)
    name = f"[`{pair.optimization}`](../docs/optimizations/{pair.optimization}.md)"
    runs = f"{pair.without} → {pair.with_it}"
    return (
        name,
        runs,
        _mib(card.planned),
        _mib(card.measured),
        *pins_told,
        *host_told,
        *map(_times, (measured, planned, own)),
    )


HEADS = (
    "optimisation",
    "runs",
    "card, planned>",
    "card, measured>",
    "pinned, planned>",
    "pinned, measured>",
    "host, planned>",
    "host, measured>",
    "step, measured>",
    "step, planned>",
    "with its own launches>",
)


def section() -> str:
    """The table, and what it comes to."""
    found = made()
    cards = {pair: on_card(*each) for pair, each in found.items()}
    pins = {pair: pinned(*each) for pair, each in found.items()}
    hosts = {pair: in_host(*each) for pair, each in found.items() if pair.host}
    quiet = [in_host(*each).measured for pair, each in found.items() if not in_host(*each).planned]
    most = max(abs(each.off) for each in cards.values())
    runs = [each for each in (record(name) for name in sorted(TIMED)) if each is not None]
    took = sorted(1e6 * (launch_seconds(each) or 0) for each in runs)
    holds = sum(each.holds for each in cards.values())
    missing = [pair.optimization for pair in PAIRS if pair not in found]
    off = [pair.optimization for pair, each in hosts.items() if not each.holds]
    told = (
        f"Two runs differ in one optimisation each ([`pairs.py`](validation/pairs.py); `{CARD}`, random weights; "
        "`python -m reports.validation.measure plan --pairs` froze the plans, `python -m reports.validation.several "
        "OUT --pairs` ran them, each in a process of its own; records in [`validation/pairs`](validation/pairs)). "
        f"MiB are of peaks, with it less without it. On the card {holds} of {len(found)} differences hold: off by no "
        f"more than {100 * SHARE:.0f} % of what was measured or {SIZE / 1e6:.0f} MB, and of the same sign. The "
        f"largest is off by {most / MIB:.1f} MiB. Pinned host memory is as planned in "
        f"{sum(each.holds for each in pins.values())} of {len(pins)}. Of the host's other memory, where an "
        f"optimisation is for that, {sum(each.holds for each in hosts.values())} of {len(hosts)} hold"
        + (f" (not: {', '.join(off)})" if off else "")
        + f"; where nothing there is planned to change, it does by {_mib(min(quiet))} to {_mib(max(quiet))} MiB."
        + (f" Not measured: {', '.join(missing)}." if missing else "")
    )
    times = (
        f"Steps are the median of those with the card's whole budget, of {STEPS} in all; of a run in stages "
        "the mean of theirs. Many of these are short, and "
        f"wait for the host, to which a launch took {took[0]:.0f} to {took[-1]:.0f} µs from the first of these runs to "
        f"the last, where plans have {1e6 * calibration().launch_seconds():.0f}: so two of them are compared with the "
        "host as it was at each. The last column is today's estimate with what a launch took in the very process, "
        "which was not known before. No disk's rate is known beforehand: `checkpoint_disk` was planned by one that is "
        "assumed."
    )
    waiting = [pair for pair in found if pair.timed and not any(map(waits_for_host, found[pair]))]
    times += f" {_near(found, [pair for pair in found if pair.timed])}; {_near(found, waiting)} where neither waits so."
    rows = [_row(pair, *each) for pair, each in found.items()]
    return f"## With and without\n\n{told}\n\n{times}\n\n{table(HEADS, rows)}"
