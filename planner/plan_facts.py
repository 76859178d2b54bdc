"""What a plan says of its card and its model, and by which it is seen later whether they are still the same."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from planner.hardware import HardwareProfile, is_file
from planner.model import ModelShape, shipped_folder
from planner.plan import Gpu

RANDOM = "random:"
"""Before a model: its shape with random weights, to measure with; bytes are tokens where it has no tokenizer."""


def gpu_facts(gpu: HardwareProfile, asked: str) -> Gpu:
    """Args: asked: as ``--gpu`` named it."""
    return Gpu(
        id=gpu.id,
        name=gpu.name,
        kind=gpu.kind,
        compute_capability=".".join(map(str, gpu.compute_capability)) if gpu.compute_capability else None,
        visible_bytes=int(gpu.visible_bytes.value or 0),
        context_bytes=int(gpu.context_bytes.value or 0),
        context_basis=gpu.context_bytes.basis,
        measured_file=gpu.measured.file if gpu.measured is not None and gpu.measured.file else None,
        profile_file=str(Path(asked).expanduser().resolve()) if is_file(asked) else None,
    )


def source_of(name: str, model: ModelShape) -> str:
    """What the trainer loads: a hub id for a shipped model; a path made absolute, to run the plan from anywhere."""
    bare = name.removeprefix(RANDOM)
    if shipped_folder(model.id) is not None and not Path(bare).expanduser().exists():
        return f"{RANDOM}{model.id}" if name.startswith(RANDOM) else model.hub_id or model.id
    path = Path(bare).expanduser()
    if path.name == "config.json" and path.is_file():
        path = path.parent  # the weights lie beside it
    return (RANDOM if name.startswith(RANDOM) else "") + (str(path.resolve()) if path.exists() else bare)


def slug(name: str) -> str:
    return "".join(c if c.isalnum() or c in "-._" else "-" for c in name)


def profile_data(gpu: HardwareProfile) -> dict[str, Any]:
    """The profile as plain data, but for where its file lies and which one of its kind it is.

    Where nobody measured there is no word of it, so that a profile's hash stays what it was.
    """
    data = asdict(gpu)
    measured, _ = data.pop("measured"), data.pop("uuid")
    return data if measured is None else data | {"measured": measured | {"file": ""}}


def digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()
