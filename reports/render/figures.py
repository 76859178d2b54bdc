"""The two pictures, drawn from formulas and records."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from planner.calibration import calibration
from planner.compose import Configuration, compose
from planner.hardware import load_profile
from planner.ledger import Device
from planner.model import load_model
from planner.optimizations.base import Situation
from planner.plan import Plan
from planner.planning import Request, make_plan
from planner.units import format_bytes
from reports.render import svg
from reports.render.markdown import GIB
from reports.render.records import on_cards, records

CARD, MODEL, OFFLOAD = "rtx2060s", "phi-2", "checkpoint_offload"
STACK = (
    ("weights", ("weights",), svg.BLUE),
    ("adapters, gradients, optimiser", ("adapters", "gradients", "optimizer"), svg.SKY),
    ("activations", ("activations",), svg.GREEN),
    ("attention", ("attention",), svg.YELLOW),
    ("logits and loss", ("loss",), svg.PURPLE),
    ("buffers of copies, workspace", ("buffers", "runtime"), svg.ORANGE),
)


@cache
def reference_plan() -> Plan:
    """What `plan --gpu rtx2060s` plans."""
    return make_plan(Request(gpu=CARD, model=MODEL))


def _configuration(plan: Plan, without: str = "") -> Configuration:
    knobs: dict[str, dict[str, Any]] = {
        choice.id: {name: value for name, value in choice.knobs.items() if value is not None} for choice in plan.choices
    }
    situation = Situation(load_profile(CARD), load_model(MODEL), plan.memory.host.budget_bytes)
    return compose([name for name in knobs if name != without], knobs, situation)


def _peaks(configuration: Configuration, plan: Plan, totals: Any) -> dict[str, Any]:
    """Bytes of each group of terms on the card, at each length in the phase that is highest there."""
    capability = load_profile(CARD).compute_capability
    workspace = calibration().workspace_bytes(capability)
    targets, rank = np.minimum(plan.target, totals), plan.lora_rank
    letters = configuration.at(batch=1, total=totals, target=targets, workspace=workspace, rank=rank)
    by_phase = configuration.ledger.by_phase(letters, (Device.GPU,))
    groups = sorted({name.partition("/")[0] for terms in by_phase.values() for name in terms})
    sizes = np.zeros((len(by_phase), len(groups), len(totals)), dtype=np.int64)
    for phase, terms in enumerate(by_phase.values()):
        for name, size in terms.items():
            sizes[phase, groups.index(name.partition("/")[0])] += size
    highest = sizes.sum(axis=1).argmax(axis=0)
    return {name: sizes[highest, place, np.arange(len(totals))] for place, name in enumerate(groups)}


def memory_by_context() -> str:
    """Memory of the reference card, stacked by what takes it, against the length of a sequence."""
    plan = reference_plan()
    budget, longest = plan.memory.gpu.budget_bytes, _longest(plan)
    most = -(-(longest + 1) // 8192) * 8192
    totals: Any = np.arange(1, most // 256 + 1) * 256
    peaks = _peaks(_configuration(plan), plan, totals)
    across, up = svg.Scale(0, most, 62, 590), svg.Scale(0, 8, 366, 46)
    title = f"Memory on the card against context: {MODEL} on the 8 GB {plan.gpu.name.removeprefix('NVIDIA GeForce ')}"
    shapes = [svg.label(62, 24, title, size=15, bold=True)]
    for tick in range(0, 9, 2):
        shapes += [svg.line(62, up(tick), 590, up(tick), svg.GREY, 0.5), svg.label(54, up(tick) + 4, str(tick), "end")]
    for tick in range(0, most + 1, _apart(most)):
        shapes += [svg.line(across(tick), 366, across(tick), 371)]
        shapes += [svg.label(across(tick), 386, f"{tick:,}", "middle", 11)]
    shapes += [svg.sideways(22, 206, "GiB"), svg.label(326, 408, "tokens in one sequence", "middle")]
    below = np.zeros(len(totals))
    entries = []
    for name, groups, colour in STACK:
        above = below + sum(peaks[group] for group in groups if group in peaks) / GIB
        edge = [(across(x), up(y)) for x, y in zip(totals, above, strict=True)]
        back = [(across(x), up(y)) for x, y in zip(totals[::-1], below[::-1], strict=True)]
        shapes.append(svg.area([*edge, *back], colour))
        entries.append((name, colour))
        below = above
    assert set(peaks) <= {group for _, groups, _ in STACK for group in groups}, "a group has no colour"
    shapes += _bounds(plan, totals, below, across, up)
    shapes += [svg.line(62, 366, 590, 366), svg.line(62, 366, 62, 46)]
    shapes += [svg.line(62, up(budget / GIB), 590, up(budget / GIB), svg.RED, 2.5)]
    shapes += [svg.label(70, up(budget / GIB) - 7, f"budget: {format_bytes(budget)}", bold=True)]
    shapes += [svg.line(across(longest), up(budget / GIB), across(longest), 366, svg.INK, 1, "2 3")]
    shapes += [svg.dot(across(longest), up(budget / GIB), 4.5, "#FFFFFF", svg.RED)]
    shapes += _legend(plan, entries, longest)
    return svg.drawing(900, 420, f"{MODEL} on {plan.gpu.name}: at most {longest:,} tokens with these settings", shapes)


def _apart(most: int) -> int:
    """Tokens between two ticks: a power of two that leaves no more than eight of them."""
    return next(step for power in range(13, 30) if most <= 8 * (step := 1 << power))


def _high(peak: Any) -> Any:
    """The bound on what is reserved, given the expected peak in bytes."""
    return peak + calibration().reserve_bytes(peak, "gpu")


def _longest(plan: Plan) -> int:
    """The longest sequence whose bound is within the budget with the plan's own settings, in steps of 64."""
    totals = np.arange(1, 2**14) * 64
    high = _high(sum(_peaks(_configuration(plan), plan, totals).values()))
    return int(totals[high <= plan.memory.gpu.budget_bytes].max())


