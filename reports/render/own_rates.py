"""For docs/validation.md: steps on a machine that was measured first, a run that was killed, tests on a card."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from textwrap import fill
from typing import Any

from planner.cli_check import same_settings
from planner.hardware import load_profile
from planner.launches import FOUR_BIT
from planner.markdown import seconds, table
from planner.plan_file import load_plan
from planner.planning import make_plan
from planner.profile_file import profile_text
from reports.render.records import FOLDER
from reports.validation.measure import PLANS

OWN = FOLDER / "others" / "h200-own-rates.json"
AGAIN = FOLDER / "others" / "h200-own-rates-2.json"
FAILED = OWN.parent
STOPPED = FOLDER / "others" / "h200-stopped-llama-3.2-1b.json"
TESTED = FOLDER / "others" / "h200-card-tests.json"
CARDS = FOLDER / "cards"
COLUMNS = (
    "run",
    "steps, s>",
    "estimated before>",
    "measured over it>",
    "today, shared constants>",
    "ratio>",
    "today, own rates>",
    "ratio>",
)
WIDTH = 118


def section() -> str:
    """All of it."""
    found = json.loads(OWN.read_text(encoding="utf-8"))
    rows, then = list(_rows(found)), found["four_bit_launches"]
    own, shared = (_range(found, way) for way in ("by_own_rates", "by_shared_constants"))
    told = fill(
        "One H200, measured as `plan measure` does it, then frozen plans run on it "
        f"(`python -m reports.validation.own_rates`, the record is `reports/validation/others/{OWN.name}`). Steps took "
        f"{own} times as long as was estimated before, by the machine's own rates, and {shared} times as long as by "
        "the constants that were shipped then. Those were fitted to none of these runs, but to earlier ones of some of "
        "the same plans. Both "
        f"counted a product in four bits as {then} launches; the small steps below showed {FOUR_BIT}, and constants "
        "were then fitted again, to other runs. So today's columns are no predictions: they show how far formulas and "
        "constants of today are from these runs. Runs of one step made their first, in which kernels are loaded. The "
        "process that had measured kept some GiB of the card during the runs, idle.",
        WIDTH,
    )
    return f"""## Steps on a machine that was measured first

{told}

{table(COLUMNS, rows)}
{_launches(found["small_steps"], then)}

{_failed(found)}

{_again(json.loads(AGAIN.read_text(encoding="utf-8")))}

{_stopped(json.loads(STOPPED.read_text(encoding="utf-8")))}

