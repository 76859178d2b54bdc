"""The folder of a finished run: its plan, and its adapter on a model that was built as the plan says."""

from __future__ import annotations

from pathlib import Path

from peft import PeftModel, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from planner.errors import PlanError
from planner.finished import ADAPTER

Adapter = dict[str, Tensor]


def read_adapter(folder: Path) -> Adapter:
    """The adapter of a run, in host memory.

    Raises:
        PlanError: it cannot be read.
    """
    try:
        return load_file(folder / ADAPTER)
    except (OSError, SafetensorError) as error:
        raise PlanError(f"adapter {folder / ADAPTER}", f"cannot be read: {error}.") from error


def put_on(adapted: PeftModel, adapter: Adapter, folder: Path) -> None:
    """Give a model with fresh adapters that of a run.

    Raises:
        PlanError: it is not the plan's.
    """
    file = folder / ADAPTER
    wanted = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]
    if len(adapter) != len(wanted):
        raise PlanError(f"adapter {file}", f"holds {len(adapter)} tensors, and the plan's has {len(wanted)}.")
    try:
        unknown = set_peft_model_state_dict(adapted, adapter).unexpected_keys
    except (RuntimeError, KeyError) as error:
        raise PlanError(f"adapter {file}", f"does not fit the plan's model: {str(error).splitlines()[0]}") from error
    if unknown:
        raise PlanError(f"adapter {file}", f"does not fit the plan's model, which has no {unknown[0]}.")