def _bounds(plan: Plan, totals: Any, expected: Any, across: svg.Scale, up: svg.Scale) -> list[str]:
    """The bound of the plan, and what the bound would be with the checkpoints on the card."""
    shapes = []
    curves = [(expected * GIB, "")]
    if OFFLOAD in {choice.id for choice in plan.choices}:
        peaks = _peaks(_configuration(plan, OFFLOAD), plan, totals)
        curves.append((sum(peaks.values()), "6 4"))
    for peak, dash in curves:
        sizes = np.asarray(peak).astype(np.int64)
        points = [(across(x), up(y)) for x, y in zip(totals, _high(sizes) / GIB, strict=True) if y <= 8]
        shapes.append(svg.path(points, svg.INK, 2, dash))
    return shapes


def _legend(plan: Plan, entries: list[tuple[str, str]], longest: int) -> list[str]:
    left, top = 614, 62
    shapes = []
    for place, (name, colour) in enumerate(reversed(entries)):
        y = top + 82 + 22 * place
        shapes += [svg.box(left, y - 11, 16, 13, colour), svg.label(left + 26, y, name)]
    shapes += [
        svg.line(left, top - 4, left + 16, top - 4, svg.INK, 2),
        svg.label(left + 26, top, "bound on what is reserved"),
    ]
    if OFFLOAD in {choice.id for choice in plan.choices}:
        shapes += [svg.line(left, top + 18, left + 16, top + 18, svg.INK, 2, "6 4")]
        shapes += [svg.label(left + 26, top + 22, "the same, checkpoints on the card")]
    shapes += [svg.dot(left + 8, top + 40, 4.5, "#FFFFFF", svg.RED)]
    shapes += [svg.label(left + 26, top + 44, f"longest with these settings: {longest:,}")]
    note = (
        f"LoRA rank {plan.lora_rank}, {plan.target:,} tokens trained.",
        "Computed from the planner's formulas;",
        "not measured on this card.",
    )
    return shapes + [svg.label(left, top + 260 + 17 * row, text, size=11) for row, text in enumerate(note)]


def predicted_measured() -> str:
    """Every measured run: how large it was, and where the peaks lay relative to the prediction."""
    found = on_cards(records())
    top, step = 74, 19
    bottom = top + step * len(found)
    most = max(record.predicted["high_bytes"] for record in found) / GIB
    size = svg.Scale(0, float(np.ceil(most / 4) * 4), 228, 478)
    spread = max(record.predicted["high_bytes"] / record.predicted["expected_bytes"] for record in found) - 1
    share = svg.Scale(-2, float(np.ceil(100 * spread / 2) * 2), 520, 860)
    shapes = [svg.label(20, 26, "Predicted against measured memory on the card", size=15, bold=True)]
    shapes += [
        svg.label(353, 50, "peak of allocated memory, GiB", "middle"),
        svg.label(690, 50, "relative to the predicted peak, %", "middle"),
    ]
    for tick in np.arange(size.low, size.high + 1, 4).tolist():
        shapes += [
            svg.line(size(tick), top - 4, size(tick), bottom, svg.GREY, 0.5),
            svg.label(size(tick), bottom + 16, f"{tick:g}", "middle", 11),
        ]
    for tick in np.arange(share.low, share.high + 1, 2).tolist():
        heavy = tick == 0
        shapes += [
            svg.line(share(tick), top - 4, share(tick), bottom, svg.INK if heavy else svg.GREY, 1 if heavy else 0.5)
        ]
        shapes += [svg.label(share(tick), bottom + 16, f"{tick:+g}".replace("-", "−") if tick else "0", "middle", 11)]
    for row, record in enumerate(found):
        y, expected = top + step * row + step / 2, record.predicted["expected_bytes"]
        relative = [
            share(100 * (value / expected - 1))
            for value in (record.allocated, record.reserved, record.predicted["high_bytes"])
        ]
        shapes += [svg.label(216, y + 4, record.case, "end", 11)]
        shapes += [svg.box(size(0), y - 5, size(record.allocated / GIB) - size(0), 10, svg.SKY)]
        shapes += [svg.line(size(expected / GIB), y - 8, size(expected / GIB), y + 8, svg.INK, 2)]
        shapes += [svg.line(relative[2], y - 7, relative[2], y + 7, svg.RED, 3)]
        shapes += [svg.dot(relative[1], y, 4, "#FFFFFF", svg.BLUE), svg.dot(relative[0], y, 4, svg.SKY, svg.BLUE)]
    y = bottom + 40
    shapes += [svg.box(228, y - 10, 22, 10, svg.SKY), svg.label(258, y, "allocated, measured")]
    shapes += [svg.line(400, y - 12, 400, y + 3, svg.INK, 2), svg.label(410, y, "predicted")]
    shapes += [svg.dot(528, y - 4, 4, svg.SKY, svg.BLUE), svg.label(540, y, "allocated")]
    shapes += [svg.dot(632, y - 4, 4, "#FFFFFF", svg.BLUE), svg.label(644, y, "reserved")]
    shapes += [svg.line(736, y - 11, 736, y + 3, svg.RED, 3), svg.label(748, y, "bound (high)")]
    return svg.drawing(900, int(y + 20), f"{len(found)} runs, predicted and measured", shapes)
