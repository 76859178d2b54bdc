"""A run whose process really gets no more memory, on the CPU: it goes on by a smaller plan."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest
from run_folder import record

from trainer.launch_probe import CONFIG

REAL = """
import resource, sys
from planner.planning import Request, make_plan
from trainer import run, training
train = {"data": sys.argv[1], "out": sys.argv[2], "steps": 3, "validation": 0.0}
plan = make_plan(Request(gpu="cpu", model=f"random:{sys.argv[3]}", total_tokens=1024, train=train))
own, answered, count = training.forward_backward, run.answered, 0
def limit(bytes):
    resource.setrlimit(resource.RLIMIT_AS, (bytes, resource.RLIM_INFINITY))
def step(*given):
    global count
    count += 1
    if count == 2:
        limit(int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize() + 2**24)
    return own(*given)
def lifted(*given, **more):
    limit(resource.RLIM_INFINITY)
    return answered(*given, **more)
training.forward_backward, run.answered = step, lifted
sys.exit(run.execute(plan))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="how much memory a process has is limited as Linux does it")
def test_memory_that_really_runs_out(tmp_path: Path) -> None:
    """In a step of a process that gets no more than it has, so that only what the step holds can make room."""
    words, random = "abcdefghijklmnopqrstuvwxyz \n", Random(0)
    (tmp_path / "text.txt").write_text("".join(random.choices(words, k=9000)), encoding="utf-8")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
    threshold = {f"MALLOC_{name}_THRESHOLD_": "65536" for name in ("MMAP", "TRIM")}  # what is given back is given back
    done = subprocess.run(
        [sys.executable, "-c", REAL, str(tmp_path / "text.txt"), str(tmp_path / "run"), str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **threshold},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    told = " ".join(done.stdout.split())
    assert "can't allocate memory" in told and "Planned again" in told
    (noted,) = record(tmp_path / "run")["replanned"]
    assert noted["steps"] == 1 and len(record(tmp_path / "run")["losses"]) == 3
