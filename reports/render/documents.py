"""Which files are generated, whole or in marked blocks, and how they are compared and written."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path

from planner.validation_page import CAPTIONS
from reports.render import (
    claims,
    decisions,
    figures,
    grid,
    measured,
    optimizations,
    performance,
    readme,
    reference,
    tiers,
    validation,
)

ROOT = Path(__file__).resolve().parents[2]
Block = Callable[[], str]

BLOCKS: Mapping[str, Mapping[str, Block]] = {"README.md": readme.BLOCKS, "docs/decisions.md": decisions.BLOCKS}
WHOLE: Mapping[str, Block] = {
    "docs/notation.md": reference.notation,
    "docs/validation.md": validation.page,
    "reports/claims.md": claims.page,
    "reports/optimizations.md": measured.page,
    "reports/performance.md": performance.page,
    "reports/tiers.md": tiers.page,
    "reports/validation.md": grid.text,
    **{f"reports/validation-{name}.svg": partial(grid.picture, name) for name in CAPTIONS},
    "docs/images/memory-by-context.svg": figures.memory_by_context,
    "docs/images/predicted-measured.svg": figures.predicted_measured,
}
PAGES = "docs/optimizations"
BLOCK = re.compile(
    r"(?P<head><!-- generated: (?P<name>[a-z-]+) -->\n).*?(?P<tail><!-- end of (?P=name) -->)", re.DOTALL
)


class Refusal(ValueError):
    """A block that cannot be rendered, and why."""


def filled(text: str, name: str, blocks: Mapping[str, Block], refusals: list[Refusal]) -> str:
    """The text with every block between its markers rendered anew; all else stays as it is.

    A block that cannot be rendered says so in its place, and its refusal is added to ``refusals``.
    """
    found = [match["name"] for match in BLOCK.finditer(text)]
    assert sorted(found) == sorted(blocks), f"{name} has the blocks {found}, and there are {sorted(blocks)}"

    def fill(match: re.Match[str]) -> str:
        try:
            content = blocks[match["name"]]()
        except ValueError as error:
            refusals.append(Refusal(f"{name}, block {match['name']}: {error}"))
            content = f"_Not rendered: {error}_\n"
        return f"{match['head']}{content}{match['tail']}"

    return BLOCK.sub(fill, text)


def rendered(refusals: list[Refusal]) -> dict[Path, str]:
    """Every generated file as it ought to be."""
    documents = {ROOT / name: page() for name, page in WHOLE.items()}
    documents |= {ROOT / PAGES / f"{name}.md": page for name, page in optimizations.pages().items()}
    for name, blocks in BLOCKS.items():
        documents[ROOT / name] = filled((ROOT / name).read_text(encoding="utf-8"), name, blocks, refusals)
    return documents


def leftovers(documents: Iterable[Path]) -> list[Path]:
    """Pages and pictures in generated folders that nothing renders any more."""
    present = [*(ROOT / PAGES).glob("*"), *(ROOT / "docs/images").glob("*")]
    return sorted(set(present) - set(documents))


def outdated(documents: Mapping[Path, str]) -> list[Path]:
    """Files that differ from what they ought to be, and files that ought not to be."""
    differing = [
        path for path, text in documents.items() if not path.is_file() or path.read_text(encoding="utf-8") != text
    ]
    return [*differing, *leftovers(documents)]


def write(documents: Mapping[Path, str]) -> None:
    """Write every file, and take away what nothing renders any more."""
    for path in leftovers(documents):
        path.unlink()
    for path, text in documents.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
