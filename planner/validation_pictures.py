"""Pictures of records: predicted against measured, how far off, what was left of bounds, and phase by phase."""

from __future__ import annotations

import math
from collections.abc import Sequence

from planner import svg
from planner.measurements import Failure, Record
from planner.units import GIB

WIDTH = 860
LEFT, RIGHT = 84, 820  # where the drawn part of a picture begins and ends, across
HELD, SEEN = svg.RED, svg.BLUE


def pictures(records: Sequence[Record], failures: Sequence[Failure]) -> dict[str, str]:
    """By a word for each, every picture that the records of peaks allow."""
    of_peaks = [record for record in records if record.shows_the_peak]
    if not of_peaks:
        return {}
    found = {"measured": measured(of_peaks), "errors": errors(of_peaks)}
    if any(record.measured["reserved_bytes"] for record in of_peaks):
        found["bounds"] = bounds(of_peaks, len(failures))
    if any(record.phases for record in of_peaks):
        found["phases"] = phases(of_peaks)
    return found


def _held_out(record: Record) -> bool:
    return record.content.get("set") == "holdout"


def _key(shapes: list[str], y: float, records: Sequence[Record], x: float = LEFT) -> None:
    """What the two colours say, where both are there."""
    entries = [("held out of every fit", HELD)] if any(map(_held_out, records)) else []
    if not all(map(_held_out, records)):
        entries.append(("all others" if entries else "runs", SEEN))
    for place, (name, colour) in enumerate(entries):
        shapes += [svg.dot(x + 190 * place, y - 4, 4, "#FFFFFF", colour), svg.label(x + 190 * place + 10, y, name)]


def measured(records: Sequence[Record]) -> str:
    """Expected peak over the peak that tensors took, both axes by powers of two."""
    sizes = [size / GIB for record in records for size in (record.expected, record.allocated)]
    low, high = math.floor(math.log2(min(sizes))), math.ceil(math.log2(max(sizes)))
    high = max(high, low + 1)
    across, up = svg.Scale(low, high, LEFT, 560), svg.Scale(low, high, 526, 50)
    shapes = [svg.label(LEFT, 28, "Peak of what tensors take: planned against measured", size=15, bold=True)]
    for power in range(low, high + 1):
        shapes += [svg.line(across(power), 526, across(power), 50, svg.GREY, 0.5)]
        shapes += [svg.line(LEFT, up(power), 560, up(power), svg.GREY, 0.5)]
        shapes += [svg.label(across(power), 544, f"{2.0**power:g}", "middle", 11)]
        shapes += [svg.label(LEFT - 8, up(power) + 4, f"{2.0**power:g}", "end", 11)]
    shapes += [svg.line(across(low), up(low), across(high), up(high), svg.INK, 1)]
    for record in records:
        x, y = math.log2(record.allocated / GIB), math.log2(record.expected / GIB)
        shapes.append(svg.dot(across(x), up(y), 3.5, "#FFFFFF", HELD if _held_out(record) else SEEN))
    shapes += [svg.label(322, 566, "measured, GiB", "middle"), svg.sideways(28, 288, "planned (expected), GiB")]
    _key(shapes, 590, records)
    return svg.drawing(600, 606, f"Peaks of {len(records)} runs, planned and measured", shapes)


EDGES = (-0.1, -0.05, -0.02, -0.01, -0.005, -0.002, -0.001, 0.0, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1)
"""Edges of the columns of ``errors``; the first and the last go on without end."""


def errors(records: Sequence[Record]) -> str:
    """How many runs are how far off, too low to the left; finer columns near nothing."""
    counts = [0] * (len(EDGES) + 1)
    of_held = list(counts)
    for record in records:
        place = sum(record.error >= edge for edge in EDGES)
        counts[place] += 1
        of_held[place] += _held_out(record)
    most = max(counts)
    width = (RIGHT - LEFT) / len(counts)
    up = svg.Scale(0, most, 300, 60)
    shapes = [svg.label(LEFT, 28, "How far off the planned peak was", size=15, bold=True)]
    for place, (count, held) in enumerate(zip(counts, of_held, strict=True)):
        x = LEFT + place * width
        shapes.append(svg.box(x + 2, up(count), width - 4, 300 - up(count), svg.SKY))
        shapes.append(svg.box(x + 2, up(held), width - 4, 300 - up(held), svg.RED))
        if count:
            shapes.append(svg.label(x + width / 2, up(count) - 5, str(count), "middle", 11))
    for place, edge in enumerate(EDGES, 1):
        x = LEFT + place * width
        text = f"{100 * edge:+g}".replace("-", "−") if edge else "0"
        heavy = edge == 0
        shapes += [svg.line(x, 300, x, 56 if heavy else 306, svg.INK, 1), svg.label(x, 320, text, "middle", 11)]
    shapes += [svg.line(LEFT, 300, RIGHT, 300)]
    shapes += [
        svg.label((LEFT + RIGHT) / 2, 342, "planned over measured, less one, in %: too low on the left", "middle")
    ]
    if any(of_held):
        shapes += [svg.box(LEFT, 356, 14, 11, svg.RED), svg.label(LEFT + 22, 366, "held out of every fit")]
        shapes += [svg.box(LEFT + 190, 356, 14, 11, svg.SKY), svg.label(LEFT + 212, 366, "all others")]
    return svg.drawing(WIDTH, 380, f"Errors of {len(records)} runs", shapes)


