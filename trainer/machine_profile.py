"""The measured profile of the machine at hand: what `plan measure` finds, put into a card's profile."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from planner.errors import PlanError
from planner.hardware import HardwareProfile, Sourced
from planner.machine import host_ram_bytes, machine_name
from planner.profile_file import profile_text
from trainer import benchmark
from trainer.benchmark import Device, Tell
from trainer.benchmark_device import TorchDevice
from trainer.disk_benchmark import DISK_BYTES, QUICK_DISK_BYTES, disk_rate

Probe = Callable[..., Any]
"""Runs a module of ours in a process of its own, with arguments, and gives what it prints."""
PROBES = {"trainer.context_probe": "the CUDA context", "trainer.launch_probe": "launches of kernels"}
_PROBE_SECONDS = 300


def measured_profile(
    card: HardwareProfile,
    tell: Tell,
    *,
    quick: bool = False,
    effort: benchmark.Effort | None = None,
    device: Device | None = None,
    probe: Probe | None = None,
    scratch: Path | None = None,
) -> HardwareProfile:
    """The profile of a card or a CPU with what this machine reaches.

    Args:
        card: what is known without measuring (`planner.machine`).
        effort: how hard to try; None chooses by kind and ``quick``.
        device, probe: what is measured; None takes torch's, and processes of their own.
        scratch: a folder on the disk to measure; None measures none.

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
    probe, launched, disk = probe or fresh_process, None, None
    if scratch is not None:
        tell(f"the disk of {scratch}")
        disk = disk_rate(scratch, QUICK_DISK_BYTES if quick else DISK_BYTES)
    if on_card:
        tell("CUDA context, in a process of its own")
        found = probe("trainer.context_probe")
        visible = Sourced(found["visible_bytes"], f"{source}: total_memory", basis="measured")
        card = replace(card, visible_bytes=visible)
        if found["context_bytes"] is not None:
            what = "what the driver booked for a fresh process after a small step, less what torch reserved"
            card = replace(card, context_bytes=Sourced(found["context_bytes"], f"{source}: {what}", basis="measured"))
        tell("kernels launched by a small model, in a process of its own")
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "card.yaml"
            file.write_text(profile_text(card), encoding="utf-8")
            (step,) = probe("trainer.launch_probe", str(file))
            launched = step["kernels"] / step["seconds"]
    measured = benchmark.measure(
        device or TorchDevice(torch.device("cuda", 0) if on_card else torch.device("cpu")),
        effort,
        source=source if on_card else f"{source}, {torch.get_num_threads()} threads",
        machine=machine_name(),
        host_memory=host_ram_bytes(),
        tell=tell,
    )
    folder_of_disk = "" if scratch is None else str(scratch.expanduser().resolve())
    measured = replace(measured, kernels_per_second=launched, disk=disk, disk_folder=folder_of_disk)
    return replace(card, measured=measured, in_use_bytes=Sourced(0, source, basis="assumed"))


def _within(effort: benchmark.Effort, device_bytes: int, host_bytes: int) -> benchmark.Effort:
    """The same effort with buffers that both memories have room for: two of them are a quarter at most."""
    return replace(
        effort,
        normed=max(1, min(effort.normed, device_bytes // (8 * benchmark.NORM_BYTES))),
        linked=min(effort.linked, device_bytes // 8, host_bytes // 8),
        pinned=min(effort.pinned, host_bytes // 8),
    )


def fresh_process(module: str, *arguments: str) -> Any:
    """What a module of ours prints in a process of its own.

    Raises:
        PlanError: it fails, or does not end.
    """
    command, what = [sys.executable, "-m", module, *arguments], PROBES[module]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_PROBE_SECONDS, check=False, env=os.environ
        )
    except subprocess.TimeoutExpired as error:
        raise PlanError(what, f"a process that measures it took over {_PROBE_SECONDS} s.") from error
    if done.returncode != 0:
        last = done.stderr.strip().splitlines()[-1:] or ["it said nothing"]
        raise PlanError(what, f"the process that measures it failed: {last[0]}")
    return json.loads(done.stdout.splitlines()[-1])
