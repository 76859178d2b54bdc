"""What trainings of a real model, in reports/quality, say about claims."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from typing import Any

from planner.markdown import percent
from reports.quality.cases import SEEDS
from reports.render.claims_data import Document, Found
from reports.render.quality import by_name, differences, found, loss, verdict_of


def trained(document: Document, names: list[str]) -> Found:
    """Held-out loss after as many steps with one optimisation, beside that without, by all seeds; no time is in it."""
    told, better = [], []
    for name in names:
        training = by_name(name)
        each = differences(training)
        assert len(each) == len(SEEDS), f"{name} was not trained with every seed"
        share = statistics.mean(value / loss(found()[training.beside][seed]) for seed, value in each.items())
        told.append(f"{name} beside {training.beside} {percent(share, 2)}, {verdict_of(training)}")
        better.append(verdict_of(training) == "better with each seed")
    text = f"held-out loss after as many steps, mean of {len(SEEDS)} trainings: {'; '.join(told)}"
    return Found(text, holds="in part" if any(better) else "no")


COMPUTATIONS: Mapping[str, Callable[..., Any]] = {"trained": trained}
