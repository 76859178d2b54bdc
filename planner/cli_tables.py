"""Subcommands that compare: every tier on a card, every card with every model, what a longer sequence costs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from planner.cli_lists import as_json
from planner.cli_output import plain_table, print_object, print_table, write_whole
from planner.cli_request import LIMITS, all_of, once, planning_options, read_request
from planner.errors import PlanError, raise_all
from planner.units import format_bytes, format_seconds

if TYPE_CHECKING:
    from planner.matrix import MatrixRow
    from planner.pareto import Pareto
    from planner.planning import Request
    from planner.tier_table import TierTable

FITS, DOES_NOT_FIT, CANNOT_TELL = 0, 1, 2
Answer = TypeVar("Answer")


@click.command(short_help="Plan all eleven tiers on one card.")
@planning_options("gpu", "model", *LIMITS)
@as_json
def tiers(json_: bool, **options: Any) -> int:
    """Plan all eleven tiers: which fit, with which settings, and what the others lack.

    \b
    plan tiers --gpu rtx2060s
    plan tiers --gpu rtx4090 --model llama-3.1-8b --host-ram 64GiB
    plan tiers --gpu rtx3090 --without nf4_weights --json

    --json prints one object: gpu, model, gpu_budget_bytes, host_budget_bytes, limit_seconds, and tiers, a list in
    order. Each has tier, context, target, total_tokens, rank, fits, optimizations, knobs, gpu_high_bytes, host_bytes,
    disk_bytes, step_seconds (null where the card's rates are unknown), lacks (card, host and disk in bytes, seconds;
    empty where it fits) and reason, the same in words. Where a tier does not fit, its figures are of the settings that
    come nearest.

    Exit codes: 0 a tier fits, 1 none does, 2 bad input or cannot tell.
    """
    from planner.tier_table import tier_table

    table = _asked("tiers", options, tier_table)
    if json_:
        print_object(table.document())
    else:
        _print_tiers(table)
    return FITS if any(row.fits for row in table.tiers) else DOES_NOT_FIT


def _asked(command: str, options: dict[str, Any], answer: Callable[[Request], Answer]) -> Answer:
    """The answer to a request, with every mistake in it reported together."""
    errors: list[PlanError] = []
    if options["gpu"] is None:
        nearest = "Add --gpu ID (`plan gpus` lists them), --gpu local or --gpu cpu."
        raise PlanError(f"plan {command}", "names no card.", nearest)
    request = read_request(options, errors)
    try:
        found = answer(request)
    except PlanError as error:
        raise_all([*errors, *all_of(error)])
        raise AssertionError("unreachable") from error
    raise_all(errors)
    return found


def _print_tiers(table: TierTable) -> None:
    from planner.tier_table import in_every_row

    shared = in_every_row(table)
    shown = plain_table(
        "tier", "tokens", "rank", "card", "host", "step", "settings, or what is lacking",
        right=("tier", "tokens", "rank", "card", "host", "step"),
    )  # fmt: skip
    for row in table.tiers:
        own = [name for name in row.optimizations if name not in shared]
        told = ", ".join(own) or "no others" if row.fits else row.reason
        told += f" ({format_bytes(row.disk_bytes)} of disk)" if row.disk_bytes else ""
        shown.add_row(
            str(row.tier),
            f"{row.total_tokens:,}",
            str(row.rank),
            format_bytes(row.gpu_high_bytes),
            format_bytes(row.host_bytes),
            _step(row.step_seconds),
            told,
            style="" if row.fits else "dim",
        )
    fitting = [row for row in table.tiers if row.fits]
    best = f"the highest that fits is tier {fitting[-1].tier}" if fitting else "no tier fits"
    print_table(
        shown,
        f"{table.model} on {table.gpu}: {best}. card: bound on what is reserved, of "
        f"{format_bytes(table.gpu_budget_bytes)}; host: of {format_bytes(table.host_budget_bytes)}; step: estimate, "
        f"limit {format_seconds(table.limit_seconds)}. Everywhere on: {', '.join(shared)}"
        f"{_knobs_of(table)}. A tier that does not fit shows what comes nearest.",
    )


def _knobs_of(table: TierTable) -> str:
    """The knobs, without the rank, that are not the same in every row or that a reader would look for."""
    told = []
    names = {(owner, knob) for row in table.tiers for owner, knobs in row.knobs.items() for knob in knobs}
    for owner, knob in sorted(names - {("lora", "rank"), ("lora", "alpha")}):
        by_value: dict[str, list[str]] = {}
        for row in table.tiers:
            if knob in row.knobs.get(owner, {}):
                by_value.setdefault(str(row.knobs[owner][knob]), []).append(str(row.tier))
        rows = [value if len(by_value) == 1 else f"{value} (tier {', '.join(at)})" for value, at in by_value.items()]
        told.append(f"{owner}.{knob} = {' or '.join(rows)}")
    return f"; {'; '.join(told)}" if told else ""


def _step(seconds: float | None) -> str:
    return "unknown" if seconds is None else format_seconds(seconds)


@click.command(short_help="Plan every card with every model.")
@click.option("--gpu", multiple=True, metavar="ID", help="Only this card; repeatable. [all of `plan gpus`]")
@click.option("--model", multiple=True, metavar="ID", help="Only this model; repeatable. [all of `plan models`]")
@planning_options(*LIMITS)
@once("--out", metavar="FILE", help="Write to this file instead: .csv or .md.")
@as_json
def matrix(gpu: Sequence[str], model: Sequence[str], out: str | None, json_: bool, **options: Any) -> int:
    """Plan every card with every model: highest tier, longest sequence, memory and time.

    \b
    plan matrix --gpu rtx2060s --gpu rtx4090
    plan matrix --model phi-2 --out phi-2.md
    plan matrix --out tiers.csv

    Where no tier fits, the row is of the longest sequence that does, at rank 8. What cannot be planned stays in the
    table with its reason. --json prints one object with the key rows; each row has the columns of the CSV: gpu,
    model, fits (null where nothing can be told), tier, total_tokens, rank, longest_all_trained, gpu_high_bytes,
    gpu_budget_bytes, host_bytes, step_seconds, why.

    Exit codes: 0 something fits, 1 nothing does, 2 bad input or cannot tell.
    """
    from planner.matrix import all_cards, all_models, check
    from planner.matrix import matrix as planned
    from planner.matrix_files import check_matrix_target, written

    errors: list[PlanError] = []
    request = read_request(options, errors)
    if out is not None:
        try:
            check_matrix_target(Path(out))
        except PlanError as error:
            errors.append(error)
        if json_:
            errors.append(PlanError("--out with --json", "each says where the rows go.", "Drop one."))
    cards, shapes = tuple(dict.fromkeys(gpu)) or all_cards(), tuple(dict.fromkeys(model)) or all_models()
    try:
        check(cards, shapes, request)
    except PlanError as error:
        errors += all_of(error)
    raise_all(errors)
    with _progress(len(cards) * len(shapes)) as done:
        rows = planned(cards, shapes, request, done=done)
    if out is not None:
        write_whole(Path(out), written(rows, Path(out)))
        click.echo(f"{len(rows):,} rows written to {out}.")
    elif json_:
        print_object({"rows": [row.document() for row in rows]})
    else:
        _print_matrix(rows)
    if all(row.fits is None for row in rows):
        return CANNOT_TELL
    return FITS if any(row.fits for row in rows) else DOES_NOT_FIT


def _print_matrix(rows: Sequence[MatrixRow]) -> None:
    """The figures that an ordinary terminal has room for; files have all. What has none comes after them."""
    from planner.matrix_files import HEADS, cells, verdict

    shown = [place for place, head in enumerate(HEADS) if head not in ("rank", "of")]
    table = plain_table(*(HEADS[place] for place in shown), right=[HEADS[place] for place in shown[2:]])
    for column in table.columns[:2]:
        column.overflow = "fold"  # an id that is cut short names nothing
    for row in rows:
        if row.fits:
            told = cells(row)
            table.add_row(*(told[place] for place in shown))
    reasons = [f"{row.gpu} with {row.model}: {verdict(row)}" for row in rows if not row.fits]
    note = "card high: bound on what is reserved. longest: all trained. --out FILE.csv has all figures."
    print_table(table, "\n".join([*reasons, note]))


@contextmanager
def _progress(pairs: int) -> Iterator[Callable[[int], None]]:
    """A bar on standard error, where that is a terminal and there is something to wait for."""
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal or pairs < 20:
        yield lambda done: None
        return
    from rich.progress import Progress

    with Progress(console=console, transient=True) as bar:
        task = bar.add_task("planning", total=pairs)
        yield lambda done: bar.advance(task, done)


@contextmanager
def _settling() -> Iterator[Callable[[int, int], None]]:
    """A bar on standard error, where that is a terminal, of how many there are and how many of these are done."""
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda done, of: None
        return
    from rich.progress import Progress

    with Progress(console=console, transient=True) as bar:
        task = bar.add_task("settings", total=None)
        yield lambda done, of: bar.update(task, completed=done, total=of)


@click.command(short_help="Show what a longer sequence costs in time and host memory.")
@planning_options("gpu", "model", *LIMITS)
@as_json
def pareto(json_: bool, **options: Any) -> int:
    """Show what a longer sequence costs in time and host memory, by settings that no others beat.

    \b
    plan pareto --gpu rtx2060s
    plan pareto --gpu rtx4090 --model llama-3.1-8b --set lora.rank=16

    Each row is one choice of settings at the longest sequence that it can train. A choice is left out where another
    trains as long a sequence, in no more time for a token, with no more host memory. Every token is trained, or
    --set train.target=N are; the rank is 8, or --set lora.rank=N. What waits between the passes of streamed layers
    waits in host memory, or on the card with --set streamed.staging=card.

    --json prints one object: gpu, model, rank, target, settings (how many were compared), fitting (how many of them
    train anything), and points, the longest first. Each has total_tokens, step_seconds, seconds_per_token,
    host_bytes, gpu_high_bytes, optimizations and knobs.

    Exit codes: 0 something fits, 1 nothing does, 2 bad input or cannot tell.
    """
    from planner.pareto import pareto as front

    with _settling() as tell:
        found = _asked("pareto", options, partial(front, tell=tell))
    if json_:
        print_object(found.document())
    else:
        _print_front(found)
    return FITS if found.points else DOES_NOT_FIT


def _print_front(found: Pareto) -> None:
    from planner.optimizations import all_optimizations

    points = found.points
    shared = [name for name in all_optimizations() if points and all(name in point.optimizations for point in points)]
    table = plain_table(
        "longest", "step", "a token", "host", "card", "settings", right=("longest", "step", "a token", "host", "card")
    )
    for point in points:
        own = [name for name in point.optimizations if name not in shared]
        rows = point.knobs.get("chunked_loss", {}).get("rows")
        told = [*own, *([f"rows = {rows:,}"] if isinstance(rows, int) else [])]
        table.add_row(
            f"{point.total_tokens:,}",
            _step(point.step_seconds),
            "unknown" if point.seconds_per_token is None else f"{1000 * point.seconds_per_token:.3g} ms",
            format_bytes(point.host_bytes),
            format_bytes(point.gpu_high_bytes),
            ", ".join(told) or "no others",
        )
    trained = "every token" if found.target is None else f"{found.target:,} tokens"
    on = f" Everywhere on: {', '.join(shared)}." if shared else ""
    print_table(
        table,
        f"{found.model} on {found.gpu}, rank {found.rank}, {trained} trained: {len(points)} of {found.settings} "
        f"settings that no other beats in length, time for a token and host memory; {found.settings - found.fitting} "
        f"do not fit at any length.{on}",
    )
