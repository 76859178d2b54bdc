"""The matrix as CSV, for machines, and as a table in Markdown, for people."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path

from planner.errors import PlanError
from planner.matrix import COLUMNS, MatrixRow
from planner.units import GIB, format_seconds

HEADS = ("card", "model", "tier", "tokens", "longest", "rank", "card high", "of", "host", "step")
LACKS_FACTS = "what a plan needs is unknown"
SUFFIXES = (".csv", ".md")


def as_csv(rows: Iterable[MatrixRow]) -> str:
    """Bytes, tokens and seconds as bare numbers; what there is none of is empty."""
    file = io.StringIO()
    writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: _plain(value) for name, value in row.document().items()} for row in rows)
    return file.getvalue()


def _plain(value: object) -> object:
    return str(value).lower() if isinstance(value, bool) else value


def as_markdown(rows: Iterable[MatrixRow]) -> str:
    """One table; a row without a plan says why in place of its figures."""
    lines = [HEADS, ("---", "---", *("---:" for _ in HEADS[2:])), *(_linked(row) for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _linked(row: MatrixRow) -> tuple[str, ...]:
    return tuple(cell.replace("|", "∣") for cell in cells(row))


def verdict(row: MatrixRow) -> str:
    """Why a row has no plan."""
    return row.why.removeprefix("what a plan needs is ") if row.why.startswith(LACKS_FACTS) else f"none: {row.why}"


def cells(row: MatrixRow) -> tuple[str, ...]:
    """One row in words; a reason takes the place of the tier."""
    if row.fits is not True:
        return (row.gpu, row.model, verdict(row), *("" for _ in HEADS[3:]))
    step = "unknown" if row.step_seconds is None else format_seconds(row.step_seconds)
    tier = "none" if row.tier is None else str(row.tier)
    figures = (row.total_tokens, row.longest_all_trained, row.rank)
    sizes = (row.gpu_high_bytes, row.gpu_budget_bytes, row.host_bytes)
    return (
        row.gpu,
        row.model,
        tier,
        *("none" if figure is None else f"{figure:,}" for figure in figures),
        *("" if size is None else f"{size / GIB:.2f} GiB" for size in sizes),
        step,
    )


def check_matrix_target(path: Path) -> None:
    """See whether a matrix may be written there; nothing is touched.

    Raises:
        PlanError: not CSV or Markdown by its name, no such folder, or a file that holds no matrix.
    """
    asked = f"--out {path}"
    if path.suffix.lower() not in SUFFIXES:
        raise PlanError(asked, f"is neither {' nor '.join(SUFFIXES)}.", "Try --out tiers.csv.")
    if not path.parent.is_dir():
        raise PlanError(asked, f"there is no folder {path.parent}.", f"mkdir -p {path.parent} makes it.")
    if not path.exists():
        return
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            first = file.readline()
    except OSError as error:
        raise PlanError(asked, f"cannot be looked at: {error.strerror}.") from error
    if first not in (as_csv([]).splitlines(keepends=True)[0], as_markdown([]).splitlines(keepends=True)[0]):
        raise PlanError(asked, "holds something else than a matrix, and is not overwritten.", "Name another file.")


def written(rows: Sequence[MatrixRow], path: Path) -> str:
    """What belongs into a file of that name."""
    return as_csv(rows) if path.suffix.lower() == ".csv" else as_markdown(rows)
