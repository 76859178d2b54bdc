"""Runs that another process takes memory from on the way, on a card: what answers, and whether training ends the same.

    python -m reports.validation.taken plan                          write the plan of every case
    python -m reports.validation.taken run OUT [--cards N] [NAME…]   run them here; one record each into OUT

Each case trains twice by the same plan, each time in a process of its own: undisturbed, and so that at one moment it
cannot have more than some share of its plan's bound any more. Either a second process takes all else of the card, for
good, or the allocator alone gets a limit, which the next plan lifts. A run gives back what it holds unused just before:
an allocator that keeps what it has once had would not miss what others take. OUT gets both runs' losses, both plans'
figures, what the card still held when planning began again, and why a run stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from unittest.mock import patch

from planner.cli_output import write_whole
from planner.errors import PlanError
from planner.plan import Plan
from planner.plan_file import load_plan
from planner.units import MIB
from reports.validation.cases import Case
from reports.validation.grid import HALF, HELD
from reports.validation.measure import HERE, freeze

FOLDER = HERE / "taken"
STEPS, AT = 4, 2
"""Steps of each run, and the one in which memory is taken."""
SECONDS = 300  # in which a run ends, or something is wrong
OTHER = """
import sys, torch
leave, held, piece = int(sys.argv[1]), [], 1 << 33
while piece >= 1 << 21:
    free, _ = torch.cuda.mem_get_info()
    try:
        if free - leave < piece:
            raise torch.OutOfMemoryError
        held.append(torch.empty(piece, dtype=torch.uint8, device="cuda"))
    except torch.OutOfMemoryError:
        piece //= 2
