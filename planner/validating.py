"""Plans put to the test: each is written down first, then run or counted in a process of its own.

What a process of training leaves behind in torch, CUDA and cuBLAS would be part of what the next one is seen to take.
The prediction is in a file before the run begins, and in the record afterwards.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from planner.cli_output import write_whole
from planner.errors import PlanError
from planner.measurements import Failure, Record, read_record
from planner.plan import Plan
from planner.plan_facts import RANDOM
from planner.units import format_seconds

How = Literal["run", "rehearse", "count"]
WORKSPACES = {8_519_680: ":4096:2:16:8", 33_554_432: ":32768:1"}
"""What ``CUBLAS_WORKSPACE_CONFIG`` has to say for as many bytes: a Hopper card's own are the larger ones."""


@dataclass(frozen=True)
class Job:
    """One plan to put to the test; its record will have the name."""

    name: str
    plan: Plan


def job_of(plan: Plan, name: str | None = None) -> Job:
    """A plan as it is put to the test: a few steps on made-up text, of random weights where the model is a shipped one.

    Random weights take the same memory and time, and nothing has to be downloaded.
    """
    from planner.model import shipped_folder

    model = plan.model
    if not model.source.startswith(RANDOM) and not Path(model.source).exists() and shipped_folder(model.id):
        model = model.model_copy(update={"source": f"{RANDOM}{model.id}"})
    moved = plan.model_copy(update={"model": model})
    return Job(name or f"{plan.gpu.id}-{plan.model.id}-{plan.total_tokens}-{plan.executor}", moved)


def card_here() -> str:
    """The name of this machine's card as torch sees it; empty where it sees none.

    Raises:
        PlanError: there is no torch.
    """
    done = _child("card")
    if done.returncode:
        nearest = "pip install 'tierplan[train,gpu]' brings it."
        raise PlanError("plan validate", f"needs the train and gpu extras ({_last(done.stderr)}).", nearest)
    return done.stdout.strip().splitlines()[-1] if done.stdout.strip() else ""


def how_for(plan: Plan, here: str, *, rehearse: bool, count: bool) -> How:
    """What can be done with a plan on this machine.

    Raises:
        PlanError: the card is another one, and nobody said that it may stand in.
    """
    if plan.gpu.kind == "cpu":
        return "run"
    if count or not here:
        return "count"
    if " ".join(here.lower().split()) == " ".join(plan.gpu.name.lower().split()):
        return "run"
    if rehearse:
        return "rehearse"
    nearest = f"--rehearse {plan.gpu.id} holds this card to the other's memory; --count runs nothing."
    raise PlanError(f"the plan for {plan.gpu.name}", f"this machine has a {here}.", nearest)


def validate(
    jobs: Sequence[Job],
    folder: Path,
    how: Callable[[Plan], How],
    *,
    layers: int | None = None,
    limit_seconds: float | None = None,
    again: bool = False,
) -> Iterator[tuple[Job, Record | Failure, float | None]]:
    """Put plans to the test, one after the other; gives each with its record, or why there is none, and the seconds.

    All predictions are written down before the first run. What has a record in the folder is not run again, so what
    was interrupted goes on; then there are no seconds. What was only counted, and can be run, is run.

    Raises:
        PlanError: the folder cannot be written to, or has the record of another plan by the same name.
    """
    plans = folder / "plans"
    try:
        plans.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PlanError(f"--out {folder}", f"cannot be made: {error.strerror or error}.") from error
    done = {} if again else {job.name: found for job in jobs if (found := _done_before(job, folder, how(job.plan)))}
    for job in jobs:
        if job.name not in done:
            write_whole(plans / f"{job.name}.yaml", job.plan.to_yaml())
    for job in jobs:
        if job.name in done:
            yield job, done[job.name], None
            continue
        began = time.monotonic()
        made = run_apart(job, plans / f"{job.name}.yaml", folder, how(job.plan), layers, limit_seconds)
        yield job, made, time.monotonic() - began


def _done_before(job: Job, folder: Path, how: How) -> Record | None:
    """The record that a job has already; None where it has none, or where more can be done than was.

    Raises:
        PlanError: it is that of another plan.
    """
    place = folder / f"{job.name}.json"
    if not place.is_file():
        return None
    record = read_record(place)
    if _told(record.content["plan"]) != _told(job.plan.document()):
        why = "is the record of a plan with other settings or other figures."
        raise PlanError(str(place), why, "--again makes it anew; --out FOLDER puts the new one elsewhere.")
    return None if how != "count" and record.content.get("how") == "counted" else record


def _told(plan: Mapping[str, Any]) -> dict[str, Any]:
    """What decides a plan's figures, and what it says of the card; data, folders and what a run is held to left out."""
    train = {name: value for name, value in plan["train"].items() if name not in ("data", "out")}
    choices = {choice["id"]: choice["knobs"] for choice in plan["choices"]}
    kept = {name: plan[name] for name in ("gpu", "model", "total_tokens", "target")}
    rope = {name: value for name, value in plan["rope"].items() if name != "reason"}
    return kept | {"choices": choices, "rope": rope, "train": train, "peak": plan["memory"]["gpu"]["peak_bytes"]}


def run_apart(
    job: Job, plan_file: Path, folder: Path, how: How, layers: int | None, limit_seconds: float | None = None
) -> Record | Failure:
    """One plan in a process of its own; a run without a record leaves ``NAME.failed.txt`` with all it said."""
    record, failed = folder / f"{job.name}.json", folder / f"{job.name}.failed.txt"
    with tempfile.TemporaryDirectory() as scratch:
        made = Path(scratch) / "record.json"
        words = ["count" if how == "count" else "run", str(plan_file), str(made)]
        words += ["--layers", str(layers)] if layers else []
        words += ["--rehearse"] if how == "rehearse" else []
        try:
            done = _child(*words, environment=_like(job.plan) if how == "rehearse" else {}, timeout=limit_seconds)
            output, code = done.stdout + done.stderr, done.returncode
        except subprocess.TimeoutExpired as late:
            said = late.stdout.decode(errors="replace") if isinstance(late.stdout, bytes) else late.stdout or ""
            output, code = f"{said}\nstopped after {format_seconds(limit_seconds or 0)}", -1
        if code == 0 and made.is_file():
            write_whole(record, made.read_text(encoding="utf-8"))
            failed.unlink(missing_ok=True)
            return read_record(record)
    write_whole(failed, output.strip() + "\n")
    return Failure(job.name, _last(output))


def _like(plan: Plan) -> dict[str, str]:
    """What makes a process take for itself what it would on the planned card, where that is another amount here."""
    from planner.calibration import calibration

    major, minor = map(int, (plan.gpu.compute_capability or "0.0").split("."))
    size = calibration().workspace_bytes((major, minor))
    return {"CUBLAS_WORKSPACE_CONFIG": WORKSPACES[size]} if size in WORKSPACES else {}


def _child(*words: str, environment: dict[str, str] | None = None, timeout: float | None = None) -> _Done:
    import os

    command = [sys.executable, "-m", "trainer.validating", *words]
    env = {**os.environ, **(environment or {})}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=env, timeout=timeout)


_Done = subprocess.CompletedProcess[str]


def _last(output: str) -> str:
    lines = [line for line in output.strip().splitlines() if line.strip()]
    return lines[-1].removeprefix("error: ") if lines else "it said nothing"
