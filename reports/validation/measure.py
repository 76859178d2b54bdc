"""Freezes predictions and measures runs, each in a process of its own.

    python -m reports.validation.measure plan [NAME…] [--grid]      write the plan of every case to FOLDER/plans/
    python -m reports.validation.measure run OUT [NAME…] [--grid]   run the frozen plans here; one record each into OUT

FOLDER is reports/validation, for the cases of ``cases``; with --grid, --pairs, --largest or --tiers it is the folder of
that name in there, for the cases of the module of that name. Freeze and commit the plans first: a record holds the plan
it was run by, so git shows that the prediction came before the measurement. The rest is what `plan validate` does: each
run is held to its plan's bound (`high`), or its last two steps are, so it is shown to suffice; a record whose
``limit_bytes`` is the card's budget is older than that. A case that fails leaves ``NAME.failed.txt`` with the reason,
never a silence. What has a record in OUT is not run again.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import yaml

from planner.cli_check import same_settings
from planner.cli_output import write_whole
from planner.longest import FINEST
from planner.measurements import Failure
from planner.plan import Plan
from planner.plan_file import load_plan
from planner.planning import make_plan
from planner.units import GIB, MIB
from planner.validating import Job, run_apart
from reports.validation.cases import CASES, Case
from reports.validation.grid import BEYOND, GRID
from reports.validation.largest import LARGEST
from reports.validation.pairs import PAIRED
from reports.validation.sets import set_of
from reports.validation.tiers import TIER_RUNS

HERE = Path(__file__).parent
PLANS = HERE / "plans"
ROOT = Path(__file__).resolve().parents[2]
LIMIT_SECONDS = 1200
LISTS: Mapping[str, tuple[Case, ...]] = {"grid": GRID, "pairs": PAIRED, "largest": LARGEST, "tiers": TIER_RUNS}
"""Runs that have a folder of their own, by its name, which is that of the option that asks for them."""


def freeze(case: Case, plans: Path) -> str:
    """Write a case's plan; gives the planner's word on it."""
    plans.mkdir(parents=True, exist_ok=True)
    target = plans / f"{case.name}.yaml"
    if case.beyond is not None:
        beyond(load_plan(plans / f"{case.beyond}.yaml"), target)
        return "frozen"
    command = [
        sys.executable,
        "-m",
        "planner",
        *shlex.split(case.arguments),
        "--out",
        os.path.relpath(target),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 0:  # a card of one's own is named by its whole path, which is another elsewhere
        here = target.read_text(encoding="utf-8")
        target.write_text(here.replace(f"{ROOT}{os.sep}", ""), encoding="utf-8")
        return "frozen"
    target.unlink(missing_ok=True)
    return f"refused ({done.returncode}): {done.stderr.strip() or done.stdout.strip()[:400]}"


def card_file(card: str) -> Path:
    """Where a card's profile lies: among those that runs are held to, or those that come along."""
    held = HERE / "cards" / f"{card}.yaml"
    return held if held.is_file() else ROOT / "hwprofiles" / f"{card}.yaml"


def beyond(plan: Plan, target: Path) -> None:
    """Write the plan of a longer sequence by the same settings, made for a card that is like it but has the memory."""
    of = card_file(plan.gpu.id)
    card = yaml.safe_load(of.read_text(encoding="utf-8"))
    for memory in ("memory", "visible_memory"):
        card[memory]["value"] = f"{2 * plan.gpu.visible_bytes // MIB} MiB"
    with tempfile.TemporaryDirectory() as folder:
        twice = Path(folder) / f"{plan.gpu.id}.yaml"
        twice.write_text(yaml.safe_dump(card, sort_keys=False), encoding="utf-8")
        tokens = int(plan.total_tokens * BEYOND) // FINEST * FINEST + FINEST
        asked = replace(same_settings(plan, str(twice)), total_tokens=tokens, target=tokens, host_bytes=64 * GIB)
        write_whole(target, make_plan(asked).to_yaml().replace(str(twice), str(of.relative_to(ROOT))))


