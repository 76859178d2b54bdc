"""For reports/validation.md: what other estimators say of the same runs."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence

from planner.markdown import table
from reports.render.records import FOLDER

FOUND = FOLDER / "others" / "peers.json"
WHAT = {
    ("accelerate", "nearest"): "size of the weights",
    ("accelerate", "training"): "training with Adam; it has none for four bits",
    ("deepspeed", "nearest"): "ZeRO 2, one card, states in host memory",
    ("deepspeed", "training"): "ZeRO 2, one card",
    ("llm-analysis", "nearest"): "weights and activations",
    ("llm-analysis", "training"): "training: those, gradients and states",
}


def section() -> str:
    """A table of each estimator's figure over what was measured."""
    found = json.loads(FOUND.read_text(encoding="utf-8"))
    runs = found["runs"].values()
    rows = [("tierplan", "expected peak", *_cells([run["planned"] / run["measured"] for run in runs]))]
    for (name, which), what in WHAT.items():
        ratios = [size / run["measured"] for run in runs if (size := run["peers"][name].get(which)) is not None]
        rows.append((f"{name} {found['packages'][name]}", what, *_cells(ratios)))
    refused = sum("refused" in run["peers"]["llm-analysis"] for run in runs)
    told = (
        "Of the runs with whole layers, each estimator's figure over the peak that was measured. None of the others "
        "knows adapters: gradients and states of all parameters are in what they say of training, so of each the "
        "figure is told, too, that is nearest to LoRA over frozen weights. Only llm-analysis asks for the length of a "
        f"sequence; it refuses {refused} of these runs, as the MLP's width is no whole multiple of the model's. Made "
        "by `python -m reports.validation.peers`, without downloads."
    )
    heads = ("estimator", "figure", "runs>", "median>", "least>", "most>")
    return f"## Other estimators\n\n{told}\n\n{table(heads, rows)}"


def _cells(ratios: Sequence[float]) -> tuple[str, ...]:
    return str(len(ratios)), *(f"{of:.2f}" for of in (statistics.median(ratios), min(ratios), max(ratios)))
