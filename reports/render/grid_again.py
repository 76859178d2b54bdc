"""For reports/validation.md: runs that were made once more, and what was said of them before."""

from __future__ import annotations

from planner.markdown import percent, table
from planner.measurements import Record, read_records
from planner.units import MIB, format_bytes
from reports.render.grid_records import SECOND, came_of, found, record_of
from trainer import ALLOCATOR
from trainer.allocator import rounded_up

STRICT = "6bfe56e"
"""The revision from which on the allocator's limit is lower by what it rounds up."""


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
            f"that off the limit since; made once more, {format_bytes(-now.over)} of the bound were left.{looser()}"
        )
    heads = ("run", "error then>", "of the bound left then>", "error now>", "of the bound left now>")
    return f"## Made once more\n\n{told}\n\n{table(heads, rows)}"


def superseded() -> list[Record]:
    """Records of before that led to a change of formulas, or were planned otherwise after it."""
    return [record for record in read_records(SECOND) if record.over <= 0]


def sentence() -> str:
    """What has to be known of the figures: which runs were made twice, why, and what their first errors were."""
    before = read_records(SECOND)
    first = {record.name: record for record in before}
    worst = max((first.get(record.name, record) for record in found()[0]), key=lambda record: abs(record.error))
    over = [record for record in before if record.over > 0]
    told = (
        f"{len(superseded())} of these runs were planned, frozen and made once more after formulas had been changed "
        "because of some of them; the figures have them as they were made last. As each was frozen and made first, the "
        f"largest error of an expected peak was {percent(abs(worst.error))[1:]} ({worst.name})"
    )
    if over:
        names = " and ".join(record.name for record in over)
        most = format_bytes(max(record.over for record in over))
        told += f", and {len(over)} of {len(found()[0])} reserved more than its bound, by {most} ({names})"
    return f"{told}. All of them are in [Made once more](#made-once-more)."


def looser() -> str:
    """How many records were held to the whole bound, and reserved more than today's limit would let them."""
    rounding, records = rounded_up(ALLOCATOR), found()[0]
    strict = [record for record in records if record.content["revision"].startswith(STRICT)]
    more = [record for record in records if record not in strict and record.over > -rounding]
    return (
        f" {len(records) - len(strict)} of the {len(records)} runs were made before that, held to their bound by a "
        f"limit {rounding // MIB} MiB higher than today's; {len(more)} of these reserved more than today's would let "
        "them at once. Whether these would end today is not shown."
    )


def _now(name: str) -> tuple[str, str]:
    if came_of(name) != "ran":
        return came_of(name), ""
    record = record_of(name)
    return percent(record.error), _room(record)


def _room(record: Record) -> str:
    left = format_bytes(abs(record.over))
    return left if record.over <= 0 else f"−{left}"
