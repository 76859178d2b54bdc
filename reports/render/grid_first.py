"""For reports/validation.md: what the first running of the grid said, and what constants rest on that came of it."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from planner.markdown import percent, table
from planner.measurements import Record, read_failures, read_records
from planner.plan_file import load_plan
from planner.units import GIB, format_bytes
from planner.validation_page import spread_cells
from planner.validation_report import spreads
from reports.render.grid_records import FIRST, LONGER, RAN, RECORDS, came_of, found, planned_again, record_of

GAPS = "memory that lay unused between tensors was more than the bound leaves for it"


def section() -> str:
    """How it went, which runs that failed then end now, and whose errors were not compared then."""
    records, failures = found(FIRST)
    every = len(read_records(FIRST)), len(read_failures(FIRST))
    names = [failure.name for failure in failures]
    held = [record_of(name) for name in names if came_of(name) == RAN]
    ended = [record for record in held if record.held_to_bound and record.over <= 0]
    median, largest = spread_cells(spreads(records)["allocated"])[1:4:2]
    over = [sum(record.host_over > 0 for record in of) for of in (records, found()[0])]
    told = (
        "The same runs, but for those of models that are new, had been made once before, with fewer steps, all of "
        "them held to their bound; plans, records and failures lie in `reports/validation/grid-first/`. Of "
        f"{sum(every)} runs {every[0]} left a record and {every[1]} none, {every[1] - len(names)} of these of "
        f"sequences made to be too long. {len(names)} that were to end did not: {GAPS}. Since then the trainer puts "
        "weights in four bits into one storage, and makes a product's output before the wide matrix. The bound is what "
        f"it was in {_same_bound(names)} of these {len(names)}, and {len(ended)} end now on the card, within it. Where "
        f"at least two layers had run, expected peaks were off by {median} in the middle and {largest} at most. More "
        f"than the bound of host memory was taken in {over[0]} runs then and in {over[1]} now. {_eight_bit(records)} "
        f"What the process took beside the plan's terms: {_processes(records)}."
    )
    rows = [(name, GAPS, *_now(name)) for name in names]
    parts = [f"## The first running\n\n{told}\n", table(("failed then", "why", "now", "of the bound left>"), rows)]
    return "\n".join([*parts, _other_layers()]).strip("\n")


def _same_bound(names: Sequence[str]) -> int:
    """How many of these were planned again with the bound that they had."""
    plans = ([load_plan(folder / "plans" / f"{name}.yaml") for folder in (FIRST, RECORDS)] for name in names)
    return sum(then.memory.gpu.peak_bytes.high == now.memory.gpu.peak_bytes.high for then, now in plans)


def _now(name: str) -> tuple[str, str]:
    """What became of a run in the second running, and what it left of its bound."""
    if came_of(name) != RAN:
        return came_of(name), ""
    record = record_of(name)
    since = "in its last steps" if record.before_held else "from the first step on"
    how = f"{came_of(name)}, held to its bound {since}" if record.held_to_bound else came_of(name)
    left = format_bytes(abs(record.over))
    return how, left if record.over <= 0 else f"−{left}"


def _other_layers() -> str:
    """Of runs that had too few layers for the peak, their errors then and with the layers of the second running."""
    rows = [
        (then.name, _ran(then), percent(then.error), _ran(now), percent(now.error))
        for then in read_records(FIRST)
        if then.name not in LONGER and came_of(then.name) == RAN
        for now in (record_of(then.name),)
        if then.content["layers_run"] != now.content["layers_run"]
    ]
    told = (
        "Runs of one layer, and one that met no layer of the kind that has the peak, were not compared then. They were "
        "made again with more layers; where the error stays, it was not for want of a layer:"
    )
    heads = ("run", "layers then>", "error>", "layers now>", "error>")
    return f"{told}\n\n{table(heads, rows)}" if rows else ""


def _ran(record: Record) -> str:
    return f"{record.content['layers_run']} of {record.content['layers']}"


def _eight_bit(records: Sequence[Record]) -> str:
    """What the update of one matrix with eight-bit moments took, where constants may be fitted: in microseconds."""
    found = []
    for record in records:
        on = {choice["id"] for choice in record.content["plan"]["choices"]}
        if "adamw_8bit" in on and record.content["set"] == "calibration" and record.alone:
            matrices = record.content["plan"]["time"]["phases"]["optimizer"]["kernels"]  # one for each, in these plans
            found.append(1e6 * record.content["step_seconds"]["phases"]["optimizer"] / matrices)
    told = " and ".join(f"{each:.0f}" for each in sorted(found))
    return f"The update of a matrix whose moments are in eight bits took {told} µs in those that constants rest on."


def _processes(records: Sequence[Record]) -> str:
    """The process's own memory, by executor, in runs that constants may be fitted to: least, middle and most."""
    told = []
    for executor in ("resident", "streamed"):
        own = sorted(
            record.host_measured - (plan.memory.host.peak_bytes - plan.memory.host.terms["runtime/process"])
            for record in records
            if record.content["set"] == "calibration" and record.content["executor"] == executor
            for plan in (planned_again(record.name, FIRST),)
        )
        least, middle, most = (f"{size / GIB:.2f}" for size in (own[0], statistics.median(own), own[-1]))
        told.append(f"{least} to {most} GiB, {middle} in the middle of {len(own)} {executor} runs")
    return " and ".join(told)
