"""What a report tells of time: a step and its phases, the data once through, what it costs, and the rates behind it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from planner.plan import Cost, Epoch, Plan, Stage, Time
from planner.stages import mean_seconds
from planner.units import format_rate, format_seconds

RATES = {
    "linear": "products",
    "attention": "attention",
    "memory": "memory",
    "to_host": "to the host",
    "to_device": "from the host",
    "disk": "the disk, each way",
    "launch": "kernels launched",
}
SHORT = {"attention_backward": "attn. backward"}  # what would push figures out of a line of 80 columns
BASES = {
    "measured": "measured on this machine",
    "calibrated": "share of the peak, from runs on this card",
    "assumed": "share of the peak, assumed for this card",
}

ELSEWHERE = {"disk": "assumed for any disk", "launch": "as hosts of an H100 and an H200 launch them"}
"""Where a rate that was not measured comes from, unless it is a share of the card's peak."""


def phase_told(phase: str) -> str:
    """The name of a phase as reports have it."""
    return SHORT.get(phase, phase)


def time_facts(plan: Plan) -> Iterator[tuple[str, str]]:
    """Step, speed, epoch and cost in one line each; what is not known or was not asked for has none."""
    time = plan.time
    bound, estimate = time.step_seconds.bound, time.step_seconds.estimate
    if estimate is None:
        yield "Step", f"unknown: {time.basis}"
    else:
        floor = f", never less than {format_seconds(bound)}" if bound is not None else ""
        yield (
            "Step",
            f"about {format_seconds(estimate)}{floor}; limit {format_seconds(time.limit_seconds)} ({time.basis})",
        )
        if time.step_seconds.launch_bound:
            yield "Waits for", _waits_for_host(time)
    if plan.stages:
        yield "Stages", _stages(plan.stages)
    if time.tokens_per_second is not None:
        yield "Speed", f"{_count(time.tokens_per_second)} tokens a second"
    if time.epoch is not None:
        yield "Epoch", _epoch(time.epoch)
    if time.cost is not None:
        yield "Cost", _cost(time.cost)
    if plan.gpu.measured_file is not None:
        yield "Measured", f"rates and context come from {plan.gpu.measured_file}"


def _stages(stages: Sequence[Stage]) -> str:
    told = []
    for stage in stages:
        rows = f"{stage.rows:,} rows" if stage.rows > 1 else "1 row"
        took = f", {format_seconds(stage.step_seconds)} a step" if stage.step_seconds is not None else ""
        told.append(f"{rows} of {stage.total_tokens:,} tokens{took}")
    mean = mean_seconds(stages)
    average = f"; {format_seconds(mean)} on average" if mean is not None else ""
    return f"{len(stages)} of as many steps each: {'; '.join(told)}{average}. Step and speed are of the last"


def _waits_for_host(time: Time) -> str:
    alone = time.step_seconds.on_card
    assert alone is not None, "it is launch-bound"
    return (
        f"the host, which launches kernels: the card alone would take {format_seconds(alone)}. How fast a host is "
        "differs from one to the next, and from minute to minute"
    )


def time_section(plan: Plan) -> RenderableType | None:
    """Work and time by phase, and the rates that they go by; None for a plan that has no phases in it."""
    if not plan.time.phases:
        return None
    grid = Table(box=None, padding=(0, 0, 0, 2), pad_edge=False, header_style="dim")
    grid.add_column("", no_wrap=True)
    disk = any(phase.disk_bytes for phase in plan.time.phases.values())
    plain = ("time", "TFLOP", "memory, GB", "to host, GB", "from host, GB")
    # With a column more there is no room for the unit in each of them.
    for heading in ("time", "TFLOP", "memory", "to host", "from host", "disk, all GB") if disk else plain:
        grid.add_column(heading, justify="right", no_wrap=True)
    for name, phase in plan.time.phases.items():
        moved = (phase.memory_bytes, phase.to_host_bytes, phase.to_device_bytes, *((phase.disk_bytes,) if disk else ()))
        amounts = [size / 1e9 for size in moved]
        time = "unknown" if phase.seconds is None else format_seconds(phase.seconds)
        grid.add_row(phase_told(name), time, *map(_amount, (phase.flops / 1e12, *amounts)))
    rates = Table.grid(padding=(0, 2))
    for _ in range(3):
        rates.add_column(no_wrap=True)
    for kind, rate in plan.time.rates.items():
        name, shown = RATES.get(kind, kind), format_rate(rate.per_second, rate.unit)
        if kind == "launch":  # kernels have no decimal prefix
            shown = f"{rate.per_second:,.0f} a second"
        known = rate.basis == "measured" or kind not in ELSEWHERE
        basis = BASES[rate.basis] if known else ELSEWHERE[kind]
        rates.add_row(name, Text(shown, justify="right"), Text(basis, style="dim"))
    return Group(grid, Text(), rates) if plan.time.rates else grid


def _epoch(epoch: Epoch) -> str:
    took = "of unknown length" if epoch.hours is None else f"about {format_seconds(3600 * epoch.hours)}"
    what = f"{epoch.documents:,} documents, {epoch.bytes / 1e6:,.1f} MB, {epoch.tokens:,} tokens ({epoch.basis})"
    kept = f"; {epoch.validation_documents:,} documents are kept to judge by" if epoch.validation_documents else ""
    return f"{took}, {epoch.steps:,} steps: {what}{kept}"


def _cost(cost: Cost) -> str:
    parts = []
    per = [("a step", cost.step), *([("an epoch", cost.epoch)] if cost.epoch is not None else [])]

    def told(values: list[tuple[str, float | None]], unit: str = "") -> str:
        return " and ".join(f"{_money(value)}{unit} {what}" for what, value in values if value is not None)

    def of(attribute: str) -> list[tuple[str, float | None]]:
        return [(what, getattr(each, attribute)) for what, each in per]

    if cost.price_per_hour is not None and (card := told(of("card_cost"))):
        parts.append(f"{card} at {cost.price_per_hour:g} an hour")
    if energy := told(of("kwh_at_most"), " kWh"):
        price = told(of("power_cost_at_most"))
        at = f", which is {price} at {cost.power_price_per_kwh:g} a kWh" if price else ""
        parts.append(f"at most {energy}{at}")
    return f"{'; '.join([*parts, ''])}{cost.basis}" if parts else cost.basis


def _money(value: float) -> str:
    """Two decimals, or three digits of what is less than a tenth."""
    digits = 2 if value >= 0.1 or value == 0 else 2 - math.floor(math.log10(value))
    return f"{value:,.{digits}f}"


def _amount(value: float) -> str:
    return "–" if value == 0 else "<0.01" if value < 0.005 else f"{value:,.2f}" if value < 100 else f"{value:,.0f}"


def _count(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"