def bounds(records: Sequence[Record], failed: int) -> str:
    """What was left of the bound when the allocator had taken most, smallest first; below the line it was too low."""
    left = sorted(
        ((-100 * record.over / record.reserved, record) for record in records if record.measured["reserved_bytes"]),
        key=lambda each: each[0],
    )
    low, high = min(-1.0, math.floor(left[0][0])), max(1.0, math.ceil(left[-1][0]))
    across, up = svg.Scale(0, len(left) - 1 or 1, LEFT + 6, RIGHT - 6), svg.Scale(low, high, 300, 56)
    shapes = [svg.label(LEFT, 28, "What was left of the bound", size=15, bold=True)]
    step = next(step for step in (1, 2, 5, 10, 20, 50, 100, 1000) if (high - low) / step <= 10)
    for tick in range(math.ceil(low / step) * step, math.floor(high) + 1, step):
        shapes += [svg.line(LEFT, up(tick), RIGHT, up(tick), svg.GREY, 0.5)]
        shapes += [svg.label(LEFT - 8, up(tick) + 4, f"{tick:+d}".replace("-", "−") if tick else "0", "end", 11)]
    shapes += [svg.line(LEFT, up(0), RIGHT, up(0), svg.INK, 1.5)]
    for place, (share, record) in enumerate(left):
        shapes.append(svg.dot(across(place), up(share), 3, "#FFFFFF", HELD if _held_out(record) else SEEN))
    told = f"{len(left)} runs, by what was left"
    told += f"; {failed} more ended without a record" if failed else ""
    shapes += [svg.label((LEFT + RIGHT) / 2, 326, told, "middle")]
    shapes += [svg.sideways(30, 178, "% of what was reserved")]
    _key(shapes, 352, records)
    return svg.drawing(WIDTH, 366, "What runs left of their bounds", shapes)


def _off(record: Record, phase: str) -> float:
    planned, found = record.phases[phase]
    return 100 * (planned - found) / max(size for _, size in record.phases.values())


def phases(records: Sequence[Record]) -> str:
    """How far off each phase was, in how much the peak of the run is: a phase far below it decides nothing."""
    names = [*dict.fromkeys(name for record in records for name in record.phases)]
    top, step = 60, 24
    bottom = top + step * len(names)
    across = svg.Scale(-10, 10, 200, RIGHT)
    shapes = [svg.label(20, 28, "Phase by phase", size=15, bold=True)]
    for tick in range(-10, 11, 2):
        heavy = tick == 0
        shapes += [
            svg.line(across(tick), top, across(tick), bottom, svg.INK if heavy else svg.GREY, 1 if heavy else 0.5)
        ]
        shapes += [svg.label(across(tick), bottom + 16, f"{tick:+d}".replace("-", "−") if tick else "0", "middle", 11)]
    for row, name in enumerate(names):
        y = top + step * row + step / 2
        shapes.append(svg.label(190, y + 4, name.replace("_", " "), "end"))
        for record in records:
            if name in record.phases:
                share = min(10.0, max(-10.0, _off(record, name)))
                shapes.append(svg.dot(across(share), y, 3, "#FFFFFF", HELD if _held_out(record) else SEEN))
    told = "planned less measured peak of a phase, in % of the run's own peak; what is further off stands at the edge"
    shapes += [svg.label((20 + RIGHT) / 2, bottom + 38, told, "middle")]
    _key(shapes, bottom + 62, records, 200)
    return svg.drawing(WIDTH, int(bottom + 76), "Errors by phase", shapes)