torch.cuda.synchronize()
print("taken", flush=True)
sys.stdin.read()
"""
"""A process that takes all but so many bytes of what is free, until its input ends."""


@dataclass(frozen=True)
class Taken:
    """One run and what it loses.

    Attributes:
        arguments: of `plan`.
        share: of its plan's bound that it can have from then on.
        by: who takes the rest.
        when: in training, in the probe step, or in the evaluation before training.
        lifted: whether the memory comes back once the run has stopped, which is then resumed.
    """

    name: str
    arguments: str
    share: float
    by: Literal["process", "limit"] = "process"
    when: Literal["step", "probe", "evaluation"] = "step"
    lifted: bool = False


def _case(card: str, model: str, tokens: int, words: str, tag: str, share: float, **more: Any) -> Taken:
    fixed = f"--set lora.rank=8 --set train.steps={STEPS} --set train.validation=0.5 --set train.evaluation_rows=1"
    asked = f"--gpu {HELD[card]} --model random:{model} --context {tokens} {words} {fixed}"
    return Taken(f"{model}-{tokens}-{tag}", asked, share, **more)


WHOLE, PASSES = "--without streamed --with mixed_precision", "--with streamed --with mixed_precision"
FLAT = "--without checkpoint_int8 --without checkpoint_nf4"
CASES: tuple[Taken, ...] = (
    _case("h200-8gib", "qwen2.5-0.5b", 4096, f"{WHOLE} --without nf4_weights", "bf16", 0.7),
    _case("h200-8gib", "llama-3.2-1b", 4096, f"{WHOLE} --with nf4_weights", "nf4", 0.7),
    _case("h200-8gib", "qwen3-1.7b", 2048, f"{WHOLE} --with nf4_weights --with adamw_8bit", "adamw8", 0.8),
    _case("h200-12gib", "phi-2", 1024, f"{WHOLE} --with nf4_weights --set {HALF}", "half", 0.7, by="limit"),
    _case(
        "h200-8gib",
        "llama-3.2-1b",
        4096,
        f"{WHOLE} --with nf4_weights --with weight_averaging --set weight_averaging.kind=ema",
        "ema",
        0.7,
        by="limit",
    ),
    _case("h200-8gib", "llama-3.2-1b", 16384, f"{PASSES} {FLAT} --without nf4_weights", "streamed", 0.7),
    _case("h200-8gib", "phi-2", 16384, f"{PASSES} {FLAT} --with nf4_weights", "streamed", 0.8, by="limit"),
    _case("h200-8gib", "qwen3-1.7b", 2048, f"{WHOLE} --with nf4_weights", "probe", 0.7, when="probe"),
    _case("h200-8gib", "smollm2-360m", 16384, f"{WHOLE} --with nf4_weights", "shorter", 0.7, when="probe"),
    _case("h200-8gib", "qwen2.5-1.5b", 2048, f"{WHOLE} --with nf4_weights", "evaluation", 0.6, when="evaluation"),
    _case("h200-8gib", "smollm2-360m", 4096, f"{WHOLE} --with nf4_weights", "resumed", 0.1, lifted=True),
)


def plan_of(case: Taken) -> Plan:
    """The plan that both runs of a case are made by."""
    return load_plan(FOLDER / "plans" / f"{case.name}.yaml")


class Taker:
    """Takes memory once, when it is told to.

    Attributes:
        left: bytes of the card that tensors of this process had when planning began again; None where it did not.
    """

    def __init__(self, case: Taken, plan: Plan) -> None:
        self.case, self.keep = case, int(case.share * plan.memory.gpu.peak_bytes.high)
        self.other: subprocess.Popen[str] | None = None
        self.done = False
        self.left: int | None = None

    def take(self) -> None:
        """Let the run have no more than its share from here on."""
        import torch

        from trainer.device import hold
        from trainer.probing import give_back_unused

        if self.done:
            return
        self.done, device = True, torch.device("cuda", 0)
        give_back_unused(device)
        if self.case.by == "limit":
            hold(device, self.keep)
            return
        leave = max(MIB, self.keep - torch.cuda.memory_reserved(device))
        words = [sys.executable, "-c", OTHER, str(leave)]
        self.other = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.other.stdout is not None
        if self.other.stdout.readline().strip() != "taken":
            raise PlanError("the other process", "could not take the card's memory.")

    def give_back(self) -> None:
        """End the other process."""
        if self.other is not None:
            self.other.communicate()
            self.other = None


@contextmanager
def watched(case: Taken, taker: Taker) -> Iterator[None]:
    """Meanwhile the taker is told when its moment comes, and looks at the card when planning begins again."""
    import torch

    from trainer import replanning, running, training

    steps = 0
    forward_backward, probe, evaluate = training.forward_backward, running.probe, running.evaluate
    smaller: Callable[..., Any] = replanning.smaller_plan

    def step(*given: Any) -> float:
        nonlocal steps
        steps += 1
        if case.when == "step" and steps == AT:
            taker.take()
        return forward_backward(*given)

    def probed(*given: Any) -> Any:
        if case.when == "probe":
            taker.take()
        return probe(*given)

    def evaluated(*given: Any) -> Any:
        if case.when == "evaluation":
            taker.take()
        return evaluate(*given)

    def planned(*given: Any, **more: Any) -> Any:
        taker.left = torch.cuda.memory_allocated()
        return smaller(*given, **more)

    with (
        patch.object(training, "forward_backward", step),
        patch.object(running, "probe", probed),
        patch.object(running, "evaluate", evaluated),
        patch.object(replanning, "smaller_plan", planned),
    ):
        yield


def undisturbed(plan: Plan, scratch: Path) -> dict[str, Any]:
    """The run of a plan from which nobody takes anything, in this process."""
    from trainer.run import execute

    execute(_placed(plan, scratch))
    record = _record(scratch)
    return {"undisturbed": _told(record), "environment": record["environment"], "revision": record["revision"]}


def disturbed(case: Taken, plan: Plan, scratch: Path) -> dict[str, Any]:
    """The run of a plan from which memory is taken, in this process, and what came of it."""
    from trainer.run import execute

    placed, taker, stopped = _placed(plan, scratch), Taker(case, plan), None
    with watched(case, taker):
        try:
            execute(placed, replan="late" if case.when == "step" else "always")
        except PlanError as error:
            stopped = str(error).replace(str(scratch), "scratch")
        finally:
            taker.give_back()
        if case.lifted and stopped is not None:
            execute(placed, resume=True)
    return {
        "what": "a run that memory was taken from",
        "case": case.name,
        "by": case.by,
        "when": case.when,
        "kept_bytes": taker.keep,
        "left_on_card_bytes": taker.left,
        "stopped": stopped,
        "taken": _told(_record(scratch)),
    }


def _placed(plan: Plan, scratch: Path) -> Plan:
    from trainer.validating import synthetic_text

    data = synthetic_text(scratch / "data", plan.total_tokens)
    train = plan.train.model_copy(update={"data": str(data), "out": str(scratch / "run")})
    return plan.model_copy(update={"train": train})


def _record(scratch: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((scratch / "run" / "measurement.json").read_text(encoding="utf-8"))
    return found


def _told(record: dict[str, Any]) -> dict[str, Any]:
    plan = record["plan"]
    return {
        "total_tokens": record["total_tokens"],
        "choices": {choice["id"]: choice["knobs"] for choice in plan["choices"]},
        "high_bytes": plan["memory"]["gpu"]["peak_bytes"]["high"],
        "allocated_bytes": record["measured"]["gpu"]["allocated_bytes"],
        "reserved_bytes": record["measured"]["gpu"]["reserved_bytes"],
        "losses": record["losses"],
        "evaluation": record["evaluation"],
        "replanned": record["replanned"],
        "resumed": record["resumed"],
    }


def run_apart(case: Taken, out: Path, card: int) -> str:
    """Both runs of a case on one of the cards, each in a process of its own; gives what came of them in a line."""
    began, found, said = time.monotonic(), {}, ""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": str(card)}
    with tempfile.TemporaryDirectory() as folder:
        for verb in ("undisturbed", "disturbed"):
            record = Path(folder) / f"{verb}.json"
            words = [sys.executable, "-m", "reports.validation.taken", verb, case.name, str(record)]
            done = subprocess.run(words, capture_output=True, text=True, check=False, env=environment, timeout=SECONDS)
            said += done.stdout + done.stderr
            if done.returncode or not record.is_file():
                write_whole(out / f"{case.name}.failed.txt", said)
                return f"{case.name:40} {time.monotonic() - began:5.0f} s  FAILED: {said.strip()[-300:]}"
            found |= json.loads(record.read_text(encoding="utf-8"))
    write_whole(out / f"{case.name}.json", json.dumps(found, indent=1) + "\n")
    return f"{case.name:40} {time.monotonic() - began:5.0f} s  ended"


def run_all(cases: Sequence[Taken], out: Path, cards: int) -> None:
    """One at a time on each card: a process that takes a card takes it from all."""
    waiting = deque(cases)

    def work(card: int) -> None:
        with suppress(IndexError):
            while True:
                print(run_apart(waiting.popleft(), out, card), flush=True)

    workers = [threading.Thread(target=work, args=(card,)) for card in range(cards)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()


def main(arguments: Sequence[str] | None = None) -> int:
    """See the module's docstring."""
    known = {case.name: case for case in CASES}
    parser = argparse.ArgumentParser(prog="python -m reports.validation.taken", description=__doc__.splitlines()[0])
    verbs = parser.add_subparsers(dest="verb", required=True)
    verbs.add_parser("plan")
    every = verbs.add_parser("run")
    every.add_argument("out", type=Path)
    every.add_argument("names", nargs="*", metavar="NAME")
    every.add_argument("--cards", type=int, default=1)
    for verb in ("undisturbed", "disturbed"):
        one = verbs.add_parser(verb, help="one of the two runs of a case, in this process")
        one.add_argument("name", choices=known)
        one.add_argument("record", type=Path)
    given = parser.parse_args(arguments)
    if given.verb == "plan":
        for case in CASES:
            print(f"{case.name:40} {freeze(Case(case.name, case.arguments), FOLDER / 'plans')}", flush=True)
    elif given.verb == "run":
        if unknown := {*given.names} - {*known}:
            parser.error(f"no case is called {min(unknown)}")
        given.out.mkdir(parents=True, exist_ok=True)
        run_all([case for case in CASES if not given.names or case.name in given.names], given.out, given.cards)
    else:
        case, plan = known[given.name], plan_of(known[given.name])
        with tempfile.TemporaryDirectory() as folder:
            scratch = Path(folder)
            found = undisturbed(plan, scratch) if given.verb == "undisturbed" else disturbed(case, plan, scratch)
        write_whole(given.record, json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
