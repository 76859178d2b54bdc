"""What attention kernels took on this card, kept from one run to the next: by card, by versions, and by shape.

It lies beside the profiles of `plan measure`, in ``kernels.json``. Another card or library has entries of its own; to
measure again, remove the file.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from planner.cli_output import write_whole
from planner.errors import PlanError
from planner.own_profile import folder

FILE = "kernels.json"


def place() -> Path:
    """Where it lies."""
    return folder() / FILE


def on_this_card(device: torch.device, shape: str) -> str:
    """What an entry goes by: the card, the versions that decide which kernels there are, and the shape in words."""
    card = torch.cuda.get_device_properties(device)
    versions = f"torch {torch.__version__}, CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"
    return f"{getattr(card, 'uuid', card.name)}, {versions}: {shape}"


def remembered(entry: str) -> dict[str, float] | None:
    """Seconds by kernel as they were measured before; None where they were not, or the file is none of ours."""
    found = _read().get(entry)
    if not isinstance(found, dict) or not found:
        return None
    whole = all(isinstance(seconds, float) and 0 < seconds < math.inf for seconds in found.values())
    return dict(found) if whole else None


def remember(entry: str, seconds: Mapping[str, float]) -> None:
    """Keep what was measured. Where nothing can be written there, the next run measures again."""
    try:
        place().parent.mkdir(parents=True, exist_ok=True)
        write_whole(place(), json.dumps(_read() | {entry: dict(seconds)}, indent=1, sort_keys=True) + "\n")
    except (OSError, PlanError):
        return


def _read() -> dict[str, Any]:
    try:
        found = json.loads(place().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
