"""For docs/validation.md: steps on a machine that was measured first, and a run that was killed and gone on with."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from textwrap import fill
from typing import Any

from planner.cli_check import same_settings
from planner.hardware import load_profile
from planner.launches import FOUR_BIT
from planner.plan_file import load_plan
from planner.planning import make_plan
from planner.profile_file import profile_text
from reports.render.markdown import seconds, table
from reports.render.records import FOLDER
from reports.validation.measure import PLANS

OWN = FOLDER / "others" / "h200-own-rates.json"
FAILED = FOLDER / "others" / "h200-8gib-mistral-7b-v0.1-32768-streamed.failed.txt"
STOPPED = FOLDER / "others" / "h200-stopped-llama-3.2-1b.json"
CARDS = FOLDER / "cards"
COUNTED_THEN = 18  # launches for a product in four bits, by the formulas of the record's revision
WIDTH = 118
COLUMNS = ("run", "step, s>", "estimated, shared constants>", "ratio>", "estimated, own rates>", "ratio>")


def section() -> str:
    """All of it."""
    found = json.loads(OWN.read_text(encoding="utf-8"))
    rows = list(_rows(found))
    return f"""## Steps on a machine that was measured first

One H200, measured as `plan measure` does it, then frozen plans run on it (`python -m reports.validation.own_rates`, the
record is `{OWN.relative_to(FOLDER.parents[1])}`). Each is estimated twice by today's formulas: by the
constants above, to which these runs were not fitted, and by the machine's own rates.

{table(COLUMNS, rows)}
{_launches(found["small_steps"])}

{_failed()}

{_stopped(json.loads(STOPPED.read_text(encoding="utf-8")))}
"""


def _rows(found: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    with tempfile.TemporaryDirectory() as folder:
        measured = Path(folder) / "measured.yaml"
        measured.write_text(found["profile"], encoding="utf-8")
        for name, one in found["runs"].items():
            if "measured" not in one:
                continue
            chip, held = name.split("-")[:2]
            card = CARDS / f"{chip}-{held}.yaml"
            own = Path(folder) / card.name
            rates = load_profile(str(measured)).measured
            own.write_text(profile_text(replace(load_profile(str(card)), measured=rates)), encoding="utf-8")
            step = one["measured"]["step"]
            told = [name, seconds(step)]
            for each in (card, own):
                plan = make_plan(same_settings(load_plan(PLANS / f"{name}.yaml"), str(each)))
                estimate = plan.time.step_seconds.estimate
                assert estimate is not None
                told += [seconds(estimate), f"{step / estimate:.2f}"]
            yield tuple(told)


def _launches(steps: dict[str, dict[str, float]]) -> str:
    """Seconds of a launch, and how many more a product in four bits takes than one in 16."""
    launch, products = steps["resident"]["seconds"] / steps["resident"]["kernels"], []
    for kind in ("resident", "streamed"):
        plain, four = steps[kind], steps[f"{kind}, four bits"]
        counted = (four["kernels"] - plain["kernels"]) / COUNTED_THEN
        products.append(f"{1e6 * (four['seconds'] - plain['seconds']) / counted:.0f} µs")
    return fill(
        f"There a launch took {1e6 * launch:.1f} µs in a small step that leaves the card waiting, and a product in "
        f"four bits {' and '.join(products)} more than one in 16, resident and streamed. It is counted as {FOUR_BIT} "
        "launches.",
        WIDTH,
    )


def _failed() -> str:
    name = FAILED.name.removesuffix(".failed.txt")
    (line,) = (line for line in FAILED.read_text(encoding="utf-8").splitlines() if line.startswith("error: "))
    why = line.removeprefix("error: ").partition(" GPU 0 has")[0]
    return fill(
        f"**One run failed**: {name}, held to its plan's bound and not to the card's memory, made its first step and "
        f"ended in the second: {why} Its tensors took what was planned; what the allocator held and could not use was "
        "more than the bound has for that.",
        WIDTH,
    )


def _stopped(one: dict[str, Any]) -> str:
    place, apart = one["resumed"][0], one["adapters_apart"]
    return fill(
        f"A run of {one['model']} at {one['tokens']:,} tokens with documents sharing rows, killed in step "
        f"{place['steps'] + 1} and gone on with from layer {place['layer'] + 1} backward, ended with adapters "
        f"{100 * apart['stopped']:.2f} % from those of a run that nobody stopped. Another that nobody stopped was "
        f"{100 * apart['again']:.2f} % from them: kernels of a card add up in no fixed order "
        "(`python -m reports.validation.stopped`).",
        WIDTH,
    )
