"""The optimiser of a run: which one, and at which rate each matrix of an adapter learns."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from peft import PeftModel
from peft.optimizers import create_loraplus_optimizer

from planner.plan import Plan, Train


@dataclass
class OptimizerChoice:
    """What hooks ask of the optimiser.

    Attributes:
        name: of the optimiser.
        ratio: how many times as fast as the first matrix of an adapter the second learns; None: both as fast.
        rows: of a step, for which ``train.lr`` is; None: whatever a step has.
    """

    name: Literal["adamw", "adamw_8bit"] = "adamw"
    ratio: float | None = None
    rows: int | None = None

    def rate(self, train: Train) -> float:
        """The highest rate of a run."""
        if self.rows is None:
            return train.lr
        return train.lr * math.sqrt(train.batch * train.accumulation / self.rows)

    def optimizer(self, model: PeftModel, train: Train) -> torch.optim.Optimizer:
        """The optimiser over all that is trained."""
        given: dict[str, Any] = {"lr": self.rate(train)}
        if self.name == "adamw_8bit":
            from bitsandbytes.optim import AdamW8bit

            kind: Any = AdamW8bit
        else:
            kind, given["fused"] = torch.optim.AdamW, True
        if self.ratio is None:
            parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
            return kind(parameters, weight_decay=train.weight_decay, **given)
        # It sets ``weight_decay`` to 0 by itself and takes it by another name.
        given |= {"loraplus_lr_ratio": self.ratio, "loraplus_weight_decay": train.weight_decay}
        made = create_loraplus_optimizer(model, kind, **given)
        made.param_groups[:] = [group for group in made.param_groups if group["params"]]
        return made


def rates_told(plan: Plan, found: float | None = None) -> str:
    """The highest rate of a plan's run, or that which was found, and that of second matrices where it is another."""
    rows, ratio = plan.knobs("batch_rate").get("rows"), plan.knobs("lora_plus").get("ratio")
    planned = OptimizerChoice(rows=None if rows is None else int(rows)).rate(plan.train)
    rate = planned if found is None else found
    return (
        f"{rate:g}"
        + ("" if found is None else " (by a range test)")
        + ("" if ratio is None else f", {float(ratio) * rate:g} for second matrices")
    )
