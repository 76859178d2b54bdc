"""The generated blocks of README.md: real output of commands, and tables from records."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path

from planner.hardware import load_profile
from planner.markdown import fenced, percent, table
from planner.planning import Request, make_plan
from planner.units import GIB, format_bytes, format_seconds
from reports.render import grid, grid_again, grid_longest, grid_records, taken, tier_runs
from reports.render.demo import demo
from reports.render.records import on_cards, over_bound, records, step_ratios, summary

ROOT = Path(__file__).resolve().parents[2]
SPLIT = "GPU memory by phase"  # the report is shown as far as this, and the rest folded away
DISK = 200 * GIB  # what the lead tells of a longer sequence
MODELS = ("phi-2", "llama-3.1-8b")
CARDS = ("rtx2060s", "rtx3060-12gb", "rtx4060ti-16gb", "rtx3090", "rtx4090", "rtx5090", "a100-80gb-sxm", "h200-sxm")


@cache
def output(*command: str) -> str:
    """What `plan` prints in a plain terminal of 80 columns."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TIERPLAN_")}
    environment |= {"NO_COLOR": "1", "COLUMNS": "80", "PYTHONIOENCODING": "utf-8", "PYTHONPATH": str(ROOT)}
    environment.pop("FORCE_COLOR", None)
    done = subprocess.run(
        [sys.executable, "-m", "planner", *command],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        encoding="utf-8",
        check=True,
    )
    assert not done.stderr, done.stderr
    return done.stdout


def lead() -> str:
    """What the reference card trains, and what it would with whole layers alone."""
    plan, whole = make_plan(Request()), make_plan(Request(excluded=("streamed",)))
    on_disk = make_plan(Request(disk_bytes=DISK))
    step, longer = plan.time.step_seconds.estimate, on_disk.time.step_seconds.estimate
    assert on_disk.tier and on_disk.memory.disk.training_bytes and longer is not None
    assert plan.executor == "streamed" and plan.tier and whole.tier and step is not None
    used, budget, host = plan.memory.gpu.peak_bytes.high, plan.memory.gpu.budget_bytes, plan.memory.host.budget_bytes
    return (
        f"{plan.model.id} on an 8 GB {plan.gpu.name.removeprefix('NVIDIA GeForce ')} with {host // GIB} GiB of host "
        f"memory: **{plan.total_tokens:,} tokens** (tier {plan.tier}), within {format_bytes(used)} of the card's "
        f"{format_bytes(budget)}, about {format_seconds(step)} a step. With `--disk {DISK // GIB}GiB` as well it is "
        f"**{on_disk.total_tokens:,}** (tier {on_disk.tier}) and {format_seconds(longer)}, with whole layers "
        f"{whole.total_tokens:,} (tier {whole.tier}). Planned; no such card has been measured.\n"
    )


def plan_head() -> str:
    """The report of the reference card, as far as its budget."""
    return fenced(f"$ make plan\n{output('--gpu', 'rtx2060s').partition(SPLIT)[0]}", "console")


def plan_rest() -> str:
    """The rest of that report."""
    _, heading, rest = output("--gpu", "rtx2060s").partition(SPLIT)
    return fenced(heading + rest, "text")


def tiers() -> str:
    """Every tier on the reference card."""
    return fenced(f"$ plan tiers --gpu rtx2060s\n{output('tiers', '--gpu', 'rtx2060s')}", "console")


def usage() -> str:
    """The help of the command."""
    return fenced(f"$ plan --help\n{output('--help')}", "console")


def cards() -> str:
    """What the planner gives some well-known cards."""
    rows = []
    for card in map(load_profile, CARDS):
        row = [f"`{card.id}`"]
        for model in MODELS:
            plan = make_plan(Request(gpu=card.id, model=model))
            step, longest = plan.time.step_seconds.estimate, plan.longest.all_trained
            told = "unknown" if step is None else format_seconds(step)
            row += [
                f"{plan.tier} ({plan.total_tokens:,})" if plan.tier else "none",
                f"{longest:,}" if longest else "none",
                told if plan.tier else f"{told} (at {plan.total_tokens:,})",
            ]
        rows.append(row)
    heads = [
        f"{model}: {what}>" for model in MODELS for what in ("tier (tokens)", "longest, tokens", "a step of the tier")
    ]
    return table(("card", *heads), rows)


