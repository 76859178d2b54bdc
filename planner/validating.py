"""Plans put to the test: each is written down first, then run or counted in a process of its own.

What a process of training leaves behind in torch, CUDA and cuBLAS would be part of what the next one is seen to take.
The prediction is in a file before the run begins, and in the record afterwards.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from planner.cli_output import write_whole
from planner.errors import PlanError
from planner.measurements import Failure, Record, read_record, told
from planner.optimizations import later_knobs
from planner.plan import Plan
from planner.plan_facts import RANDOM, slug
from planner.units import format_seconds

How = Literal["run", "rehearse", "count"]
WORKSPACES = {8_519_680: ":4096:2:16:8", 33_554_432: ":32768:1"}
"""What ``CUBLAS_WORKSPACE_CONFIG`` has to say for as many bytes: a Hopper card's own are the larger ones."""


_RANK: tuple[str, ...] = ("counted", "rehearsed", "run")  # which record tells more


@dataclass(frozen=True)
class Job:
    """One plan to put to the test, and how; its record will have the name.

    Attributes:
        limit_bytes: what it is held to instead of its bound, to see whether it goes without more.
    """

    name: str
    plan: Plan
    how: How
    limit_bytes: int | None = None

    @property
    def layers(self) -> int | None:
        """How many layers are run unless it is said: where they go one by one, two are counted, and all are run."""
        return 2 if self.how == "count" and self.plan.executor == "streamed" else None


def job_of(plan: Plan, how: How, name: str | None = None) -> Job:
    """A plan as it is put to the test, of random weights where the model is a shipped one, or nothing is run.

    They take the same memory and time, and nothing has to be downloaded.

    Raises:
        PlanError: the model is a file that only its weights can be taken from.
    """
    from planner.model import shipped_folder

    source, model_id = plan.model.source, plan.model.id
    if not source.startswith(RANDOM):
        if not Path(source).exists() and shipped_folder(model_id):
            source = f"{RANDOM}{model_id}"
        elif how == "count":
            if source.endswith(".gguf") or not (Path(source) / "config.json").is_file():
                why = "counting takes tensors that hold no data, for which it needs the folder of a config.json."
                raise PlanError(f"model {source}", why, f"A shipped model has one, as in --model {RANDOM}phi-2.")
            source = f"{RANDOM}{source}"
    moved = plan.model_copy(update={"model": plan.model.model_copy(update={"source": source})})
    return Job(name or slug(f"{plan.gpu.id}-{model_id}-{plan.total_tokens}-{plan.executor}"), moved, how)


def card_here() -> str:
    """The name of this machine's card as torch sees it; empty where it sees none.

    Raises:
        PlanError: there is no torch.
    """
    done = _child("card")
    if done.returncode:
        nearest = "pip install 'tierplan[train,gpu]' brings it."
        raise PlanError("plan validate", f"needs the train and gpu extras ({told(done.stderr)}).", nearest)
    return done.stdout.strip().splitlines()[-1] if done.stdout.strip() else ""


def how_for(plan: Plan, here: str, *, rehearse: bool, count: bool) -> How:
    """What can be done with a plan on this machine.

    Raises:
        PlanError: the card is another one, and nobody said that it may stand in; or the plan is for no card.
    """
    if plan.gpu.kind == "cpu":
        if count or rehearse:
            why = "is for what a card would take, and the plan is for the CPU."
            nearest = f"--{'rehearse' if rehearse else 'gpu'} rtx2060s names a card."
            raise PlanError("--count" if count else "--rehearse cpu", why, nearest)
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
    *,
    layers: int | None = None,
    again: bool = False,
) -> Iterator[tuple[Job, Record | Failure, float | None]]:
    """Put plans to the test, one after the other; gives each with its record, or why there is none, and the seconds.

    All predictions are written down before the first run. What has a record in the folder is not run again, so what
    was interrupted goes on; then there are no seconds. What can be run, and was only counted, is run.

    Raises:
        PlanError: the folder cannot be written to, or has a record by the same name that is no answer.
    """
    plans = folder / "plans"
    try:
        plans.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PlanError(f"--out {folder}", f"cannot be made: {error.strerror or error}.") from error
    known = {} if again else {job.name: found for job in jobs if (found := done_before(job, folder, layers))}
    for job in jobs:
        if job.name not in known:
            write_whole(plans / f"{job.name}.yaml", job.plan.to_yaml())
    for job in jobs:
        if job.name in known:
            yield job, known[job.name], None
            continue
        began = time.monotonic()
        made = run_apart(job, plans / f"{job.name}.yaml", folder, layers or job.layers)
        yield job, made, time.monotonic() - began


