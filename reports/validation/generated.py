"""Text that is written on a card: what was planned for it, frozen, and what it takes.

    python -m reports.validation.generated plan             write what is planned for every case to FOLDER/planned.json
    python -m reports.validation.generated run OUT [NAME…]  write text here; one record each into OUT

FOLDER is reports/validation/generated. What is frozen there is for the next runs: of those that were made, each record
has what had been planned for it, and its folder's name how many tokens were read at once. Weights and adapters are
random, and so is the prompt; nothing is stopped early. Each case is a process of its own, on a card that stands in for
the one it is planned for, and held to what is planned: while it loads to that card's budget, then to the case's bound.
A case that fails leaves ``NAME.failed.txt`` with the reason.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from planner.cli_output import write_whole
from planner.generating import Generation, Keeping, choose
from planner.optimizations.base import Situation
from planner.plan import Plan
from planner.planning import Request, make_plan, read_gpu, read_model
from reports.validation.measure import HERE, card_file

FOLDER = HERE / "generated"
PLANNED = FOLDER / "planned.json"
NEW = 64
SECONDS = 600  # in which a case ends, or something is wrong


@dataclass(frozen=True)
class Case:
    """A prompt of so many tokens, and how its keys and values are kept. ``required`` is on in the plan besides."""

    name: str
    card: str
    model: str
    prompt: int
    keeping: Keeping
    required: tuple[str, ...] = ()

    def plan(self) -> Plan:
        """A plan of the model for the card; what it is to train has no part in what is written."""
        asked = Request(str(card_file(self.card)), f"random:{self.model}", total_tokens=1024, required=self.required)
        return make_plan(asked)

    def planned(self, plan: Plan) -> Generation:
        """What is planned for the case."""
        shape = read_model(plan.model.source)
        situation = Situation(read_gpu(str(card_file(self.card))), shape, plan.memory.host.budget_bytes)
        return choose(plan, situation, self.prompt, NEW, self.keeping)


CASES = (
    Case("llama-3.2-1b-8192-card", "h200-8gib", "llama-3.2-1b", 8192, "card"),
    Case("llama-3.2-1b-65536-card", "h200-8gib", "llama-3.2-1b", 65_536, "card"),
    Case("llama-3.2-1b-65536-host", "h200-8gib", "llama-3.2-1b", 65_536, "host"),
    Case("llama-3.2-1b-65536-int8", "h200-8gib", "llama-3.2-1b", 65_536, "int8"),
    Case("phi-2-4096-card", "rtx2060s", "phi-2", 4096, "card"),
    Case("phi-2-32768-host", "rtx2060s", "phi-2", 32_768, "host"),
    Case("phi-2-16384-nf4", "h200-8gib", "phi-2", 16_384, "card", ("nf4_weights",)),
    Case("mistral-7b-v0.1-32768-nf4", "h200-8gib", "mistral-7b-v0.1", 32_768, "card", ("nf4_weights",)),
    Case("gemma-3-1b-32768-host", "h200-8gib", "gemma-3-1b", 32_768, "host"),
    Case("gemma-2-2b-8192-card", "h200-12gib", "gemma-2-2b", 8192, "card"),
    Case("qwen3-4b-32768-host", "h200-12gib", "qwen3-4b", 32_768, "host"),
    Case("llama-3.1-8b-16384-nf4", "h200-12gib", "llama-3.1-8b", 16_384, "card", ("nf4_weights",)),
)


def told(found: Generation) -> dict[str, Any]:
    """What is planned, in numbers."""
    return {
        "chunk": found.chunk,
        "expected_bytes": found.expected,
        "high_bytes": found.high,
        "host_bytes": sum(found.host.values()),
        "prompt_seconds": found.prompt_seconds,
        "token_seconds": found.token_seconds,
    }


def freeze() -> None:
    """Write down what is planned for every case, before any is run."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    rows = {case.name: asdict(case) | {"new": NEW} | told(case.planned(case.plan())) for case in CASES}
    write_whole(PLANNED, json.dumps(rows, indent=1) + "\n")


def run(case: Case, out: Path) -> None:
    """Write text as a case says, in this process, and its record into ``out``."""
    import torch

    from trainer.device import hold, rehearsing
    from trainer.generating import GeneratingSession, Prompt, Sampling, written
    from trainer.record import environment, revision

    frozen = json.loads(PLANNED.read_text(encoding="utf-8"))[case.name]
    plan = case.plan()
    found = case.planned(plan)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(3, 250, (case.prompt,), generator=generator).tolist()
    with rehearsing():
        session = GeneratingSession(plan)
        session.apply_choices()
        adapted, _, _ = session.adapted_model()
        hold(next(adapted.parameters()).device, frozen["high_bytes"])
        began, read = time.monotonic(), list[float]()
        note = lambda _: read.append(time.monotonic() - began)  # noqa: E731
        made = written(adapted, Prompt.of(tokens), found, Sampling(), lambda _: None, note)
        card = environment(next(adapted.parameters()).device)
    record = {
        "case": asdict(case),
        "planned": {name: frozen[name] for name in told(found)},
        "planned_today": told(found),
        "held_to_bytes": frozen["high_bytes"],
        "allocated_bytes": made.allocated,
        "reserved_bytes": made.reserved,
        "prompt_seconds": made.prompt_seconds,
        "chunks_launched": read,
        "token_seconds": made.seconds / made.tokens,
        "tokens": made.tokens,
        "environment": card,
        "revision": revision(),
    }
    write_whole(out / f"{case.name}.json", json.dumps(record, indent=1) + "\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(
        prog="python -m reports.validation.generated", description=str(__doc__).splitlines()[0]
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    verbs.add_parser("plan")
    for name in ("run", "one"):
        verb = verbs.add_parser(name)
        verb.add_argument("out", type=Path)
        verb.add_argument("names", nargs="*", metavar="NAME")
    given = parser.parse_args(arguments)
    if given.verb == "plan":
        freeze()
        return 0
    if unknown := {*given.names} - {case.name for case in CASES}:
        parser.error(f"no case is called {min(unknown)}")
    given.out.mkdir(parents=True, exist_ok=True)
    for case in CASES:
        if (given.names and case.name not in given.names) or (given.out / f"{case.name}.json").exists():
            continue
        if given.verb == "one":
            run(case, given.out)
            continue
        command = [sys.executable, "-m", "reports.validation.generated", "one", str(given.out), case.name]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=SECONDS)
        if done.returncode:
            write_whole(given.out / f"{case.name}.failed.txt", done.stdout + done.stderr)
        print(f"{case.name:40} {'ran' if not done.returncode else done.stderr.strip()[-300:]}", flush=True)
    return int(any(given.out.glob("*.failed.txt")))


if __name__ == "__main__":
    raise SystemExit(main())
