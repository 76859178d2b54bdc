"""Predicted beside measured, as a table for people."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from planner.ledger import GROUPS, Phase
from planner.plan import Plan
from planner.units import format_bytes
from trainer.measure import Recorder
from trainer.record import predicted_groups


def memory_table(plan: Plan, recorder: Recorder, terms: dict[str, int]) -> Table:
    """Memory by phase and by group of terms.

    A group's prediction is that of the phase in which it is largest; groups that pass within a step have no
    measured bytes of their own.
    """
    table = Table(title=f"Memory, {plan.model.id}, {plan.total_tokens:,} tokens on {plan.gpu.name}")
    table.add_column("")
    for column in ("predicted", "measured", "difference"):
        table.add_column(column, justify="right")
    for phase in Phase:
        predicted = sum(plan.memory.gpu.phases.get(phase, {}).values())
        _row(table, f"phase {phase}", predicted or None, recorder.phases.get(phase, {}).get("allocated_bytes"))
    table.add_section()
    groups = predicted_groups(plan)
    for group in GROUPS:
        _row(table, f"group {group}", groups.get(group), terms.get(group))
    table.add_section()
    peak = plan.memory.gpu.peak_bytes
    _row(table, "peak, expected against allocated", peak.expected, recorder.peak("allocated_bytes"))
    _row(table, "peak, high against reserved", peak.high, recorder.peak("reserved_bytes"))
    _row(table, "pinned host memory", plan.memory.host.pinned_bytes, recorder.pinned_bytes)
    return table


def _row(table: Table, name: str, predicted: int | None, measured: int | None) -> None:
    if not predicted and not measured:
        return
    difference = f"{100 * (measured / predicted - 1):+.1f} %" if predicted and measured else "–"
    table.add_row(name, _shown(predicted), _shown(measured), difference)


def _shown(size: int | None) -> str:
    return "–" if size is None else format_bytes(size)


def _phase_times(record: dict[str, Any]) -> str | None:
    """Seconds of each phase beside the plan's, in a sentence; None where nothing was timed."""
    measured, whole = record["step_seconds"].get("phases"), record["layers_run"] == record["layers"]
    if not measured:
        return None  # of a record from before phases were timed
    planned = {name: phase["seconds"] for name, phase in record["plan"]["time"]["phases"].items()} if whole else {}
    parts = [
        f"{name.replace('_', ' ')} {_seconds(seconds)}"
        + (f" (plan {_seconds(planned[name])})" if planned.get(name) is not None else "")
        for name, seconds in measured.items()
    ]
    return f"Of it: {', '.join(parts)}."


def _seconds(value: float) -> str:
    return f"{value:,.3f} s" if value < 10 else f"{value:,.1f} s"


def closing_lines(record: dict[str, Any]) -> list[str]:
    """What came of a run, in sentences: time and held-out loss."""
    lines = []
    median, estimate = record["step_seconds"]["median"], record["predicted"]["step_seconds"]
    if median is not None:
        planned = f"; the plan said {estimate:,.2f} s" if estimate is not None else ""
        lines.append(f"Median step: {median:,.2f} s{planned}.")
        if phases := _phase_times(record):
            lines.append(phases)
    before, after = record["evaluation"]["before"], record["evaluation"]["after"]
    if before and after:
        change = 100 * (after["perplexity"] / before["perplexity"] - 1)
        lines.append(
            f"Held-out perplexity: {before['perplexity']:.3f} before, {after['perplexity']:.3f} after "
            f"({change:+.1f} %), on {after['tokens']:,} tokens of {after['rows']} rows."
        )
    return lines
