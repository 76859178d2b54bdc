"""The claims document itself, which is not part of the repository: whether reports/claims.yaml has all its numbers.

    python -m reports.render.claims_source FILE

reads a copy of the document. The numbers of each of its lines are in reports/claims.yaml, and tests hold the rows of
the report to them; so what cannot be tested without the document is only that this list is right.
"""

from __future__ import annotations

import hashlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from reports.render.claims_data import Document, document

# What has digits and is a name, the number of an item, or a date.
NAMES = re.compile(
    r"\d{4}-\d\d-\d\d|RTX \d{4}|A100|[BF]P?16|NF4|PyTorch 2\.0|FlashAttention-2|ZeRO-\d|Phi-2|Llama 2|Mistral 7B"
    r"|Algorithm 799|\bP1\b|Seq ?\d:|\^\d|^#+ TIER \d|^(?:#+ )?\d+\. "
)
FIGURE = re.compile(r"\d[\d,]*(?:\.\d+)?(?:[KMBT](?![A-Za-z]))?")


def figures(line: str) -> tuple[str, ...]:
    """The numbers of a line, in its order, with K, M, B or T where one follows; names with digits left out."""
    return tuple(found.rstrip(",") for found in FIGURE.findall(NAMES.sub(" ", line)))


def same(figure: str) -> tuple[float, str]:
    """A number to compare with another that is written with more zeros, or without commas."""
    suffix = figure[-1] if figure[-1].isalpha() else ""
    return float(figure.removesuffix(suffix).replace(",", "")), suffix


def without_row(given: Document) -> Iterator[str]:
    """The numbers of lines that no row has, and the figures of rows that their line does not have."""
    for line, rows in given.rows().items():
        there = {same(figure) for figure in figures(given.numbers.get(line, ""))}
        told = {same(figure) for row in rows for text in row for figure in figures(text)}
        claimed = {same(figure) for _, written in rows for figure in figures(written)}
        yield from (f"line {line}: {value:g}{suffix} is in no row" for value, suffix in sorted(there - told))
        yield from (f"line {line} does not say {value:g}{suffix}" for value, suffix in sorted(claimed - there))
    yield from (f"line {line} has no row" for line in given.lines if line not in given.rows())


def differences(text: str, given: Document) -> Iterator[str]:
    """In what a document's lines are not what is written down of them."""
    aside = {line for each in given.set_aside for line in each.lines}
    lines = text.splitlines()
    for number, line in enumerate(lines, 1):
        found, known = figures(line), figures(given.numbers.get(number, ""))
        if found != known and number not in aside and not line.startswith("<!--"):
            yield f"line {number}: {' '.join(found) or 'no number'}, not {' '.join(known) or 'none'}"
    yield from (f"there is no line {number}" for number in given.lines if number > len(lines))


if __name__ == "__main__":
    content = Path(sys.argv[1]).read_bytes()
    wrong = [*differences(content.decode(), document()), *without_row(document())]
    if hashlib.sha256(content).hexdigest() != document().sha256:
        wrong.insert(0, "another copy of the document than reports/claims.yaml was made from")
    print("\n".join(wrong) or "reports/claims.yaml has every number of the document.")
    sys.exit(1 if wrong else 0)