{_tested(json.loads(TESTED.read_text(encoding="utf-8")))}
"""


def _range(found: dict[str, Any], way: str) -> str:
    ratios = [each["measured"]["step"] / each[way]["step"] for each in found["runs"].values() if _ran(each)]
    return f"{min(ratios):.2f} to {max(ratios):.2f}"


def _ran(one: dict[str, Any]) -> bool:
    return "measured" in one


def _rows(found: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    with tempfile.TemporaryDirectory() as folder:
        measured = Path(folder) / "measured.yaml"
        measured.write_text(found["profile"], encoding="utf-8")
        for name, one in found["runs"].items():
            if not _ran(one):
                yield name, "failed" if _failure(name).exists() else "not run", *[""] * (len(COLUMNS) - 2)
                continue
            chip, held = name.split("-")[:2]
            card = CARDS / f"{chip}-{held}.yaml"
            own = Path(folder) / card.name
            rates = load_profile(str(measured)).measured
            own.write_text(profile_text(replace(load_profile(str(card)), measured=rates)), encoding="utf-8")
            step, before = one["measured"]["step"], one["by_own_rates"]["step"]
            told = [name, ", ".join(map(seconds, one["measured"]["each"])), seconds(before), f"{step / before:.2f}"]
            for each in (card, own):
                plan = make_plan(same_settings(load_plan(PLANS / f"{name}.yaml"), str(each)))
                estimate = plan.time.step_seconds.estimate
                assert estimate is not None
                told += [seconds(estimate), f"{step / estimate:.2f}"]
            yield tuple(told)


def _launches(steps: dict[str, dict[str, float]], then: int) -> str:
    """Seconds of a launch, and how many more a product in four bits takes than one in 16."""
    launches, products = [], []
    for kind in ("resident", "streamed"):
        plain, four = steps[kind], steps[f"{kind}, four bits"]
        launches.append(f"{1e6 * plain['seconds'] / plain['kernels']:.1f} µs in a {kind} one")
        counted = (four["kernels"] - plain["kernels"]) / then
        products.append(f"{1e6 * (four['seconds'] - plain['seconds']) / counted:.0f} µs")
    return fill(
        f"In small steps that leave the card waiting a kernel took the host {' and '.join(launches)}, whose count may "
        f"be short; a product in four bits took {' and '.join(products)} more than one in 16. It counts as {FOUR_BIT} "
        "launches, which is right for the resident step.",
        WIDTH,
    )


def _failure(name: str) -> Path:
    return FAILED / f"{name}.failed.txt"


def _failed(found: dict[str, Any]) -> str:
    (name,) = (name for name in found["runs"] if _failure(name).exists())
    lines = _failure(name).read_text(encoding="utf-8").splitlines()
    (line,) = (line for line in lines if line.startswith("error: "))
    why = line.removeprefix("error: ").partition(" GPU 0 has")[0]
    return fill(
        f"**One run failed**: {name}, held to its plan's bound and not to the card's memory, made its first step and "
        f"ended in the second: {why} Its tensors took what was planned; what the allocator held and could not use was "
        "more than the bound has for that. Since then memory grows by pages of 16 MiB, and the same plan ran within "
        f"the same bound: {_ran_since(name)}",
        WIDTH,
    )


def _ran_since(name: str) -> str:
    """What the run that failed came to later."""
    one = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    gpu, steps = one["measured"]["gpu"], ", ".join(map(seconds, one["step_seconds"]["each"]))
    reserved, limit = (f"{size / 2**20:,.0f} MiB" for size in (gpu["reserved_bytes"], one["limit_bytes"]))
    retries = one["environment"]["allocator"]["retries"]
    return (
        f"steps of {steps} s, {reserved} reserved of {limit}. So near a limit the allocator gave pages back {retries} "
        "times, which takes time."
    )


def _again(found: dict[str, Any]) -> str:
    """The table of a second machine, on which all estimates came before the runs."""
    runs = {name: each for name, each in found["runs"].items() if _ran(each)}
    ways = ("by_shared_constants", "by_own_rates")
    rows = [
        (
            name,
            ", ".join(map(seconds, each["measured"]["each"])),
            *(told for way in ways for told in _beside(each["measured"]["step"], each[way]["step"])),
        )
        for name, each in runs.items()
    ]
    columns = ("run", "steps, s>", "shared constants>", "ratio>", "own rates>", "ratio>")
    kept, stock = (runs[f"h200-8gib-phi-2-16384-{name}"]["measured"]["step"] for name in ("kept", "resident"))
    there, away = (runs[f"h200-8gib-phi-2-32768-{name}"]["measured"]["step"] for name in ("card", "streamed"))
    told = fill(
        f"The same again on another day (`reports/validation/others/{AGAIN.name}`), with the formulas and constants of "
        f"today, so that both estimates came before the runs. {len(runs)} of {len(found['runs'])} plans were run "
        "before the machine was lost, and the planner was timed on two other cores of it meanwhile. By shared "
        f"constants steps took {_range(found, ways[0])} times as long as estimated, by its own rates "
        f"{_range(found, ways[1])}. At 16,384 tokens layers in passes with what waits on the card and attention kept "
        f"took {kept / stock:.2f} times a resident step; at 32,768 tokens what waits took {there / away:.2f} times as "
        "long on the card as in host memory.",
        WIDTH,
    )
    return f"""{told}

{table(columns, rows)}"""


def _beside(step: float, estimate: float) -> tuple[str, str]:
    return seconds(estimate), f"{step / estimate:.2f}"


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


def _tested(one: dict[str, Any]) -> str:
    counts: Counter[str] = Counter()
    for each in one["outcomes"].values():
        counts.update(each)
    told = ", ".join(f"{count} {what}" for what, count in sorted(counts.items(), reverse=True))
    return fill(
        f"Tests of the streamed step and of attention over a cache that need a card, on "
        f"{one['environment']['gpu']['name']}, at revision {one['revision'][:7]}: {told} "
        f"(`python -m reports.validation.card_tests`, `reports/validation/others/{TESTED.name}`).",
        WIDTH,
    )
