"""Tiers as anyone gets them: optimisations, knobs and lengths are the planner's choice; `measure --tiers` runs them.

A tier reads a context and trains what follows it, so in these runs not every token is trained. Cards of the test
machine's own, held to 8 GiB, tell memory and, with all layers, seconds; a card that another stands in for tells memory
alone. How many steps are made and judged is said, too, and in the runs whose name ends in a word what that is for.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from planner.tiers import TIERS
from reports.validation.cases import Case, argument
from reports.validation.grid import HELD

SEVERAL, FEW = 5, 3
"""Steps of whole models, after the probe step, the last two of which are held to the bound: of short tiers, of long."""
LONG = 5
"""The first tier of few steps."""


def tier(card: str, model: str, number: int, layers: int | None = None, more: str = "") -> Case:
    """One run.

    Args:
        layers: of layers that run one by one, so many are run; None runs all.
        more: what is asked for besides, after what that is called in the run's name: ``name: words``.
    """
    assert 0 < number <= len(TIERS)
    steps = 2 if card not in HELD or layers is not None else FEW if number >= LONG else SEVERAL
    called, _, settings = more.partition(": ")
    given = f"train.steps={steps} train.validation=0.5 train.evaluation_rows=1 {settings}"
    words = " ".join(map(argument, given.split()))
    name = "-".join([card, model, f"tier{number}", *([called] if called else [])])
    asked = f"--gpu {HELD.get(card, card)} --model random:{model} --tier {number} {words}"
    return Case(name, asked, layers=layers, rehearse=card not in HELD)


def _whole() -> Iterator[Case]:
    """Held to 8 GiB, with all layers."""
    for model, numbers in (
        ("phi-2", (1, 2, 3, 4, 5, 6)),
        ("llama-3.1-8b", (1, 2, 3, 4, 5)),
        ("qwen3-1.7b", (1, 3, 4, 5)),
        ("gemma-3-1b", (2, 4, 5)),
        ("smollm2-135m", (1, 3, 6)),
        ("llama-3.2-3b", (1, 2, 4)),
        ("qwen3-8b", (1, 3)),
    ):
        for number in numbers:
            yield tier("h200-8gib", model, number)
    yield tier("h200-8gib", "llama-3.2-1b", 2, more="two: train.batch=2")
    yield tier("h200-8gib", "gemma-3-1b", 1, more="four: train.batch=4")


def _parts() -> Iterator[Case]:
    """Long ones, of which two layers are run, at full length and with all buffers."""
    yield tier("h200-8gib", "phi-2", 7, layers=2)
    yield tier("h200-8gib", "phi-2", 8, layers=2, more="host: --host-ram=64GiB")
    yield tier("h200-8gib", "llama-3.1-8b", 6, layers=2)
    yield tier("h200-8gib", "qwen3-1.7b", 7, layers=2)


def _stood_in_for() -> Iterator[Case]:
    """As cards with 8, 12 and 24 GB are planned."""
    for number in (1, 2, 3, 4):
        yield tier("rtx2060s", "phi-2", number)
    yield tier("rtx2060s", "phi-2", 7, layers=2)
    yield tier("rtx2060s", "llama-3.1-8b", 5, layers=2)
    for number in (1, 3):
        yield tier("rtx3060-12gb", "llama-3.2-1b", number)
    yield tier("rtx3060-12gb", "qwen3-8b", 2)
    yield tier("rtx3060-12gb", "mistral-7b-v0.3", 6, layers=2)
    for number in (1, 2):
        yield tier("rtx4090", "llama-3.1-8b", number)
    yield tier("rtx4090", "phi-2", 6)
    yield tier("rtx4090", "qwen3-4b", 4)


TIER_RUNS: tuple[Case, ...] = (*_whole(), *_parts(), *_stood_in_for())

WHY: Mapping[str, str] = {
    "h200-8gib-qwen3-1.7b-tier5": (
        "its peak is in the loss, whose trained tokens are counted in a full chunk with a full one loaded behind it, "
        "as they may lie in a shorter row. In this one they are the last chunk, which is shorter, and has none behind."
    ),
}
"""Runs whose expected peak is more than a hundredth off, with the reason."""
