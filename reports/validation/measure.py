"""Freezes predictions and measures runs, each in a process of its own.

    python -m reports.validation.measure plan [NAME…]     write the plan of every case to reports/validation/plans/
    python -m reports.validation.measure run OUT [NAME…]  run the frozen plans here; one record each into OUT
    python -m reports.validation.measure execute PLAN [K] run one plan as it stands, which `run` does for each; of a
                                                          streamed model the first K layers alone

Freeze and commit the plans first: a record holds the plan it was run by, so git shows that the prediction came
before the measurement. Each run is held to its plan's bound (`high`): it is shown to suffice, not only that it was
not passed; a record whose ``limit_bytes`` is the card's budget is older than that. A case that fails leaves
``NAME.failed.txt`` with the reason, never a silence.
"""

from __future__ import annotations

import json
import os
import random
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from planner.errors import PlanError
from planner.plan import Memory
from planner.plan_file import load_plan
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


def synthetic_text(folder: Path, tokens: int) -> Path:
    """Two documents of random lower-case letters; random weights are fed bytes, a token each."""
    letters, source = "abcdefghijklmnopqrstuvwxyz \n", random.Random(0)
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("first.txt", "second.txt"):
        (folder / name).write_text("".join(source.choices(letters, k=4 * tokens)), encoding="utf-8")
    return folder


def held_to_bound(memory: Memory) -> Memory:
    """The same with the bound for a budget: the run fails where the bound does not suffice."""
    gpu = memory.gpu.model_copy(update={"budget_bytes": memory.gpu.peak_bytes.high})
    return memory.model_copy(update={"gpu": gpu})


def run(case: Case, out: Path) -> str:
    """Run one frozen plan in a fresh process; gives what came of it in a line."""
    plan = load_plan(PLANS / f"{case.name}.yaml")
    with tempfile.TemporaryDirectory() as scratch:
        data = synthetic_text(Path(scratch) / "data", plan.total_tokens)
        record = Path(scratch) / "run" / "measurement.json"
        train = plan.train.model_copy(update={"data": str(data), "out": str(record.parent)})
        moved = plan.model_copy(update={"train": train, "memory": held_to_bound(plan.memory)})
        frozen = Path(scratch) / "plan.yaml"
        frozen.write_text(moved.to_yaml(), encoding="utf-8")
        # Not `plan --plan`: with the bound for a budget the plan is no longer what would be planned for the card.
        command = [sys.executable, "-m", "reports.validation.measure", "execute", str(frozen)]
        command += [str(case.layers)] if case.layers else []
        began = time.monotonic()
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_SECONDS, check=False)
            output, code = done.stdout + done.stderr, done.returncode
        except subprocess.TimeoutExpired as late:
            output, code = f"{late.stdout}\nstopped after {LIMIT_SECONDS} s", -1
        if code != 0 or not record.exists():
            (out / f"{case.name}.failed.txt").write_text(output, encoding="utf-8")
            return f"FAILED ({code}): {output.strip()[-400:]}"
        found = json.loads(record.read_text(encoding="utf-8"))
    found["set"] = case.set
    found["plan"]["train"] |= {"data": "synthetic", "out": "scratch"}  # the folder of this run is gone by now
    (out / f"{case.name}.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
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
    if verb == "execute" and len(rest) in (1, 2):
        from trainer.run import execute

        try:
            return execute(load_plan(Path(rest[0])), layers_run=int(rest[1]) if rest[1:] else None)
        except PlanError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
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
