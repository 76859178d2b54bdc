"""An explanation, told to a person."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from planner.explain import Explanation
from planner.explain_formulas import Formula
from planner.report import hanging, print_parts, section
from planner.units import KIB, format_bytes


def print_explanation(found: Explanation, console: Console) -> None:
    """Print it."""
    print_parts(console, _parts(found))


def _parts(found: Explanation) -> Iterator[RenderableType]:
    yield Text.assemble((found.name, "bold"), f"  {found.kind}", style="")
    if found.title:
        yield Text(found.title)
    for paragraph in found.text.splitlines():
        yield Text()
        yield Text(paragraph)
    yield Text()
    yield hanging((Text(name, style="bold"), told) for name, told in found.facts)
    for formula in found.formulas:
        yield section(formula.name, hanging((Text(name, style="dim"), told) for name, told in _lines(formula)))
    if found.letters:
        yield section("Letters", _letters(found))
    yield Text()
    yield Text(f"Values: {found.run}.", style="dim")


def _lines(formula: Formula) -> Iterator[tuple[str, str]]:
    yield "meaning", formula.meaning
    yield "formula", f"{formula.text}  {formula.unit}"
    yield "LaTeX", formula.latex
    yield "numbers", f"{formula.numbers} = {_result(formula)}"
    if formula.without:
        yield "without it", formula.without
    yield (
        "phases" if not formula.place else "alive",
        ", ".join([*([formula.place] if formula.place else []), *formula.alive]),
    )
    yield "basis", formula.basis
    yield "source", formula.source


def _result(formula: Formula) -> str:
    exact = f"{formula.result:,} {formula.unit}"
    if formula.unit == "FLOP":
        return f"{exact}, {formula.result / 1e12:,.3g} TFLOP"
    return f"{exact}, {format_bytes(formula.result)}" if formula.result >= KIB else exact


def _letters(found: Explanation) -> RenderableType:
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column()
    for letter in found.letters:
        shown = "–" if letter.value is None else f"{letter.value:,}"
        table.add_row(letter.symbol, shown, letter.unit, letter.meaning)
    return table
