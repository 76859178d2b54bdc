"""The records of the grid, of both times that it was run, and what is planned today with their settings."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

from planner import measurements
from planner.cli_check import same_settings
from planner.measurements import Failure, read_failures, read_records
from planner.plan import Plan
from planner.planning import make_plan
from reports.render.records import FOLDER, Record, card_named
from reports.validation.grid import EXCLUDED, GRID

RECORDS = FOLDER / "grid"
FIRST = FOLDER / "grid-first"
"""Plans, records and failures of the first running."""
SECOND = FOLDER / "grid-second"
"""Plans and records that others have taken the place of since."""
LONGER = frozenset(case.name for case in GRID if case.beyond)
"""Sequences that were made to be too long: what becomes of them is no error of a prediction."""
RAN, OUT, NOT_RUN = "ran", "ran out of memory", "not run yet"


@cache
def found(folder: Path = RECORDS) -> tuple[tuple[measurements.Record, ...], tuple[Failure, ...]]:
    """Records of the grid but for those that are left out, and runs that were to end and gave none."""
    records = tuple(record for record in read_records(folder) if record.name not in {*EXCLUDED, *LONGER})
    return records, tuple(failure for failure in read_failures(folder) if failure.name not in LONGER)


def came_of(name: str) -> str:
    """What became of a run."""
    if (RECORDS / f"{name}.json").exists():
        return RAN
    failed = RECORDS / f"{name}.failed.txt"
    if not failed.exists():
        return NOT_RUN
    return OUT if OUT in failed.read_text(encoding="utf-8") else "failed otherwise"


def pending() -> list[str]:
    """Names of the runs that have not been made."""
    return [case.name for case in GRID if came_of(case.name) == NOT_RUN]


@cache
def record_of(name: str, folder: Path = RECORDS) -> Record:
    """One record, left out or not."""
    return Record(name, json.loads((folder / f"{name}.json").read_text(encoding="utf-8")))


@cache
def planned_again(name: str, folder: Path = RECORDS) -> Plan:
    """What is planned today with the settings of a run."""
    plan = Plan.model_validate_json(json.dumps(record_of(name, folder).content["plan"]))
    return make_plan(same_settings(plan, card_named(plan.gpu.id)))


def error_today(name: str, folder: Path = RECORDS) -> float:
    """By what share of the measured peak today's expected one is off."""
    return planned_again(name, folder).memory.gpu.peak_bytes.expected / record_of(name, folder).allocated - 1
