"""`python -m reports.performance.measure`: how long planning takes on this machine, written to record.json beside it.

It takes some minutes, and the machine should have nothing else to do: the load before and after is in the record.
"""

from __future__ import annotations

import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from planner import __version__
from planner.collector import uncollected
from planner.machine import processors
from planner.matrix import MatrixRow, all_cards, all_models, matrix
from planner.planning import Request, make_plan, solved
from reports.performance.synthetic import Kind, mixed, registered

RECORD = Path(__file__).with_name("record.json")
ROOT = RECORD.resolve().parents[2]
CARD, TIMES = "rtx2060s", 7
MODELS = ("phi-2", "llama-3.1-8b", "qwen3-8b", "smollm2-135m", "llama-3.1-70b")
GROWTH: dict[Kind, tuple[int, ...]] = {
    "neutral": (10, 20, 30),
    "better": (10, 20, 30),
    "trade": (4, 8, 16, 30),
    "host": (4, 8, 16),
    "bound": (4, 8, 16),
    "hub": (10, 30),
    "letter": (4, 8),
    "dial": (4, 8),
    "executor": (1, 2),
}
MIXED = (5, 10, 15, 20, 25, 30)
MOST_SECONDS, MOST_BYTES = 90, 8 * 2**30  # of one kind and number; what takes more is told to do so


def timed(work: Callable[[], object], times: int = TIMES) -> dict[str, float]:
    """Seconds of some work, done so many times; ``processor`` is what it took of all processors together."""
    seconds, busy = [], []
    for _ in range(times):
        begin, used = time.perf_counter(), processor_seconds()
        work()
        seconds.append(time.perf_counter() - begin)
        busy.append(processor_seconds() - used)
    return {
        "median": round(statistics.median(seconds), 4),
        "least": round(min(seconds), 4),
        "processor": round(statistics.median(busy), 4),
        "times": times,
    }


def processor_seconds() -> float:
    """What this process and its children have taken of the processors."""
    spent = os.times()
    return spent.user + spent.system + spent.children_user + spent.children_system


def yardstick() -> None:
    """Work that says how fast a machine is: ten million additions, one by one."""
    total = 0
    for number in range(10**7):
        total += number


def start_up() -> None:
    """The whole process of the reference card, its modules compiled as they are after the first start."""
    command = [sys.executable, "-m", "planner", "--gpu", CARD]
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL, check=True, env=kept)


def search(model: str) -> None:
    """All sets and knobs for one card and model, at every tier; what is longest and why is not told."""
    with uncollected():
        solved(Request(CARD, model))


def started() -> dict[str, float]:
    """Several starts, after one that compiles what is not compiled yet."""
    start_up()
    return timed(start_up)


def growth() -> list[dict[str, Any]]:
    """Plans of the reference card with made-up optimisations beside those that exist, each in a process of its own."""
    several = [(kind, count) for kind, counts in GROWTH.items() for count in counts]
    rows = [{"kind": "none", "added": 0, **_size(), **timed(lambda: make_plan(Request(CARD)))}]
    for kind, count in [*several, *(("mixed", count) for count in MIXED)]:
        rows.append({"kind": kind, "added": count} | _apart(kind, count))
        print(rows[-1], file=sys.stderr)
    return rows


def _apart(kind: str, count: int) -> dict[str, Any]:
    """What `grown` finds, in a process that may take so much time and memory; or why there is nothing."""
    command = [sys.executable, "-m", "reports.performance.measure", "grown", kind, str(count)]
    try:
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=MOST_SECONDS, preexec_fn=_bounded
        )
    except subprocess.TimeoutExpired:
        return {"stopped": f"more than {MOST_SECONDS} s for three"}
    if "MemoryError" in done.stderr:
        return {"stopped": f"more than {MOST_BYTES >> 30} GiB of memory"}
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


def _bounded() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MOST_BYTES, MOST_BYTES))


def grown(kind: str, count: int) -> dict[str, Any]:
    """A plan with so many of a kind beside what exists."""
    with registered(mixed(count) if kind == "mixed" else [kind] * count):  # type: ignore[list-item]
        return {**_size(), **timed(lambda: make_plan(Request(CARD)), 3)}


def _size() -> dict[str, int]:
    """How many configurations there are, and how many places they are combined of."""
    space = solved(Request(CARD)).found.space
    return {"configurations": space.size, "places": space.table.many}


def processor() -> str:
    """The processor's name, where the system gives one."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def measured() -> dict[str, Any]:
    """The whole record."""
    before = os.getloadavg()
    cards, models = all_cards(), all_models()
    found: dict[str, Any] = {
        "machine": {"processor": processor(), "cores": processors(), "system": platform.system()},
        "versions": {"tierplan": __version__, "python": platform.python_version(), "numpy": np.__version__},
        "beside": "",  # what else is known to have run, to be filled in by hand
        "yardstick": timed(yardstick),
        "start_up": started(),
        "search": {model: timed(lambda model=model: search(model)) for model in MODELS},  # type: ignore[misc]
        "solve": {model: timed(lambda model=model: make_plan(Request(CARD, model))) for model in MODELS},  # type: ignore[misc]
        "growth": growth(),
    }
    rows: list[MatrixRow] = []
    took = timed(lambda: rows.extend(matrix(cards, models, Request())), 1)
    found["matrix"] = {"cards": len(cards), "models": len(models), "rows": len(rows), **took}
    found["yardstick_after"] = timed(yardstick)
    from trainer.record import revision  # which loads torch, so only now

    found["revision"] = revision()
    return found | {"load": {"before": round(before[0], 2), "after": round(os.getloadavg()[0], 2)}}


if __name__ == "__main__" and sys.argv[1:2] == ["grown"]:
    print(json.dumps(grown(sys.argv[2], int(sys.argv[3]))))
elif __name__ == "__main__":
    RECORD.write_text(json.dumps(measured(), indent=2) + "\n", encoding="utf-8")
    print(f"written: {RECORD.relative_to(ROOT)}")
