"""What the grid's runs would have the allocator reserve, by replaying their requests without a card.

    python -m reports.validation.replay OUT [NAME…]

Each plan that was frozen for the grid's first running (``grid-first``) is replayed: its step goes through tensors that
hold no data (``trainer.fake_requests``), and its requests through the allocator's rules (``trainer.allocator``). OUT
gets, for each: the most that was allocated and reserved with no limit, whether the plan's bound would do, and the
smallest limit that does; all of it also as the trainer was in that running, with four-bit weights left where they are
made, and outputs made after the wide matrix. Beside it stands what was measured, so one can see what a replay is worth.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

from torch import Tensor, nn

from planner.plan import Plan
from planner.plan_file import load_plan
from planner.units import MIB
from trainer.allocator import fits, replayed, smallest_limit
from trainer.fake_requests import requests
from trainer.record import revision

FOLDER = Path(__file__).with_name("grid-first")


@contextmanager
def as_measured() -> Iterator[None]:
    """Meanwhile the trainer is as it was in the first running."""

    def multiplied(linear: nn.Module, rows: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        found: Tensor = linear(rows, *args, **kwargs)
        return found

    with patch("trainer.random_weights.Shelf.of", lambda *_: None), patch("trainer.adapters.multiplied", multiplied):
        yield


def of_plan(plan: Plan) -> dict[str, Any]:
    """What its requests take, and whether they stay within its bound."""
    events, high = requests(plan), plan.memory.gpu.peak_bytes.high
    free, fit = replayed(events), fits(events, high)
    return {
        "allocated": free.most_allocated,
        "reserved": free.most_reserved,
        "fits": fit,
        "smallest_limit": smallest_limit(events),
        "retries": replayed(events, high).retries if fit else None,
    }


def names() -> list[str]:
    """What can be replayed: runs of the first running, by their plans."""
    return sorted(path.stem for path in (FOLDER / "plans").glob("*.yaml"))


def replay(name: str) -> dict[str, Any]:
    """The figures of one run."""
    plan = load_plan(FOLDER / "plans" / f"{name}.yaml")
    with as_measured():
        before = of_plan(plan)
    found: dict[str, Any] = {"high": plan.memory.gpu.peak_bytes.high, "before": before, "today": of_plan(plan)}
    record = FOLDER / f"{name}.json"
    if record.is_file():
        content = json.loads(record.read_text(encoding="utf-8"))
        taken, retries = content["measured"]["gpu"], content["environment"]["allocator"]["retries"]
        found["measured"] = {**{key: taken[f"{key}_bytes"] for key in ("allocated", "reserved")}, "retries": retries}
    return found


def main() -> int:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(
        prog="python -m reports.validation.replay", description=str(__doc__).splitlines()[0]
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("names", nargs="*", metavar="NAME")
    given = parser.parse_args()
    if unknown := {*given.names} - {*names()}:
        parser.error(f"no plan is called {min(unknown)}")
    runs: dict[str, Any] = {}
    for name in names():
        if not given.names or name in given.names:
            found = runs[name] = replay(name)
            before, spare = ((found["high"] - found[when]["smallest_limit"]) / MIB for when in ("before", "today"))
            print(f"{name:56} {before:+7.1f} MiB to spare as measured, {spare:+7.1f} today", flush=True)
            given.out.write_text(json.dumps({"revision": revision(), "runs": runs}, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
