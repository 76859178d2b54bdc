"""Records of the grid and its frozen plans, for tests of the grid and of the page on it."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from planner.measurements import read_failures, read_records
from planner.plan import Plan
from planner.plan_file import load_plan
from reports.render import grid_records
from reports.validation.grid import BY_HOST, GRID, LONGEST

FOLDER, FIRST, SECOND = grid_records.RECORDS, grid_records.FIRST, grid_records.SECOND
MEASURED = {record.name: record for record in read_records(FOLDER)}
MEASURED_FIRST = {record.name: record for record in read_records(FIRST)}
CASE = {case.name: case for case in GRID}
LONGER = {case.name for case in GRID if case.beyond}


@cache
def frozen(name: str, folder: Path = FOLDER) -> Plan:
    """The plan that was written before the run."""
    return load_plan(folder / "plans" / f"{name}.yaml")


def pair_names() -> list[str]:
    """What the names of each pair of a longest and a longer sequence begin with: by card, then by host."""
    return [
        *(f"{card}-{model}" for card, model in LONGEST),
        *(f"{card}-{model}-{size}gib" for card, model, size in BY_HOST),
    ]


def failed_names() -> set[str]:
    """Runs of the grid that left no record."""
    return {failure.name for failure in read_failures(FOLDER)}
