"""How much of a streamed step is attention alone, and how much of its copying is hidden; on a CUDA card.

    python -m reports.validation.floor OUT PLAN [--layers N] [--step SECONDS]

The *floor* is what the kernel of a plan takes at the plan's length and group of heads, run on nothing but random
numbers: two forward passes (one of them the backward pass's own) and a backward pass, for all groups and layers. Then
a step of the first layers is run under torch's profiler: from the trace come the time that anything is copied, the part
of it in which a kernel runs too, and the time in which the card does neither. ``--step`` is the time of a whole step,
from the record of its run, for the share of the floor in it. OUT gets the record.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from planner.plan import Plan
from planner.plan_file import load_plan
from trainer.built import BuiltRun
from trainer.data import synthetic_batch
from trainer.record import environment, revision
from trainer.session import build
from trainer.step import nothing
from trainer.streamed.kernels import KERNELS

Interval = tuple[float, float]


def seconds_of(work: Callable[[], object], repeats: int = 3) -> float:
    """The fastest of some runs, after one that is not counted."""
    found = []
    for _ in range(repeats + 1):
        torch.cuda.synchronize()
        began = time.perf_counter()
        work()
        torch.cuda.synchronize()
        found.append(time.perf_counter() - began)
    return min(found[1:])


def floor_of(plan: Plan, built: BuiltRun) -> dict[str, float]:
    """Seconds of attention alone, for one group of heads and for a whole step."""
    assert built.streamed is not None
    sizes, kernel = built.streamed.layers.sizes, KERNELS[str(plan.knobs("streamed")["kernel"])]
    tokens, size = plan.total_tokens, sizes.head_size
    key_heads = -(-sizes.group * sizes.key_heads // sizes.heads)

    def some(heads: int) -> torch.Tensor:
        return torch.randn(1, heads, tokens, size, dtype=sizes.dtype, device=built.device)

    query, key, value, gradient = some(sizes.group), some(key_heads), some(key_heads), some(sizes.group)
    scale = size**-0.5
    output, sums = kernel.forward(query, key, value, True, scale)
    forward = seconds_of(lambda: kernel.forward(query, key, value, True, scale))
    backward = seconds_of(lambda: kernel.backward(gradient, query, key, value, output, sums, True, scale))
    groups = -(-sizes.heads // sizes.group)
    return {
        "group_forward": forward,
        "group_backward": backward,
        "step": plan.model.layers * groups * (2 * forward + backward),
    }


def joined(intervals: Iterable[Interval]) -> list[Interval]:
    """The same time, without overlaps, in order."""
    found: list[Interval] = []
    for start, stop in sorted(intervals):
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(found[-1][1], stop))
        else:
            found.append((start, stop))
    return found


def length(intervals: Iterable[Interval]) -> float:
    """The time that intervals without overlaps cover."""
    return sum(stop - start for start, stop in intervals)


def both(first: list[Interval], second: list[Interval]) -> float:
    """The time that is in both."""
    return length(first) + length(second) - length(joined([*first, *second]))


def overlap_of(built: BuiltRun, plan: Plan, layers: int) -> dict[str, float]:
    """Of a step of the first layers: seconds of copies, of those beside kernels, and of neither."""
    batch = synthetic_batch(1, plan.total_tokens, plan.target, built.base.config.vocab_size, 0).to(built.device)

    def step() -> None:
        loss = built.loss(batch, torch.tensor(float(batch.trained), device=built.device), nothing)
        loss.backward()

    with built.first_layers(layers):
        step()
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA]) as trace:
            step()
            torch.cuda.synchronize()
    kernels, copies = [], []
    for event in trace.events():
        if event.device_type.name != "CUDA":
            continue
        span = (event.time_range.start / 1e6, event.time_range.end / 1e6)
        between = "HtoD" in event.name or "DtoH" in event.name
        (copies if between else kernels).append(span)
    computing, copying = joined(kernels), joined(copies)
    whole = joined([*kernels, *copies])
    return {
        "seconds": whole[-1][1] - whole[0][0],
        "computing": length(computing),
        "copying": length(copying),
        "copying_hidden": both(computing, copying),
        "idle": whole[-1][1] - whole[0][0] - length(whole),
    }


def measured(plan: Plan, layers: int, step: float | None) -> dict[str, Any]:
    """The record."""
    built = build(plan)
    floor = floor_of(plan, built)
    overlap = overlap_of(built, plan, layers)
    built.close()
    return {
        "model": plan.model.id,
        "tokens": plan.total_tokens,
        "streamed": dict(plan.knobs("streamed")),
        "floor_seconds": floor,
        "step_seconds": step,
        "step_over_floor": None if step is None else step / floor["step"],
        "layers_traced": layers,
        "trace_seconds": overlap,
        "copying_hidden_share": overlap["copying_hidden"] / overlap["copying"],
        "environment": environment(built.device),
        "revision": revision(),
    }


def main() -> int:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description="attention alone, and how copies are hidden")
    parser.add_argument("out", type=Path)
    parser.add_argument("plan", type=Path)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--step", type=float)
    asked = parser.parse_args()
    found = measured(load_plan(asked.plan), asked.layers, asked.step)
    asked.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({name: found[name] for name in ("floor_seconds", "step_over_floor", "trace_seconds")}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
