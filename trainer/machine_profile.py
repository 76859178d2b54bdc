"""The measured profile of the machine at hand: what `plan measure` finds, put into a card's profile."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from planner.errors import PlanError
from planner.hardware import HardwareProfile, Sourced
from planner.machine import host_ram_bytes, machine_name
from trainer import benchmark
from trainer.benchmark import Device, Tell
from trainer.benchmark_device import TorchDevice

ProbeContext = Callable[[], dict[str, Any]]
_PROBE_SECONDS = 300


def measured_profile(
    card: HardwareProfile,
    tell: Tell,
    *,
    quick: bool = False,
    effort: benchmark.Effort | None = None,
    device: Device | None = None,
    probe_context: ProbeContext | None = None,
) -> HardwareProfile:
    """The profile of a card or a CPU with what this machine reaches.

    Args:
        card: what is known without measuring (`planner.machine`).
        effort: how hard to try; None chooses by kind and ``quick``.
        device, probe_context: what is measured; None takes torch's and a process of its own.

    Raises:
        PlanError: torch sees no card, or the fresh process fails.
    """
    on_card = card.kind == "gpu"
    if on_card and device is None and not torch.cuda.is_available():
        why = f"torch {torch.__version__} sees no CUDA device, though the driver lists {card.name}."
        raise PlanError("plan measure --gpu local", why, "Install torch with CUDA, or use --gpu cpu.")
    if effort is None:
        gpu, cpu = (benchmark.GPU_QUICK, benchmark.CPU_QUICK) if quick else (benchmark.GPU, benchmark.CPU)
        effort = gpu if on_card else cpu
    effort = _within(effort, card.budget_bytes() or 0, host_ram_bytes())
    source = f"plan measure{' --quick' if quick else ''}, torch {torch.__version__}"
    if on_card:
        tell("CUDA context, in a process of its own")
        found = (probe_context or _fresh_process)()
        visible = Sourced(found["visible_bytes"], f"{source}: total_memory", basis="measured")
        card = replace(card, visible_bytes=visible)
        if found["context_bytes"] is not None:
            what = "what the driver booked for a fresh process after a small step, less what torch reserved"
            card = replace(card, context_bytes=Sourced(found["context_bytes"], f"{source}: {what}", basis="measured"))
    measured = benchmark.measure(
        device or TorchDevice(torch.device("cuda", 0) if on_card else torch.device("cpu")),
        effort,
        source=source if on_card else f"{source}, {torch.get_num_threads()} threads",
        machine=machine_name(),
        host_memory=host_ram_bytes(),
        tell=tell,
    )
    return replace(card, measured=measured, in_use_bytes=Sourced(0, source, basis="assumed"))


def _within(effort: benchmark.Effort, device_bytes: int, host_bytes: int) -> benchmark.Effort:
    """The same effort with buffers that both memories have room for: two of them are a quarter at most."""
    return replace(
        effort,
        copied=min(effort.copied, device_bytes // 8),
        linked=min(effort.linked, device_bytes // 8, host_bytes // 8),
        pinned=min(effort.pinned, host_bytes // 8),
    )


def _fresh_process() -> dict[str, Any]:
    command = [sys.executable, "-m", "trainer.context_probe"]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_PROBE_SECONDS, check=False, env=os.environ
        )
    except subprocess.TimeoutExpired as error:
        raise PlanError("the CUDA context", f"a process that measures it took over {_PROBE_SECONDS} s.") from error
    if done.returncode != 0:
        last = done.stderr.strip().splitlines()[-1:] or ["it said nothing"]
        raise PlanError("the CUDA context", f"the process that measures it failed: {last[0]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))
