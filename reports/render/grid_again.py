"""For reports/validation.md: runs that were made once more, and what was said of them before."""

from __future__ import annotations

from planner.markdown import percent, table
from planner.measurements import Record, read_records
from planner.units import format_bytes
from reports.render.grid_records import SECOND, came_of, record_of


def section() -> str:
    """Which runs they are, why, and both errors."""
    before = read_records(SECOND)
    over = [record for record in before if record.over > 0]
    rows = [(then.name, percent(then.error), _room(then), *_now(then.name)) for then in before]
    told = (
        "Formulas of several query heads to a key head, and of layers with a window, were changed after the runs above "
        "had been made. Every run whose peak or settings they plan otherwise was planned, frozen and made once more, "
        f"{len(before) - len(over)} in all; plans and records of before lie in `reports/validation/grid-second/`. "
        "What was wrong with them led to the change, so that their errors now test it less than those of the long runs "
        "above do that were planned for the first time then."
    )
    for record in over:
        now = record_of(record.name)
        told += (
            f" One more, {record.name}, had been held to its bound and reserved {format_bytes(record.over)} more: "
            "the allocator holds its limit against what is asked for, and then adds whole pages. The trainer takes "
            f"that off the limit since; made once more, {format_bytes(-now.over)} of the bound were left."
        )
    heads = ("run", "error then>", "of the bound left then>", "error now>", "of the bound left now>")
    return f"## Made once more\n\n{told}\n\n{table(heads, rows)}"


def _now(name: str) -> tuple[str, str]:
    if came_of(name) != "ran":
        return came_of(name), ""
    record = record_of(name)
    return percent(record.error), _room(record)


def _room(record: Record) -> str:
    left = format_bytes(abs(record.over))
    return left if record.over <= 0 else f"−{left}"
