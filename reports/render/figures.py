"""The two pictures, drawn from formulas and records."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from planner import svg
from planner.calibration import calibration
from planner.compose import Configuration, compose
from planner.hardware import load_profile
from planner.ledger import Device
from planner.longest import FINEST, LONGEST
from planner.model import load_model
from planner.optimizations.base import Situation
from planner.plan import Plan
from planner.planning import Request, make_plan
from planner.units import GIB, format_bytes
from reports.render.records import Record, on_cards, records

CARD, MODEL = "rtx2060s", "phi-2"
POINTS = 512  # of a curve, at most; a finer one shows nothing more
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


def _configuration(plan: Plan) -> Configuration:
    knobs: dict[str, dict[str, Any]] = {
        choice.id: {name: value for name, value in choice.knobs.items() if value is not None} for choice in plan.choices
    }
    situation = Situation(load_profile(CARD), load_model(MODEL), plan.memory.host.budget_bytes)
    return compose(list(knobs), knobs, situation)


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
    budget, longest = plan.memory.gpu.budget_bytes, longest_on_card(plan)
    most = -(-(longest + 1) // 8192) * 8192
    step = max(256, most // POINTS)
    totals: Any = np.arange(1, most // step + 1) * step
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
    shapes.append(_bound(totals, below, across, up))
    shapes += [svg.line(62, 366, 590, 366), svg.line(62, 366, 62, 46)]
    shapes += [svg.line(62, up(budget / GIB), 590, up(budget / GIB), svg.RED, 2.5)]
    shapes += [svg.label(70, up(budget / GIB) - 7, f"budget: {format_bytes(budget)}", bold=True)]
    shapes += [svg.line(across(longest), up(budget / GIB), across(longest), 366, svg.INK, 1, "2 3")]
    shapes += [svg.dot(across(longest), up(budget / GIB), 4.5, "#FFFFFF", svg.RED)]
    shapes += [svg.dot(across(plan.total_tokens), up(plan.memory.gpu.peak_bytes.high / GIB), 4.5, svg.INK, svg.INK)]
    shapes += _legend(plan, entries, longest)
    told = f"{MODEL} on {plan.gpu.name}: the card holds {longest:,} tokens with these settings"
    return svg.drawing(900, 420, told, shapes)


def _apart(most: int) -> int:
    """Tokens between two ticks: a power of two that leaves no more than eight of them."""
    return next(step for power in range(13, 30) if most <= 8 * (step := 1 << power))


def _high(peak: Any) -> Any:
    """The bound on what is reserved, given the expected peak in bytes."""
    return peak + calibration().reserve_bytes(peak, "gpu")


def longest_on_card(plan: Plan) -> int:
    """The longest sequence whose bound is within the budget with the plan's own settings, in steps of ``FINEST``."""
    totals = np.arange(1, LONGEST // FINEST + 1) * FINEST
    high = _high(sum(_peaks(_configuration(plan), plan, totals).values()))
    within = high <= plan.memory.gpu.budget_bytes
    assert not within[-1], "where it ends is beyond what is looked at"
    return int(totals[within].max())


def _bound(totals: Any, expected: Any, across: svg.Scale, up: svg.Scale) -> str:
    """The bound on what is reserved."""
    high = _high((expected * GIB).astype(np.int64)) / GIB
    return svg.path([(across(x), up(y)) for x, y in zip(totals, high, strict=True) if y <= 8], svg.INK, 2)


def _host(plan: Plan) -> str:
    return f"{plan.memory.host.budget_bytes // GIB} GiB"


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
    shapes += [svg.dot(left + 8, top + 40, 4.5, "#FFFFFF", svg.RED)]
    shapes += [svg.label(left + 26, top + 44, f"all that the card holds: {longest:,}")]
    shapes += [svg.dot(left + 8, top + 18, 4.5, svg.INK, svg.INK)]
    shapes += [svg.label(left + 26, top + 22, f"planned with {_host(plan)} host RAM: {plan.total_tokens:,}")]
    note = (
        f"The plan's settings: LoRA rank {plan.lora_rank},",
        f"{plan.target:,} tokens trained.",
        "Computed from the planner's formulas;",
        "not measured on this card.",
    )
    return shapes + [svg.label(left, top + 260 + 17 * row, text, size=11) for row, text in enumerate(note)]


SHARES = 644, 984  # where the panel of shares begins and ends, across


def _told(record: Record) -> tuple[int, int, int]:
    """What is shown relative to the predicted peak: allocated, reserved, and the bound."""
    return record.allocated, record.reserved, record.predicted["high_bytes"]


def predicted_measured() -> str:
    """Every measured run: how large it was, and where the peaks lay relative to the prediction."""
    found = on_cards(records())
    top, step = 74, 19
    bottom = top + step * len(found)
    most = max(record.predicted["high_bytes"] for record in found) / GIB
    size = svg.Scale(0, float(np.ceil(most / 4) * 4), 352, 602)
    shares = [100 * (value / record.predicted["expected_bytes"] - 1) for record in found for value in _told(record)]
    low, high = (2 * float(rounded(edge / 2)) for rounded, edge in ((np.floor, min(shares)), (np.ceil, max(shares))))
    share = svg.Scale(low, high, *SHARES)
    shapes = [svg.label(20, 26, "Predicted against measured memory on the card", size=15, bold=True)]
    shapes += [
        svg.label(477, 50, "peak of allocated memory, GiB", "middle"),
        svg.label(814, 50, "relative to the predicted peak, %", "middle"),
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
        relative = [share(100 * (value / expected - 1)) for value in _told(record)]
        shapes += [svg.label(340, y + 4, record.case, "end", 11)]
        shapes += [svg.box(size(0), y - 5, size(record.allocated / GIB) - size(0), 10, svg.SKY)]
        shapes += [svg.line(size(expected / GIB), y - 8, size(expected / GIB), y + 8, svg.INK, 2)]
        shapes += [svg.line(relative[2], y - 7, relative[2], y + 7, svg.RED, 3)]
        shapes += [svg.dot(relative[1], y, 4, "#FFFFFF", svg.BLUE), svg.dot(relative[0], y, 4, svg.SKY, svg.BLUE)]
    y = bottom + 40
    shapes += [svg.box(352, y - 10, 22, 10, svg.SKY), svg.label(382, y, "allocated, measured")]
    shapes += [svg.line(524, y - 12, 524, y + 3, svg.INK, 2), svg.label(534, y, "predicted")]
    shapes += [svg.dot(652, y - 4, 4, svg.SKY, svg.BLUE), svg.label(664, y, "allocated")]
    shapes += [svg.dot(756, y - 4, 4, "#FFFFFF", svg.BLUE), svg.label(768, y, "reserved")]
    shapes += [svg.line(860, y - 11, 860, y + 3, svg.RED, 3), svg.label(872, y, "bound (high)")]
    return svg.drawing(1024, int(y + 20), f"{len(found)} runs, predicted and measured", shapes)
