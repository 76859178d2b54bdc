"""Tables and quantities in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from planner.units import GIB


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; a column whose name ends in ">" is aligned to the right."""
    heads = [name.removesuffix(">") for name in columns]
    lines = [heads, ["---:" if name.endswith(">") else "---" for name in columns], *rows]
    return "".join(f"| {' | '.join(cell.replace('|', '∣') for cell in line)} |\n" for line in lines)


def gib(size: int | None) -> str:
    """Bytes in GiB, three digits behind the point; a dash where there is nothing to say."""
    return "–" if size is None else f"{size / GIB:.3f}"


def seconds(value: float | None) -> str:
    """Seconds with three digits that mean something."""
    return "–" if value is None else f"{value:#.3g}" if value < 100 else f"{value:,.0f}"


def percent(share: float, digits: int = 2) -> str:
    """A share with its sign, as percent; never a negative nothing."""
    text = f"{100 * share:+.{digits}f} %"
    return text.replace("-", "−") if float(text[:-2]) else f"{0:.{digits}f} %"


def fenced(text: str, kind: str) -> str:
    """A code block."""
    assert "```" not in text
    return f"```{kind}\n{text.rstrip(chr(10))}\n```\n"
