"""For reports/optimizations.md: what each optimisation does to what is learnt, by trainings of a real model."""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from functools import cache
from pathlib import Path
from typing import Any

from planner.markdown import table
from reports.quality.cases import AGAIN, BASE, RATE, ROWS, SEEDS, STEPS, TOKENS, TRAININGS, Training

FOLDER = Path(__file__).resolve().parents[1] / "quality" / "records"
Found = dict[int, dict[str, Any]]


@cache
def found() -> dict[str, Found]:
    """The records by training, and of each by seed."""
    records: dict[str, Found] = defaultdict(dict)
    for place in sorted(FOLDER.glob("*.json")):
        content = json.loads(place.read_text(encoding="utf-8"))
        records[content["training"]][content["seed"]] = content
    return dict(records)


def loss(record: dict[str, Any], when: str = "after") -> float:
    """Held-out loss of a training."""
    return float(record["evaluation"][when]["loss"])


def comparable(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether both were judged by as many held-out tokens, which are the same where rows are cut alike or all taken."""
    tokens = [each["evaluation"]["after"]["tokens"] for each in (one, other)]
    return bool(tokens[0] == tokens[1])


def differences(training: Training) -> dict[int, float]:
    """By seed, held-out loss less that of the training beside: negative where it is lower."""
    mine, others = found().get(training.name, {}), found().get(training.beside, {})
    return {
        seed: loss(record) - loss(others[seed])
        for seed, record in mine.items()
        if seed in others and comparable(record, others[seed])
    }


@cache
def chance() -> float | None:
    """The largest difference of two trainings that are the same; None where they were not made with every seed.

    Those in which an optimisation found nothing to do are the same as without it, too.
    """
    if len(differences(by_name(AGAIN))) < len(SEEDS):
        return None
    return max(abs(value) for name in (AGAIN, *IDLE) for value in differences(by_name(name)).values())


@cache
def verdict_of(training: Training) -> str:
    """In words; empty where not all seeds were trained, or chance is not known."""
    each, floor = differences(training), chance()
    if len(each) < len(SEEDS) or floor is None or training.name == AGAIN:
        return ""
    if training.name in IDLE:
        return "it found nothing to do"
    better, worse = (sum(sign * value > floor for value in each.values()) for sign in (-1, 1))
    if better and worse:
        return f"better with {better}, worse with {worse} of {len(each)} seeds"
    if not better and not worse:
        return "no difference beyond chance"
    told = "better" if better else "worse"
    return (
        f"{told} with each seed"
        if max(better, worse) == len(each)
        else f"{told} with {max(better, worse)} of {len(each)} seeds"
    )


def _chance_told() -> str:
    kernels = sorted({record["kernel"] for each in found().values() for record in each.values()})
    if (floor := chance()) is not None:
        return (
            f"Trainings that are the same ({AGAIN}, and {' and '.join(IDLE)}, which found nothing to do) differ by up "
            f"to {floor:.4f}; less is chance. Of so many comparisons some may go beyond that by chance as well."
        )
    told = "How far two trainings that are the same differ is not known yet, so none has a verdict"
    idle = [value for name in IDLE for value in differences(by_name(name)).values()]
    if idle:
        least, most = (f"{value:+.4f}".replace("-", "−") for value in (min(idle), max(idle)))
        told += f"; {' and '.join(IDLE)}, which found nothing to do, differ from the base by {least} to {most}"
    if len(kernels) > 1:
        told += f". Kernels of attention differ between them, too ({', '.join(kernels)}), each having measured its own"
    return f"{told}."


IDLE = ("spike_rewind", "early_stopping")
"""Trainings in which nothing happened that the base does not have: no loss was a spike, and none stopped early."""


def by_name(name: str) -> Training:
    """The training of that name."""
    return next(training for training in TRAININGS if training.name == name)


def _best_rate() -> float:
    """The rate with the lowest held-out loss on average, of those that were tried with each seed that the base has."""
    base = found()[BASE]
    tried = {RATE: BASE} | {
        float(training.words.partition("=")[2]): training.name
        for training in TRAININGS
        if training.words.startswith("train.lr=")
    }
    means = {
        rate: statistics.mean(loss(each) for each in found()[name].values())
        for rate, name in tried.items()
        if found().get(name, {}).keys() == base.keys()
    }
    return min(means, key=lambda rate: means[rate])


def _edge() -> str:
    """Whether the best rate is the largest that was tried."""
    largest = max(float(each.words.partition("=")[2]) for each in TRAININGS if each.words.startswith("train.lr="))
    return ", and the largest of them: whatever raises the rate has it easy here." if _best_rate() == largest else "."


def _cells(training: Training) -> tuple[str, ...]:
    each = differences(training)
    told = [f"{each[seed]:+.4f}".replace("-", "−") if seed in each else "" for seed in SEEDS]
    mean = f"{statistics.mean(each.values()):+.4f}".replace("-", "−") if len(each) == len(SEEDS) else ""
    spread = f"{max(each.values()) - min(each.values()):.4f}" if len(each) == len(SEEDS) else ""
    return (*told, mean, spread, verdict_of(training))


def _name(training: Training) -> str:
    if not training.optimization:
        return f"`{training.words}`" if training.words else training.name
    link = f"[`{training.optimization}`](../docs/optimizations/{training.optimization}.md)"
    return link if training.name == training.optimization else f"{link} ({training.name})"


def section() -> str:
    """The table of all that were made, and how they were."""
    records = found()
    if BASE not in records:
        return ""
    base = records[BASE]
    one = next(iter(base.values()))
    card, versions = one["environment"]["gpu"], one["environment"]["packages"]
    bases = "; ".join(
        f"seed {seed}: {loss(each, 'before'):.4f} before, {loss(each):.4f} after" for seed, each in sorted(base.items())
    )
    rows = [
        (_name(training), "" if training.beside == BASE else training.beside, *_cells(training))
        for training in TRAININGS
        if training.name != BASE and differences(training)
    ]
    left = [training.name for training in TRAININGS if training.name in records and not differences(training)]
    missing = [training.name for training in TRAININGS if training.name not in records]
    told = (
        f"SmolLM2-135M-Instruct learns the standard library of Python {one['environment']['python']}: {STEPS} steps of "
        f"{ROWS} rows of {TOKENS:,} tokens, rank 16, in 16 bits, a rate of {RATE:g} that falls by a cosine, on "
        f"{card['name'] if card else 'a CPU'} (`python -m reports.quality.measure OUT --gpu h200-sxm --beside 12`; "
        f"records in [`quality/records`](quality/records); torch {versions['torch']}, transformers "
        f"{versions['transformers']}). A tenth of the files is held out; which, says the seed. Held-out loss with none "
        f"of these: {bases}. The table has by how much it is higher, or lower, with one of them after as many rows and "
        "steps. What makes a rate larger or smaller is to be read beside the first rows: without anything else, a "
        f"rate of {_best_rate():g} is the best of those that were tried{_edge()}"
    )
    more = [_chance_told()]
    if missing:
        more.append(f"Not trained yet: {', '.join(missing)}.")
    if left:
        more.append(f"Trained, and judged by other rows, so not compared: {', '.join(left)}.")
    tried = [training for training in TRAININGS if training.name != BASE and differences(training)]
    short = [training.name for training in tried if len(differences(training)) < len(SEEDS)]
    if len(short) == len(tried):
        more.append(f"None was trained with all {len(SEEDS)} seeds yet, so none has a verdict.")
    elif short:
        more.append(f"Not with every seed yet, so without a verdict: {', '.join(short)}.")
    heads = ("with", "beside", *(f"seed {seed}>" for seed in SEEDS), "mean>", "spread>", "verdict")
    return f"## What is learnt\n\n{told}\n\n{table(heads, rows)}\n" + " ".join(more) + "\n"