def validated() -> str:
    """What the committed records of counted plans say."""
    command = ("validate", "--report", "reports/validation/counted")
    return fenced(f"$ plan {' '.join(command)}\n{output(*command)}", "console")


def _failed(many: int) -> str:
    if not many:
        return "Every run that was to end has ended."
    return f"{many} more runs failed, each held to its plan's bound: there it was too low."


def _waiting(many: int) -> str:
    return f"{many} {'run' if many == 1 else 'runs'} of the grid had no machine yet. " if many else ""


@cache
def collected() -> int:
    """How many tests pytest finds."""
    command = [sys.executable, "-m", "pytest", "--collect-only", "-qq", "-p", "no:cacheprovider", "-p", "no:xdist"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    counts = [int(count) for count in re.findall(r"^tests/\S+: (\d+)$", done.stdout, re.MULTILINE)]
    if done.returncode or not counts:
        raise ValueError(f"pytest collects no tests: {(done.stdout + done.stderr).strip()[-300:]}")
    return sum(counts)


def tests() -> str:
    """How many there are."""
    what = f"{collected():,} tests by `pytest -n 2`"
    return f"`make test` runs {what}, and skips those that need what is not there, a card or an\nextra package.\n"


def measured() -> str:
    """The grid of runs in a table, and the older runs on cards in a sentence."""
    found_in_grid, failed = grid_records.found()
    held_out = grid.SETS["holdout"]
    rows = [(what, *by_set[held_out]) for what, by_set in grid.by_what_and_set(found_in_grid).items()]
    heads = (
        "compared, in runs that are held out of every fit",
        "runs>",
        "median>",
        "95th percentile>",
        "largest>",
        "too low>",
    )
    found = on_cards(records())
    older, ratios = summary(found), step_ratios(found)
    return (
        f"A grid of {len(found_in_grid)} runs on H200s, held to 8, 12 and 24 GiB or standing in for other cards, of "
        f"{len({record.content['model']['id'] for record in found_in_grid})} models, 512 to 524,288 tokens; "
        f"{grid.parts_told(found_in_grid)}. Plans were frozen before. The other sets, and every run: "
        "[predictions against runs](reports/validation.md).\n\n"
        f"{table(heads, rows)}\n"
        f"{grid_again.sentence().partition(' All of them')[0]} {_failed(len(failed))} "
        f"{_waiting(len(grid_records.pending()))}"
        f"{grid_longest.sentence()} {grid_longest.host_sentence()}\n\n"
        f"{tier_runs.sentence()} [Every run](reports/validation.md#tiers-as-anyone-gets-them).\n\n"
        f"Of {len(taken.CASES)} runs on a card that memory was taken from on the way, {taken.sentence()}\n\n"
        f"Before that, {older.count} runs on H100 and H200 ([validation](docs/validation.md)): error of the predicted "
        f"peak, without its sign, median {percent(older.median)[1:]}, largest {percent(older.largest)[1:]}; more than "
        f"the bound was reserved in {over_bound(found)}. Steps took {ratios[0]:.2f} to {ratios[-1]:.2f} times as long "
        f"as estimated before the run. By today's formulas the largest error of the peak is "
        f"{percent(max(abs(record.error_today) for record in found))[1:]}.\n"
    )


BLOCKS: Mapping[str, Callable[[], str]] = {
    "lead": lead,
    "plan-head": plan_head,
    "plan-rest": plan_rest,
    "usage": usage,
    "tiers": tiers,
    "validated": validated,
    "cards": cards,
    "tests": tests,
    "demo": demo,
    "measured": measured,
}
