"""For reports/validation.md: a few runs of the grid, made again by a later tree, to see whether they still hold."""

from __future__ import annotations

from planner.markdown import percent, table
from planner.measurements import Record, read_records
from planner.units import MIB
from reports.render.grid_records import record_of
from reports.render.records import FOLDER

LATER = FOLDER / "grid-later"


def section() -> str:
    """Bytes and seconds then and now."""
    later = read_records(LATER)
    pairs = [(record_of(record.name), record) for record in later]
    same = sum(then.allocated == now.allocated for then, now in pairs)
    under = sum(now.over <= 0 for _, now in pairs)
    revisions = sorted({record.content["revision"][:7] for record in later})
    seconds = [_times(then, now) for then, now in pairs]
    rows = [
        (
            now.name,
            _mib(now.allocated - then.allocated),
            _mib(now.reserved - then.reserved),
            f"{_step(then):.3f}",
            f"{_step(now):.3f}",
            percent(_times(then, now) - 1, 1),
        )
        for then, now in pairs
    ]
    told = (
        f"{len(pairs)} runs of several kinds were made once more by revision {', '.join(revisions)}, from the same "
        "frozen plans, on another machine of the same kind; records in `reports/validation/grid-later/`. No figure "
        f"above has them. {same} of them took as many bytes as before, to the byte, and {under} reserved no more than "
        f"their bound. Their steps took {min(seconds):.2f} to {max(seconds):.2f} times as long as the first time: so "
        "far apart are two runs of one plan, and so near an estimate can come to either. Seconds of a run with some of "
        "its layers, or on a card that stands in for another, are its own and compared with nothing else."
    )
    heads = ("run", "allocated, MiB more>", "reserved, MiB more>", "step then, s>", "step now, s>", "longer>")
    return f"## Made again by a later tree\n\n{told}\n\n{table(heads, rows)}"


def _step(record: Record) -> float:
    """Seconds of a step, the median."""
    return float(record.content["step_seconds"]["median"])


def _times(then: Record, now: Record) -> float:
    return _step(now) / _step(then)


def _mib(size: int) -> str:
    return f"{size / MIB:+,.1f}".replace("-", "−") if size else "0"