def run(case: Case, frozen: Path, out: Path, beside: int) -> str:
    """Run one frozen plan in a fresh process; gives what came of it in a line.

    Args:
        beside: how many other runs share the card and the host meanwhile.
    """
    began, plan = time.monotonic(), load_plan(frozen)
    budget = load_plan(frozen.with_stem(case.beyond)).memory.gpu.budget_bytes if case.beyond else None
    job = Job(case.name, plan, "rehearse" if case.rehearse else "run", budget)
    about = {"set": set_of(plan.model.id, plan.total_tokens), "beside": beside}
    made = run_apart(job, frozen, out, case.layers, LIMIT_SECONDS, about=about)
    if isinstance(made, Failure):
        return f"{time.monotonic() - began:5.0f} s  FAILED: {made.told[-400:]}"
    found = made.content
    measured, predicted = found["measured"]["gpu"], found["predicted"]["gpu"]
    allocated = measured["allocated_bytes"]
    share = 100 * (predicted["expected_bytes"] / allocated - 1)
    reserved = measured["reserved_bytes"]
    return (
        f"{time.monotonic() - began:5.0f} s  allocated {allocated / 2**20:9.1f} MiB, predicted {share:+6.2f} %, "
        f"{'expandable, ' if found['environment']['allocator']['expandable_segments'] else ''}"
        f"reserved {(reserved or 0) / 2**20:9.1f} MiB, bound left {-made.over / 2**20:7.1f} MiB, "
        f"driver {(measured['driver_bytes'] or 0) / 2**20:9.1f} MiB, step {_step(made.step)}"
    )


def _step(step: tuple[float | None, float | None]) -> str:
    measured, estimated = step
    told = f"{measured:.3f} s" if measured is not None else "none"
    return f"{told}, {estimated / measured - 1:+.0%}" if measured and estimated else told


def part_of(text: str) -> tuple[int, int]:
    """``2/3`` as which of how many."""
    which, _, of = text.partition("/")
    return int(which), int(of)


def add_lists(parser: argparse.ArgumentParser) -> None:
    """The options that say whose cases: ``of`` is the name of one of ``LISTS``, or None."""
    which = parser.add_mutually_exclusive_group()
    for name in LISTS:
        words = f"the runs of reports.validation.{name}"
        which.add_argument(f"--{name}", dest="of", action="store_const", const=name, help=words)


def main(arguments: Sequence[str] | None = None) -> int:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m reports.validation.measure", description=__doc__.splitlines()[0])
    verbs = parser.add_subparsers(dest="verb", required=True)
    for name in ("plan", "run"):
        verb = verbs.add_parser(name)
        if name == "run":
            verb.add_argument("out", type=Path)
            verb.add_argument("--part", type=part_of, default=(1, 1), metavar="N/M", help="every M-th from the N-th")
            verb.add_argument("--beside", type=int, default=0, metavar="N", help="so many other runs share the card")
        add_lists(verb)
        verb.add_argument("names", nargs="*", metavar="NAME")
    given = parser.parse_args(arguments)
    cases, plans = (LISTS[given.of], HERE / given.of / "plans") if given.of else (CASES, PLANS)
    if unknown := {*given.names} - {case.name for case in cases}:
        parser.error(f"no case is called {min(unknown)}")
    asked = [case for case in cases if not given.names or case.name in given.names]
    if given.verb == "plan":
        for case in asked:
            print(f"{case.name:56} {freeze(case, plans)}", flush=True)
        return 0
    given.out.mkdir(parents=True, exist_ok=True)
    which, of = given.part
    for case in asked[which - 1 :: of]:
        frozen = plans / f"{case.name}.yaml"
        if frozen.exists() and not (given.out / f"{case.name}.json").exists():
            print(f"{case.name:56} {run(case, frozen, given.out, given.beside)}", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
