"""The measurement record: one JSON document per run, the plan beside what was measured."""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from planner.plan import Plan
from trainer.built import BuiltRun
from trainer.judging import Judged
from trainer.measure import Recorder
from trainer.rates import RateFound
from trainer.stages import by_stage
from trainer.step import Evaluation
from trainer.streamed.loss import StreamedLoss

_PACKAGES = (
    "tierplan",
    "torch",
    "transformers",
    "peft",
    "bitsandbytes",
    "tokenizers",
    "safetensors",
    "accelerate",
)


@dataclass(frozen=True)
class Run:
    """What happened in a run, apart from memory.

    Attributes:
        step_seconds: of every optimiser step.
        probe_seconds: of the probe's forward, backward and optimiser step.
        losses: of every optimiser step.
        terms: exact bytes by group, taken after a step.
        before: held-out evaluation before training; None without validation documents.
        after: the same after training.
        resumed: where it was gone on from: steps and micro-batches done, and the layer to go back through.
        replanned: where it had too little memory: steps done, why, and the bound of the plan until then.
        judged: what evaluations while it trained gave.
        rate: what a range test of the learning rate gave.
        steps: that the run was to have.
    """

    step_seconds: Sequence[float]
    probe_seconds: float
    losses: Sequence[float]
    skipped_steps: int
    terms: Mapping[str, int]
    before: Evaluation | None
    after: Evaluation | None
    data: Mapping[str, Any]
    resumed: Sequence[Mapping[str, int | None]] = ()
    replanned: Sequence[Mapping[str, Any]] = ()
    judged: Judged = field(default_factory=Judged)
    rate: RateFound | None = None
    steps: int = 1


def host_predicted(plan: Plan) -> dict[str, int | None]:
    """What a plan says of host memory."""
    host = plan.memory.host
    return {
        "expected_bytes": host.expected_bytes,
        "peak_bytes": host.peak_bytes,
        "pinned_bytes": host.pinned_bytes,
    }


def measurement(plan: Plan, built: BuiltRun, recorder: Recorder, run: Run) -> dict[str, Any]:
    """The whole record; what a machine does not tell is null."""
    gpu = plan.memory.gpu
    timed = recorder.before["steps"] if recorder.before else None
    step_seconds = run.step_seconds[:timed]  # held to less memory, steps are not what anybody else would wait for
    stages = by_stage(step_seconds, run.steps, built.stages)
    alike = stages[-1]  # what the plan's seconds are of
    before = sum(map(len, stages[:-1]))
    return {
        "plan": plan.document(),
        "executor": plan.executor,
        "set": None,  # of one's own run; what is measured to validate says calibration or holdout
        "card": plan.gpu.id,
        "limit_bytes": gpu.budget_bytes,
        "model": {"id": plan.model.id, "source": plan.model.source},
        "layers": plan.model.layers,
        "layers_run": built.loss.layers.count if isinstance(built.loss, StreamedLoss) else plan.model.layers,
        "total_tokens": plan.total_tokens,
        "tokens_held": plan.train.batch * plan.total_tokens,
        "predicted": {
            "gpu": {
                "low_bytes": gpu.peak_bytes.low,
                "expected_bytes": gpu.peak_bytes.expected,
                "high_bytes": gpu.peak_bytes.high,
            },
            "host": host_predicted(plan),
            "phases": {phase: sum(terms.values()) for phase, terms in gpu.phases.items()},
            "terms": predicted_groups(plan),
            "step_seconds": plan.time.step_seconds.estimate,
        },
        "measured": {
            "gpu": {
                "allocated_bytes": recorder.peak("allocated_bytes"),
                "reserved_bytes": recorder.peak("reserved_bytes"),
                "driver_bytes": recorder.driver,
            },
            "before_held": recorder.before,
            "host": {"anonymous_bytes": recorder.host_anonymous, "pinned_bytes": recorder.pinned_bytes},
            "phases": {phase: dict(sizes) for phase, sizes in recorder.phases.items()},
            "terms": dict(run.terms),
        },
        "step_seconds": {
            "median": statistics.median(alike) if alike else None,
            "each": [round(seconds, 6) for seconds in run.step_seconds],
            "probe": round(run.probe_seconds, 6),
            "stages": [round(statistics.median(each), 6) if each else None for each in stages],
            "phases": {phase: round(seconds, 6) for phase, seconds in recorder.clock.medians(timed, before).items()},
        },
        "losses": list(run.losses),
        "skipped_steps": run.skipped_steps,
        "resumed": list(run.resumed),
        "replanned": list(run.replanned),
        "evaluation": {"before": _evaluation(run.before), "after": _evaluation(run.after)},
        "judged": run.judged.document(),
        "cache_released": [list(each) for each in built.cache_release.released] if built.cache_release else [],
        "rate_search": run.rate and run.rate.document(),
        "spikes": list(built.spikes.found) if built.spikes is not None else [],
        "data": dict(run.data),
        "kernel": built.kernel,
        "loss": built.loss_name,
        "dtype": str(built.dtype).removeprefix("torch."),
        "environment": environment(built.device),
        "revision": revision(),
    }


def predicted_groups(plan: Plan) -> dict[str, int]:
    """Predicted bytes of each group of terms on the device, in the phase where the group is largest."""
    largest: dict[str, int] = {}
    for terms in plan.memory.gpu.phases.values():
        sums: dict[str, int] = {}
        for name, size in terms.items():
            group = name.partition("/")[0]
            sums[group] = sums.get(group, 0) + size
        for group, size in sums.items():
            largest[group] = max(size, largest.get(group, 0))
    return largest


def environment(device: torch.device) -> dict[str, Any]:
    """Versions, machine and allocator: what another run would need to be the same."""
    found: dict[str, Any] = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "cpu": _cpu_name(),
        "threads": torch.get_num_threads(),
        "gpu": None,
        "allocator": None,
    }
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        found["gpu"] = {
            "name": card.name,
            "visible_bytes": card.total_memory,
            "compute_capability": f"{card.major}.{card.minor}",
            "driver": _driver_version(),
            "cuda": torch.version.cuda,
        }
        found["allocator"] = {
            "backend": torch.cuda.get_allocator_backend(),
            "settings": os.environ.get("PYTORCH_ALLOC_CONF") or os.environ.get("PYTORCH_CUDA_ALLOC_CONF"),
            "expandable_segments": any(part.get("is_expandable") for part in torch.cuda.memory_snapshot()),
            # How often it had to give unused pages back before it could give any: each time it waits for the card.
            "retries": torch.cuda.memory_stats(device)["num_alloc_retries"],
        }
    return found


def revision() -> str | None:
    """The git revision of this checkout, with ``-dirty`` where files differ; None outside a checkout."""
    if told := os.environ.get("TIERPLAN_REVISION"):
        return told  # a copy without its history, as on a machine that is lent for a measurement
    here = Path(__file__).resolve().parent.parent
    if not (here / ".git").exists():
        return None
    command = ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=40", "--exclude", "*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def _evaluation(made: Evaluation | None) -> dict[str, Any] | None:
    if made is None:
        return None
    return {"loss": made.loss, "perplexity": made.perplexity, "rows": made.rows, "tokens": made.tokens}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu_name() -> str | None:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), None)
    except OSError:
        return platform.processor() or None


def _driver_version() -> str | None:
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        told = pynvml.nvmlSystemGetDriverVersion()
    except pynvml.NVMLError:
        return None
    return told.decode() if isinstance(told, bytes) else str(told)
