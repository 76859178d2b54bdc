"""A run that is killed in the middle of a step and gone on with, beside one that nobody stopped; as a user does it.

    python -m reports.validation.stopped OUT [--gpu CARD] [--model NAME] [--tokens N] [--steps N]

All are `plan … --execute` with layers in passes and short documents that share rows; which kernel is the fastest is
measured before each. One is killed (SIGKILL) once it has stored something inside its second step, and gone on with by
the command of the README. A card's kernels add up in no fixed order, so a third, which nobody stops, shows how far two
runs are apart anyway. OUT gets their losses, from where the one went on, how far the adapters of the second and the
third are from the first's, and what the choice of the kernel said.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from reports.validation.accuracy import asked_for, write_record
from trainer.saving import FOLDER, STATE

PATIENCE = 400.0
"""Seconds for a run."""


def documents(folder: Path, tokens: int) -> Path:
    """Some dozens of random letters each a tenth of a row to half of it; random weights are fed bytes, a token each."""
    source = random.Random(0)
    folder.mkdir()
    for number in range(30):
        letters = source.choices("abcdefghijklmnopqrstuvwxyz \n", k=source.randrange(tokens // 10, tokens // 2))
        (folder / f"{number}.txt").write_text("".join(letters), encoding="utf-8")
    return folder


def run_of(gpu: str, model: str, tokens: int, steps: int, data: Path, out: Path) -> list[str]:
    """The command line of a run."""
    settings = {"steps": steps, "save_minutes": 0.01, "validation": 0, "out": out}
    return [
        *(sys.executable, "-m", "planner", "--gpu", gpu, "--model", f"random:{model}", "--context", str(tokens)),
        *("--with", "streamed", "--with", "sequence_packing", "--data", str(data), "--execute"),
        *(part for name, value in settings.items() for part in ("--set", f"train.{name}={value}")),
    ]


def finished(command: list[str]) -> str:
    """What a command prints; it has to end well."""
    wide = os.environ | {"COLUMNS": "400"}  # so that no sentence is broken
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False, env=wide)
    if done.returncode != 0:
        raise SystemExit(
            f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
        )
    return done.stdout


def killed_inside_the_second_step(command: list[str], out: Path) -> None:
    """Start it, and kill it once what it has stored last is from within that step."""
    began = time.monotonic()
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as run:
        while run.poll() is None and time.monotonic() - began < PATIENCE:
            state = out / FOLDER / STATE
            stored = torch.load(state, map_location="cpu", weights_only=False) if state.exists() else {}
            if stored.get("step") == 1 and stored.get("inside"):
                run.send_signal(signal.SIGKILL)
                run.wait()
                return
            time.sleep(0.2)
        run.kill()
    raise SystemExit("the run ended before it could be killed inside its second step")


def measured(gpu: str, model: str, tokens: int, steps: int) -> dict[str, Any]:
    """The record, but for what it was measured on."""
    with tempfile.TemporaryDirectory() as scratch:
        data = documents(Path(scratch) / "data", tokens)
        whole, stopped, again = folders = [Path(scratch) / name for name in ("whole", "stopped", "again")]
        told = finished(run_of(gpu, model, tokens, steps, data, whole))
        killed_inside_the_second_step(run_of(gpu, model, tokens, steps, data, stopped), stopped)
        finished([sys.executable, "-m", "planner", "--plan", str(stopped / "plan.yaml"), "--execute", "--resume"])
        finished(run_of(gpu, model, tokens, steps, data, again))
        records = [json.loads((out / "measurement.json").read_text(encoding="utf-8")) for out in folders]
        adapters = [load_file(out / "adapter" / "adapter_model.safetensors") for out in folders]
    return {
        "what": "a run killed in the middle of a step and gone on with, beside one that was not",
        "model": model,
        "tokens": tokens,
        "kernel": [line for line in told.splitlines() if line.startswith("Attention, measured here")],
        "data": records[0]["data"]["train"],
        "losses": {out.name: record["losses"] for out, record in zip(folders, records, strict=True)},
        "resumed": records[1]["resumed"],
        "adapters_apart": {
            out.name: apart(adapters[0], other) for out, other in zip(folders[1:], adapters[1:], strict=True)
        },
    }


def apart(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """The norm of the difference of two sets of adapters, as a share of the first's."""
    difference = sum(float((one[name] - other[name]).double().square().sum()) for name in one)
    return float((difference / sum(float(each.double().square().sum()) for each in one.values())) ** 0.5)


def main() -> int:
    """See the module's docstring."""
    asked = asked_for("a run that is killed and gone on with", tokens=8192, steps=3)
    found = measured(asked.gpu, asked.model, asked.tokens, asked.steps)
    write_record(asked.out, found)
    print(json.dumps({name: found[name] for name in ("kernel", "losses", "resumed", "adapters_apart")}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
