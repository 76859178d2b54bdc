"""The folder of a finished run: its plan, and its adapter on a model that was built as the plan says."""

from __future__ import annotations

from pathlib import Path

from peft import PeftModel, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file

from planner.errors import PlanError
from planner.finished import ADAPTER


def put_on(adapted: PeftModel, folder: Path) -> None:
    """Give a model with fresh adapters the adapter of a run.

    Raises:
        PlanError: it cannot be read, or is not the plan's.
    """
    file = folder / ADAPTER
    try:
        adapter = load_file(file)
    except (OSError, SafetensorError) as error:
        raise PlanError(f"adapter {file}", f"cannot be read: {error}.") from error
    wanted = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]
    if len(adapter) != len(wanted):
        raise PlanError(f"adapter {file}", f"holds {len(adapter)} tensors, and the plan's has {len(wanted)}.")
    try:
        set_peft_model_state_dict(adapted, adapter)
    except (RuntimeError, KeyError) as error:
        raise PlanError(f"adapter {file}", f"does not fit the plan's model: {str(error).splitlines()[0]}") from error
