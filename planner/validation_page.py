"""A page on what records say of predictions, in Markdown, with pictures beside it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from planner.cli_output import is_new, write_whole
from planner.errors import PlanError
from planner.markdown import gib, percent, seconds, table
from planner.measurements import STANDING, Failure, Record, Spread
from planner.units import format_bytes
from planner.validation_pictures import pictures
from planner.validation_report import BOUNDS, COMPARED, sentences, spreads

SPREAD = ("compared", "runs>", "median>", "95th percentile>", "largest>", "too low>")
RUNS = (
    "run",
    "how",
    "tokens>",
    "planned>",
    "took>",
    "error>",
    "reserved>",
    "bound>",
    "driver>",
    "host>",
    "host bound>",
    "step, s>",
    "estimated>",
)
CAPTIONS = {
    "measured": "Planned against measured peaks",
    "errors": "How far off planned peaks were",
    "bounds": "What was left of bounds",
    "phases": "Errors phase by phase",
}


TITLE = "# Predictions against runs"


def check_page(target: Path) -> None:
    """See whether a page and its pictures may be written there; nothing is touched.

    Raises:
        PlanError: it is no Markdown file in a folder that is there, or something else is by one of these names.
    """
    asked, other = f"--out {target}", "Name another file, or move that one away."
    new = is_new(target)  # it says what is wrong with a folder, or with a name that is none
    if target.suffix != ".md":
        raise PlanError(asked, "is no name of a Markdown page.", f"Try --out {target.with_suffix('.md')}.")
    if new:
        there = [path.name for name in CAPTIONS if (path := _picture(target, name)).exists()]
        if there:
            raise PlanError(asked, f"would need the name of a picture that is there: {there[0]}.", other)
    elif TITLE not in target.read_text(encoding="utf-8", errors="replace"):
        raise PlanError(asked, "holds something that is no such page, and is not overwritten.", other)


def _picture(page: Path, name: str) -> Path:
    return page.with_name(f"{page.stem}-{name}.svg")


def write_page(target: Path, records: Sequence[Record], failures: Sequence[Failure]) -> list[Path]:
    """Write the page and its pictures beside it, in the place of those of before; gives what was written."""
    drawn = {_picture(target, name): content for name, content in pictures(records, failures).items()}
    for place, content in drawn.items():
        write_whole(place, content)
    for place in {_picture(target, name) for name in CAPTIONS} - {*drawn}:
        place.unlink(missing_ok=True)
    names = {place.stem.removeprefix(f"{target.stem}-"): place.name for place in drawn}
    write_whole(target, page(records, failures, names))
    return [target, *drawn]


def page(
    records: Sequence[Record],
    failures: Sequence[Failure],
    drawn: Mapping[str, str],
    more: Sequence[str] = (),
    failed: Mapping[str, int] | None = None,
    within: Mapping[str, Collection[str]] | None = None,
    note: str = "",
) -> str:
    """The page's text.

    Args:
        drawn: by picture, its file as seen from the page.
        more: what is told besides, before the list of all runs.
        failed: by set, runs that had too little of the card's memory; else all of them are of the set without a name.
        note: what has to be known of the figures before they are read.
        within: by a title, names of runs of the last set that are told by themselves as well; ``failed`` may name it.
    """
    failed = {"": sum(failure.out_of_memory for failure in failures)} if failed is None else failed
    parts = [
        TITLE,
        "Bytes of a peak are predicted as an expected value and as a bound. An error is predicted over measured, less "
        f"one; room is how far a bound was above what was measured.{_held(records)}",
        *(f"![{CAPTIONS[name]}]({place})" for name, place in drawn.items()),
        "## All together",
        note,
        *_by_set(records, failed),
        *_by_themselves(records, failed, within or {}),
        _bullets(sentences(records, failures)),
        *_titled("Phase by phase", ("phase", *SPREAD[1:]), _phase_rows(records)),
        *_titled(
            "Terms that stay from step to step", ("term", "runs>", "exact>", "largest difference>"), _term_rows(records)
        ),
        *more,
        "## Every run",
        "Sizes in GiB. Host memory is anonymous and pinned together.",
        table(RUNS, map(_row, records)),
        "## Machines and versions",
        _bullets(_machines(records)),
    ]
    return "\n\n".join(part.strip("\n") for part in parts if part) + "\n"


def _titled(title: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A section with a table; none without rows."""
    return [f"## {title}", table(heads, rows)] if rows else []


def _bullets(lines: Sequence[str]) -> str:
    return "\n".join(f"* {line}" for line in lines)