def done_before(job: Job, folder: Path, layers: int | None) -> Record | None:
    """The record that a job has already; None where it has none, or where more can be done than was.

    Raises:
        PlanError: it answers another question: another plan, fewer or more layers, or other versions of libraries.
    """
    place = folder / f"{job.name}.json"
    if not place.is_file():
        return None
    record, how = read_record(place), {"count": "counted", "rehearse": "rehearsed", "run": "run"}[job.how]
    if record.how not in _RANK or _RANK.index(record.how) < _RANK.index(how):
        return None
    ran, whole = record.content["layers_run"], record.content["layers"]
    wanted = min(layers or (job.layers if record.how == "counted" else None) or whole, whole)
    versions = record.content["environment"]["packages"]
    other = {name: was for name, was in versions.items() if name != "tierplan" and _version(name) != was}
    nearest = "--again makes it anew; --out FOLDER puts the new one elsewhere."
    if _decisive(record.content["plan"]) != _decisive(job.plan.document()):
        raise PlanError(str(place), "is the record of a plan with other settings or other figures.", nearest)
    if job.plan.executor == "streamed" and ran != wanted:
        raise PlanError(str(place), f"is of {ran} layers, and {wanted} are asked for.", nearest)
    if other:
        name, was = next(iter(other.items()))
        raise PlanError(str(place), f"was made with {name} {was}, and here is {_version(name) or 'none'}.", nearest)
    return record


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _decisive(plan: Mapping[str, Any]) -> dict[str, Any]:
    """What decides a plan's figures, and what it says of card and host; data, folders and words left out."""
    train = {name: value for name, value in plan["train"].items() if name not in ("data", "out")}
    choices = {choice["id"]: {**later_knobs(choice["id"]), **choice["knobs"]} for choice in plan["choices"]}
    kept = {name: plan.get(name) for name in ("gpu", "model", "total_tokens", "target")}
    rope = {name: value for name, value in plan.get("rope", {}).items() if name != "reason"}
    peaks = plan["memory"]["gpu"]["peak_bytes"], plan["memory"]["host"]["peak_bytes"]
    return kept | {"choices": choices, "rope": rope, "train": train, "peaks": peaks}


def run_apart(
    job: Job,
    plan_file: Path,
    folder: Path,
    layers: int | None,
    limit_seconds: float | None = None,
    about: Mapping[str, Any] | None = None,
) -> Record | Failure:
    """One plan in a process of its own; a run without a record leaves ``NAME.failed.txt`` with all it said.

    Args:
        about: what else its record is to say.
    """
    record, failed = folder / f"{job.name}.json", folder / f"{job.name}.failed.txt"
    record.unlink(missing_ok=True)  # what is run again and fails has none
    with tempfile.TemporaryDirectory() as scratch:
        made = Path(scratch) / "record.json"
        words = ["count" if job.how == "count" else "run", str(plan_file), str(made)]
        words += ["--layers", str(layers)] if layers else []
        words += ["--rehearse"] if job.how == "rehearse" else []
        words += ["--limit", str(job.limit_bytes)] if job.limit_bytes is not None else []
        try:
            done = _child(*words, environment=_like(job.plan) if job.how == "rehearse" else {}, timeout=limit_seconds)
            output, code = done.stdout + done.stderr, done.returncode
            ending = f"it was ended by signal {-code}" if code < 0 else f"its exit code is {code}"
        except subprocess.TimeoutExpired as late:
            output, code = _text(late.stdout) + _text(late.stderr), -1
            ending = f"stopped after {format_seconds(limit_seconds or 0)}"
        if code == 0 and made.is_file():
            found = json.loads(made.read_text(encoding="utf-8")) | dict(about or {})
            write_whole(record, json.dumps(found, indent=1) + "\n")
            failed.unlink(missing_ok=True)
            return read_record(record)
    if "error: " not in output:
        output = f"{output.strip()}\nerror: no record was made: {ending}."
    write_whole(failed, output.strip() + "\n")
    return Failure(job.name, told(output))


def _text(output: str | bytes | None) -> str:
    return output.decode(errors="replace") if isinstance(output, bytes) else output or ""


def _like(plan: Plan) -> dict[str, str]:
    """What makes a process take for itself what it would on the planned card, where that is another amount here."""
    from planner.calibration import calibration

    major, minor = map(int, (plan.gpu.compute_capability or "0.0").split("."))
    return {"CUBLAS_WORKSPACE_CONFIG": WORKSPACES[calibration().workspace_bytes((major, minor))]}


def _child(*words: str, environment: dict[str, str] | None = None, timeout: float | None = None) -> _Done:
    # -P: a file of the user's own in this folder is no module of ours.
    command = [sys.executable, "-P", "-m", "trainer.validating", *words]
    env = {**os.environ, **(environment or {})}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=env, timeout=timeout)


_Done = subprocess.CompletedProcess[str]
