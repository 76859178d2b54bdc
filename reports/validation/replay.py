"""What the grid's runs would have the allocator reserve, by replaying their requests without a card.

    python -m reports.validation.replay OUT [NAME…]

Each frozen plan's step goes through tensors that hold no data (``trainer.fake_requests``), and its requests through the
allocator's rules (``trainer.allocator``). OUT gets, for each: the most that was allocated and reserved with no limit,
whether the plan's bound would do, and the smallest limit that does. Beside it stands what was measured.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from planner.plan_file import load_plan
from planner.units import MIB
from reports.validation.grid import GRID
from trainer.allocator import fits, replayed, smallest_limit
from trainer.fake_requests import requests
from trainer.record import revision

FOLDER = Path(__file__).with_name("grid")


def replay(name: str) -> dict[str, Any]:
    """The figures of one run."""
    plan = load_plan(FOLDER / "plans" / f"{name}.yaml")
    events, high = requests(plan), plan.memory.gpu.peak_bytes.high
    free = replayed(events)
    found: dict[str, Any] = {
        "high": high,
        "allocated": free.most_allocated,
        "reserved": free.most_reserved,
        "fits": fits(events, high),
        "smallest_limit": smallest_limit(events),
    }
    if found["fits"]:
        found["retries"] = replayed(events, high).retries
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
    if unknown := {*given.names} - {case.name for case in GRID}:
        parser.error(f"no case is called {min(unknown)}")
    runs: dict[str, Any] = {}
    for case in GRID:
        if not given.names or case.name in given.names:
            found = runs[case.name] = replay(case.name)
            spare = (found["high"] - found["smallest_limit"]) / MIB
            told = f"allocated {found['allocated'] / MIB:9.1f}, reserved {found['reserved'] / MIB:9.1f} MiB"
            print(f"{case.name:56} {told}, {spare:+7.1f} MiB to spare", flush=True)
            given.out.write_text(json.dumps({"revision": revision(), "runs": runs}, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
