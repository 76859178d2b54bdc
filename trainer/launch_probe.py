"""How many kernels a second the host launches, by steps of a small model that leave any card waiting for its host.

    python -m trainer.launch_probe PROFILE [OPTIMISATION+OPTIMISATION+…]…

It is a process of its own, because a run is held to a plan's share of the card for as long as its process lasts. The
model is planned and built as every other; its layers are checkpointed and its weights in 16 bits, unless other kinds of
step are named. What formulas count as kernels of a step (`planner.launches`) and its seconds are printed, as one JSON
list of an object for each kind: ``kernels``, ``seconds``.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from planner.errors import PlanError
from planner.explain_formulas import planned_run
from planner.ledger import Resource
from planner.optimizations import all_optimizations
from planner.plan import Plan
from planner.planning import Request, make_plan
from trainer.built import BuiltRun
from trainer.data import synthetic_batch
from trainer.session import build
from trainer.step import nothing

TOKENS, LAYERS, WIDTH = 1024, 8, 256
STEPS, WARMING = 30, 5
PLAIN = ("lora", "chunked_loss", "gradient_checkpointing")
WHERE_IT_CAN = ("mixed_precision", "exact_attention")
"""On where the card has it."""
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "hidden_size": WIDTH,
    "intermediate_size": 2 * WIDTH,
    "max_position_embeddings": 4096,
    "num_attention_heads": 4,
    "num_hidden_layers": LAYERS,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "vocab_size": 512,
}


def small_plan(gpu: str, folder: Path, on: Iterable[str] = PLAIN) -> Plan:
    """The plan of a step that gives no card anything to do.

    Args:
        gpu: the card's profile.
        folder: where the model's config is put.
        on: what must be on; nothing else is, but for 16 bits and an attention kernel where the card has them.
    """
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
    for more in (WHERE_IT_CAN, WHERE_IT_CAN[:1], WHERE_IT_CAN[1:]):
        with contextlib.suppress(PlanError):
            return _planned(gpu, folder, {*on, *more})
    return _planned(gpu, folder, set(on))


def _planned(gpu: str, folder: Path, on: set[str]) -> Plan:
    excluded = set(all_optimizations()) - on
    return make_plan(
        Request(
            gpu=gpu,
            model=f"random:{folder}",
            total_tokens=TOKENS,
            required=tuple(sorted(on)),
            excluded=tuple(sorted(excluded)),
        )
    )


def counted_kernels(plan: Plan, gpu: str) -> float:
    """As many as formulas say a forward and backward pass launches; `planner.launches.FOUR_BIT` is in it."""
    run = planned_run(plan, gpu)
    work = run.configuration.ledger.work.values()
    return float(sum(each.amount(run.letters) for each in work if each.resource is Resource.LAUNCH))


def step_seconds(runs: Sequence[BuiltRun]) -> list[float]:
    """Seconds of a forward and backward pass of each; the median of some, after others, by turns.

    By turns, because a host that others use as well is faster at one moment than at another.
    """
    found: list[list[float]] = [[] for _ in runs]
    for _ in range(WARMING + STEPS):
        for built, seconds in zip(runs, found, strict=True):
            vocab = built.base.config.vocab_size
            batch = synthetic_batch(1, TOKENS, TOKENS, vocab, 0, built.most_documents).to(built.device)
            divisor = torch.tensor(float(batch.trained), device=built.device)
            _wait(built.device)
            began = time.perf_counter()
            built.loss(batch, divisor, nothing).backward()
            _wait(built.device)
            seconds.append(time.perf_counter() - began)
    return [statistics.median(seconds[WARMING:]) for seconds in found]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def launched(gpu: str, kinds: Iterable[Iterable[str]] = (PLAIN,)) -> list[dict[str, float]]:
    """Kernels and seconds of a step of each kind: what must be on in it (`small_plan`)."""
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as opened:
        plans = [small_plan(gpu, Path(folder), on) for on in kinds]
        runs = [opened.enter_context(contextlib.closing(build(plan))) for plan in plans]
        counted = [counted_kernels(plan, gpu) for plan in plans]
        seconds = step_seconds(runs)
    return [{"kernels": kernels, "seconds": each} for kernels, each in zip(counted, seconds, strict=True)]


if __name__ == "__main__":
    print(json.dumps(launched(sys.argv[1], [kind.split("+") for kind in sys.argv[2:]] or (PLAIN,))))
