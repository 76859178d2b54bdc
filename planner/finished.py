"""The folder of a finished run, as what comes after training finds it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from planner.errors import PlanError

if TYPE_CHECKING:
    from planner.plan import Plan

ADAPTER = Path("adapter") / "adapter_model.safetensors"


def plan_of_run(asking: str, folder: Path) -> Plan:
    """The plan of a finished run.

    Args:
        asking: the command, for its error.

    Raises:
        PlanError: it is no such folder, or its plan cannot be read.
    """
    from planner.plan_file import load_plan

    if not (folder / "plan.yaml").is_file() or not (folder / ADAPTER).is_file():
        raise PlanError(f"{asking} {folder}", "is not the folder of a finished run: that has plan.yaml and adapter/.")
    return load_plan(folder / "plan.yaml")
