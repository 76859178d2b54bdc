"""Freezes predictions and measures runs, each in a process of its own.

    python -m reports.validation.measure plan [NAME…]     write the plan of every case to reports/validation/plans/
    python -m reports.validation.measure run OUT [NAME…]  run the frozen plans here; one record each into OUT

Freeze and commit the plans first: a record holds the plan it was run by, so git shows that the prediction came
before the measurement. The rest is what `plan validate` does: each run is held to its plan's bound (`high`), so it is
shown to suffice; a record whose ``limit_bytes`` is the card's budget is older than that. A case that fails leaves
``NAME.failed.txt`` with the reason, never a silence.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

from planner.measurements import Failure
from planner.plan_file import load_plan
from planner.validating import Job, run_apart
from reports.validation.cases import CASES, Case

PLANS = Path(__file__).with_name("plans")
ROOT = Path(__file__).resolve().parents[2]
LIMIT_SECONDS = 1200


def freeze(case: Case) -> str:
    """Write a case's plan; gives the planner's word on it."""
    PLANS.mkdir(exist_ok=True)
    target = PLANS / f"{case.name}.yaml"
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
    return "frozen" if done.returncode == 0 else f"refused ({done.returncode}): {done.stderr.strip() or 'does not fit'}"


def run(case: Case, out: Path) -> str:
    """Run one frozen plan in a fresh process; gives what came of it in a line."""
    frozen, began = PLANS / f"{case.name}.yaml", time.monotonic()
    job = Job(case.name, load_plan(frozen), "run")
    made = run_apart(job, frozen, out, case.layers, LIMIT_SECONDS, about={"set": case.set})
    if isinstance(made, Failure):
        return f"FAILED: {made.told[-400:]}"
    found = made.content
    measured, predicted = found["measured"]["gpu"], found["predicted"]["gpu"]
    allocated = measured["allocated_bytes"]
    share = 100 * (predicted["expected_bytes"] / allocated - 1)
    reserved = measured["reserved_bytes"]
    return (
        f"{time.monotonic() - began:5.0f} s  allocated {allocated / 2**20:9.1f} MiB, predicted {share:+6.2f} %, "
        f"{'expandable, ' if found['environment']['allocator']['expandable_segments'] else ''}"
        f"reserved {(reserved or 0) / 2**20:9.1f} MiB, driver {(measured['driver_bytes'] or 0) / 2**20:9.1f} MiB, "
        f"step {found['step_seconds']['median']:.3f} s"
    )


def main() -> int:
    """See the module's docstring."""
    verb, rest = (sys.argv[1:2] or [""])[0], sys.argv[2:]
    if verb == "plan":
        for case in CASES:
            if not rest or case.name in rest:
                print(f"{case.name:40} {freeze(case)}", flush=True)
        return 0
    if verb == "run" and rest:
        out = Path(rest[0])
        out.mkdir(parents=True, exist_ok=True)
        for case in CASES:
            if (not rest[1:] or case.name in rest[1:]) and (PLANS / f"{case.name}.yaml").exists():
                print(f"{case.name:40} {run(case, out)}", flush=True)
        return 0
    print(__doc__)
    return 2


if __name__ == "__main__":
    raise SystemExit(main())