def _by_set(records: Sequence[Record], failed: Mapping[str, int]) -> list[str]:
    """What is compared, once for each set that the records name; ``failed``: of each, runs that had too little."""
    names = sorted({str(record.content.get("set") or "") for record in records})
    parts = []
    for name in names:
        of = [record for record in records if str(record.content.get("set") or "") == name]
        title = {"holdout": "Held out of every fit", "calibration": "Constants may be fitted to these"}.get(name, "")
        parts += _compared(title, of, failed.get(name, 0))
    return parts


def _by_themselves(
    records: Sequence[Record], failed: Mapping[str, int], within: Mapping[str, Collection[str]]
) -> list[str]:
    """The same of some of them, under the title that each choice has."""
    parts = []
    for title, names in within.items():
        if of := [record for record in records if record.name in names]:
            parts += _compared(title, of, failed.get(title, 0))
    return parts


def _compared(title: str, records: Sequence[Record], failed: int) -> list[str]:
    """A heading, unless there is no title, and the table of what is compared."""
    rows = [
        _spread(told, spread, bound=what in BOUNDS, failed=failed if what == "reserved" else 0)
        for what, spread in spreads(records).items()
        for told in (next(told for known, told, _ in COMPARED if known == what),)
    ]
    models = len({record.content["model"]["id"] for record in records})
    return [f"### {title}: {len(records)} runs of {models} models" if title else "", table(SPREAD, rows)]


def spread_cells(spread: Spread, failed: int = 0) -> tuple[str, ...]:
    """How many runs, median, 95th percentile and largest error, and how many were too low.

    Args:
        failed: runs that had too little and so are no part of the spread.
    """
    shares = (f"{100 * value:.2f} %" for value in (spread.median, spread.percentile_95, spread.largest))
    return str(spread.count), *shares, f"{spread.under} and {failed} that failed" if failed else str(spread.under)


def _spread(what: str, spread: Spread, *, bound: bool, failed: int = 0) -> tuple[str, ...]:
    return f"{what}{' (room)' if bound else ''}", *spread_cells(spread, failed)


def _held(records: Sequence[Record]) -> str:
    """How many runs were held to their bound, where any was run, and how many of them not from the first step on."""
    ran = [record for record in records if record.how != "counted"]
    held = [record for record in ran if record.held_to_bound]
    if not ran:
        return ""
    told = f" Of {len(ran)} runs {'all' if held == ran else len(held)} had no more memory than the bound of their plan"
    if late := [(record, before["steps"]) for record in held if (before := record.before_held)]:
        rest = sorted({len(record.content["step_seconds"]["each"]) - steps for record, steps in late})
        steps = " or ".join(map(str, rest))
        told += (
            f", {len(held) - len(late)} from the first step on and {len(late)} in the last {steps} steps, saving and "
            "evaluation: steps before had the card's whole budget. Of those, seconds are of the steps before; what "
            "the allocator and the driver took is of the rest, here and in all tables"
        )
    return f"{told}."


def _phase_rows(records: Sequence[Record]) -> list[tuple[str, ...]]:
    found: dict[str, list[tuple[float, float]]] = {}
    for record in records:
        if record.shows_the_peak:
            for name, pair in record.phases.items():
                found.setdefault(name, []).append(pair)
    spread = {name: Spread.of(pairs) for name, pairs in found.items()}
    return [_spread(name.replace("_", " "), each, bound=False) for name, each in spread.items() if each is not None]


def _term_rows(records: Sequence[Record]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for group in STANDING:
        pairs = [record.standing[group] for record in records if group in record.standing]
        if pairs:
            exact = sum(planned == found for planned, found in pairs)
            apart = max(abs(planned - found) for planned, found in pairs)
            rows.append((group, str(len(pairs)), str(exact), format_bytes(apart)))
    return rows


def _row(record: Record) -> tuple[str, ...]:
    host, step = record.content["measured"]["host"], record.step
    ran, layers = record.content["layers_run"], record.content["layers"]
    part = "" if ran == layers else f", {ran} of {layers} layers"
    return (
        record.name,
        f"{record.how}{part}",
        f"{record.tokens:,}",
        gib(record.expected),
        gib(record.allocated),
        percent(record.error),
        gib(record.measured["reserved_bytes"]),
        gib(record.predicted["high_bytes"]),
        gib(record.measured["driver_bytes"]),
        gib(record.host_measured if host["anonymous_bytes"] else host["pinned_bytes"]),
        gib(record.content["predicted"]["host"]["peak_bytes"]),
        seconds(step[0] if record.alone else None),
        seconds(step[1] if record.alone else None),
    )


def _machines(records: Sequence[Record]) -> list[str]:
    count: dict[str, int] = {}
    for record in records:
        name = f"{record.machine}; revision {str(record.content.get('revision'))[:7]}"
        count[name] = count.get(name, 0) + 1
    return [f"{many} {'run' if many == 1 else 'runs'}: {name}" for name, many in count.items()]
