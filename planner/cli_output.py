"""Where answers go: the terminal as it is, JSON as bytes, and plan files that are never half written."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from planner.errors import PlanError, did_you_mean

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from planner.plan import Plan


def console() -> Console:
    """Standard output: plain text where it is no terminal or NO_COLOR is set (rich alone would keep bold)."""
    from rich.console import Console

    return Console(highlight=False, color_system=None if os.environ.get("NO_COLOR") else "auto")


def print_json(text: str) -> None:
    """One JSON document on standard output, in UTF-8 whatever the terminal is."""
    # A stream without bytes beneath, such as a StringIO that collects output, takes the text itself.
    click.echo(text.encode("utf-8") if hasattr(sys.stdout, "buffer") else text)


def print_object(document: Mapping[str, Any]) -> None:
    """One JSON object on standard output."""
    print_json(json.dumps(document, indent=2, ensure_ascii=False))


def plain_table(*columns: str, right: Iterable[str] = ()) -> Table:
    """A table without lines; ids and numbers are never wrapped."""
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
    for name in columns:
        table.add_column(name, justify="right" if name in right else "left", no_wrap=name in ("id", "", *right))
    return table


def print_table(table: Table, note: str) -> None:
    """A table and what is to be said of it."""
    from planner.report import print_parts

    print_parts(console(), [table, "", note])


def check_target(path: Path) -> None:
    """See whether a plan may be written there; nothing is touched.

    Raises:
        PlanError: no such folder, not a file, or a file that is no plan of this version.
    """
    from planner.plan_file import load_plan

    if is_new(path):
        return
    try:
        load_plan(path)
    except PlanError as error:
        why = "holds something that is no plan of this version, and is not overwritten."
        raise PlanError(f"--out {path}", why, "Name another file, or move that one away.") from error


def check_profile_target(path: Path) -> None:
    """The same for a measured profile, which may take the place of another measured one only.

    Raises:
        PlanError: as `check_target`.
    """
    from planner.hardware import load_profile

    if is_new(path):
        return
    try:
        measured = load_profile(str(path.absolute())).measured
    except PlanError:
        measured = None
    if measured is None:
        why = "holds something that `plan measure` did not write, and is not overwritten."
        raise PlanError(f"--out {path}", why, "Name another file, or move that one away.")


def is_new(path: Path) -> bool:
    """Whether nothing is there yet, in a folder that is.

    Raises:
        PlanError: there is no such folder, or something other than a file is there.
    """
    asked = f"--out {path}"
    if str(path) == "-":
        raise PlanError(asked, "is no file name here.", "--json prints the plan, and YAML readers read JSON.")
    try:
        if not path.parent.is_dir():
            if path.parent.exists():
                raise PlanError(asked, f"{path.parent} is no folder.", "Name a file in a folder.")
            existing = path.parent.parent
            folders = [each.name for each in existing.iterdir() if each.is_dir()] if existing.is_dir() else []
            nearest = did_you_mean(path.parent.name, folders) or f"mkdir -p {path.parent} makes it."
            raise PlanError(asked, f"there is no folder {path.parent}.", nearest)
        if path.is_dir():
            raise PlanError(asked, "is a folder.", f"Name a file, such as {path / 'plan.yaml'}.")
        if not path.exists():
            return True
        if not path.is_file():
            raise PlanError(asked, "is not an ordinary file.", "--json prints the plan.")
    except OSError as error:
        raise PlanError(asked, f"cannot be looked at: {error.strerror}.") from error
    return False


def write_plan(plan: Plan, path: Path) -> None:
    """Write the plan file, whole or not at all.

    Raises:
        PlanError: it may not be written there, or the disk does not take it.
    """
    check_target(path)
    write_whole(path, plan.to_yaml())


def write_whole(path: Path, text: str) -> None:
    """Write a text file, whole or not at all.

    Raises:
        PlanError: the disk does not take it.
    """
    place = path.resolve()  # through a link, the file that it names is replaced and the link stays
    half = place.with_name(f".{place.name}.{os.getpid()}.tmp")
    try:
        try:
            with half.open("x", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            half.replace(place)
        finally:
            half.unlink(missing_ok=True)
    except OSError as error:
        raise PlanError(f"--out {path}", f"cannot be written: {error.strerror or error}.") from error
