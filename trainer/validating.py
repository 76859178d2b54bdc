"""One plan run, or counted, to see whether its prediction holds; `plan validate` starts this anew for each plan.

    python -m trainer.validating run PLAN RECORD [--layers N] [--rehearse] [--limit BYTES]
    python -m trainer.validating count PLAN RECORD [--layers N]
    python -m trainer.validating card

``run`` trains a plan on made-up text, held to its own bound: a run that ends shows that the bound suffices. Where it
has more than two steps, the last two of them are held, with saving and evaluation: those before have the card's whole
budget, as they would have for a user, since an allocator that has to give memory back takes its time. ``count``
runs nothing: one step goes through tensors that hold no data, and their bytes are counted (``trainer.fake_step``).
``card`` prints the name of the card that is here. Data and adapter lie beside the record while it runs.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from planner.errors import PlanError, PlanErrors
from planner.plan import Memory, Plan
from planner.plan_file import load_plan


def synthetic_text(folder: Path, tokens: int) -> Path:
    """Two documents of random lower-case letters; random weights are fed bytes, a token each."""
    letters, source = "abcdefghijklmnopqrstuvwxyz \n", random.Random(0)
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("first.txt", "second.txt"):
        (folder / name).write_text("".join(source.choices(letters, k=4 * tokens)), encoding="utf-8")
    return folder


def held_to(limit: int, memory: Memory) -> Memory:
    """The same with other bytes of the card for a budget: the run fails where they do not suffice."""
    gpu = memory.gpu.model_copy(update={"budget_bytes": limit})
    return memory.model_copy(update={"gpu": gpu})


def run(plan: Plan, layers: int | None, scratch: Path, *, rehearse: bool, limit: int | None = None) -> dict[str, Any]:
    """The record of a run; of one that went over its bound in the probe step it says so.

    Args:
        layers: of a streamed model so many, from the first; None runs all.
        scratch: a folder for data and adapter.
        rehearse: on whatever card is here.
        limit: bytes of the card that the allocator gets; None gives it the plan's bound, or its budget until the last
            steps.

    Raises:
        PlanError: it cannot be run here, or ended before there was a record.
    """
    from trainer.device import rehearsing
    from trainer.run import execute
    from trainer.running import HELD_STEPS

    data, out = synthetic_text(scratch / "data", plan.total_tokens), scratch / "run"
    train = plan.train.model_copy(update={"data": str(data), "out": str(out)})
    high, budget = plan.memory.gpu.peak_bytes.high, plan.memory.gpu.budget_bytes
    free = limit is None and not rehearse and (train.steps or 0) > HELD_STEPS
    held = plan.model_copy(update={"train": train, "memory": held_to(budget if free else limit or high, plan.memory)})
    place, more = out / "measurement.json", {"how": "rehearsed" if rehearse else "run"}
    try:
        with rehearsing() if rehearse else nullcontext():
            code = execute(held, layers_run=layers, last_held=high if free else None, replan="never")
    except PlanError as error:
        if not place.exists():
            raise
        more["stopped"] = str(error)
        code = 0
    if code:
        raise SystemExit(code)
    record: dict[str, Any] = json.loads(place.read_text(encoding="utf-8"))
    if free:
        record["limit_bytes"] = high
    if plan.gpu.kind == "gpu" and not rehearse:
        from trainer.launch_probe import launched

        # A step that is short waits for the host, which no profile of a card knows: last, as it takes of the card, too.
        (record["launches"],) = launched(plan.gpu.profile_file or plan.gpu.id)
    record["plan"]["train"] |= {"data": "synthetic", "out": "scratch"}  # the folder of this run is gone by now
    return record | more


def count(plan: Plan, layers: int | None) -> dict[str, Any]:
    """A record of bytes that were counted; of time, host memory that is not pinned, and kernels it says nothing."""
    from trainer.fake_step import UNSEEN, counted, predicted
    from trainer.record import environment, host_predicted, predicted_groups, revision

    found, held = counted(plan, layers), plan.memory.gpu.peak_bytes
    # What no tensor holds is in neither of both, and loading, saving and the optimiser's step are not counted.
    seen = {name: size for name, size in predicted(plan).items() if name in found.phases}
    taken = {name: found.phases[name] for name in seen}
    return {
        "plan": plan.document(),
        "how": "counted",
        "counted": {"expected_bytes": max(seen.values()), "phases": seen, "without": list(UNSEEN)},
        "executor": plan.executor,
        "set": None,
        "card": plan.gpu.id,
        "limit_bytes": plan.memory.gpu.budget_bytes,
        "model": {"id": plan.model.id, "source": plan.model.source},
        "layers": plan.model.layers,
        "layers_run": found.layers,
        "total_tokens": plan.total_tokens,
        "tokens_held": plan.train.batch * plan.total_tokens,
        "predicted": {
            "gpu": {"low_bytes": held.low, "expected_bytes": held.expected, "high_bytes": held.high},
            "host": host_predicted(plan),
            "phases": {phase: sum(terms.values()) for phase, terms in plan.memory.gpu.phases.items()},
            "terms": predicted_groups(plan),
            "step_seconds": plan.time.step_seconds.estimate,
        },
        "measured": {
            "gpu": {"allocated_bytes": max(taken.values()), "reserved_bytes": None, "driver_bytes": None},
            "host": {"anonymous_bytes": None, "pinned_bytes": found.pinned},
            "phases": {name: {"allocated_bytes": size} for name, size in taken.items()},
            "terms": {},
        },
        "step_seconds": {"median": None, "each": [], "probe": None, "phases": {}},
        "environment": environment(torch.device("cpu")),
        "revision": revision(),
    }


def card() -> str:
    """The name of the card that is here; empty where there is none."""
    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else ""


def main() -> int:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m trainer.validating")
    verbs = parser.add_subparsers(dest="verb", required=True)
    verbs.add_parser("card")
    for name in ("run", "count"):
        verb = verbs.add_parser(name)
        verb.add_argument("plan", type=Path)
        verb.add_argument("record", type=Path)
        verb.add_argument("--layers", type=int)
        verb.add_argument("--rehearse", action="store_true")
        verb.add_argument("--limit", type=int)
    given = parser.parse_args()
    if given.verb == "card":
        print(card())
        return 0
    try:
        plan = load_plan(given.plan)
        if given.verb == "run":
            record = run(plan, given.layers, given.record.parent, rehearse=given.rehearse, limit=given.limit)
        else:
            record = count(plan, given.layers)
    except PlanError as error:
        for each in error.errors if isinstance(error, PlanErrors) else (error,):
            print(f"error: {each}", file=sys.stderr)
        return 2
    given.record.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
