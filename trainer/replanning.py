"""A run that gets less memory than it was planned for: what it had done by then, and the next smaller plan.

A step that fails has changed nothing but gradients: adapters, optimiser and schedule are as the last step left them,
until the optimiser begins with its own. They are put into host memory, everything is built anew by a plan that takes
less, and training goes on with the step that failed.
"""

from __future__ import annotations

import gc
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from planner.errors import PlanError
from planner.machine import free_host_bytes
from planner.plan import Plan
from planner.smaller import smaller_plan
from planner.units import format_bytes
from trainer.beginning import Place
from trainer.built import BuiltRun
from trainer.measure import host_anonymous_bytes
from trainer.out_of_memory import asked_bytes
from trainer.probing import SHORTER, give_back_unused
from trainer.saving import FOLDER, Saved, between_steps, store

Replan = Literal["never", "late", "always"]
"""When too little memory is answered with another plan: not at all, while it trains, or by the probe step as well."""
MOST = 5
"""Plans that are tried one after the other; each takes less than the one before."""


@dataclass(frozen=True)
class Short:
    """What there is to know of a run that had too little memory. Nothing of it is on the card.

    Attributes:
        why: in some sentences.
        lacked: bytes that were asked for and not given, or by which a bound was exceeded; 0 where nobody told.
        saved: what was done by then; None where training had not begun.
    """

    why: str
    lacked: int
    saved: Saved | None = None


class TooLittle(Exception):
    """Memory ran out where the run can go on from."""

    def __init__(self, short: Short) -> None:
        super().__init__(short.why)
        self.short = short


def kept(out: Path, built: BuiltRun, place: Place, rows: str, about: dict[str, Any]) -> Saved:
    """All that training goes on from, in host memory.

    Args:
        out: the run's folder.
        rows, about: see `Saved`.
    """
    assert place.schedule is not None, "training has begun"
    if built.device.type == "cuda":
        torch.cuda.synchronize(built.device)  # copies that were under way have arrived, or are of no use
    state = _in_host(between_steps(built, place.schedule))
    return Saved(out / FOLDER, place.step, None, place.skips, rows, about, state, elsewhere=True)


def _in_host(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {name: _in_host(each) for name, each in value.items()}
    return [_in_host(each) for each in value] if isinstance(value, list) else value


def smaller(short: Short, plan: Plan, device: torch.device, tell: Callable[[str], None], *, last: bool) -> Plan:
    """The plan to go on with; what was built by the one before has to be gone.

    Args:
        tell: hears of it.
        last: whether it was the last that is tried.

    Raises:
        PlanError: nothing smaller fits. What was done is stored then, and can be gone on with.
    """
    gc.collect()  # modules and their hooks know each other in circles, and tensors of the card hang on them
    give_back_unused(device)
    limit = min(plan.memory.gpu.peak_bytes.high - max(1, short.lacked), _to_have(plan, device))
    made = smaller_plan(plan, limit, shorter=short.saved is None) if limit > 0 and not last else None
    asked = f"{plan.total_tokens:,} tokens on {plan.gpu.name}"
    if made is None:
        settings = f"{MOST} plans were tried." if last else "The same training fits in less by no other settings."
        why = f"{short.why} {settings}"
        raise PlanError(asked, why, _to_go_on(short, plan))
    tell(f"{asked}: {short.why}")
    length = "" if made.total_tokens == plan.total_tokens else f"for {made.total_tokens:,} tokens, "
    goes_on = "" if short.saved is None else f" It goes on {short.saved.where}."
    tell(
        f"Planned again, {length}within {format_bytes(limit)}: {_differences(plan, made)}; "
        f"its bound is {format_bytes(made.memory.gpu.peak_bytes.high)}.{goes_on}"
    )
    return made


def _to_have(plan: Plan, device: torch.device) -> int:
    """Bytes that the run could have now, where somebody else took some meanwhile."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return min(plan.memory.gpu.budget_bytes, free + torch.cuda.memory_reserved(device))
    return min(plan.memory.gpu.budget_bytes, free_host_bytes() + host_anonymous_bytes())


def _differences(plan: Plan, made: Plan) -> str:
    before, now = ({choice.id: choice.knobs for choice in each.choices} for each in (plan, made))
    told = [f"with {name}" for name in now if name not in before]
    told += [f"without {name}" for name in before if name not in now]
    told += [
        f"{name}.{knob}={value}"
        for name, knobs in now.items()
        for knob, value in knobs.items()
        if name in before and value != before[name].get(knob)
    ]
    return ", ".join(told) or "by the same settings"


def _to_go_on(short: Short, plan: Plan) -> str:
    if short.saved is None or short.saved.step == 0:
        return SHORTER
    store(short.saved, plan)
    where, command = short.saved.where, f"plan --plan {Path(plan.train.out) / 'plan.yaml'} --execute --resume"
    return f"What was done is stored: with more memory `{command}` goes on {where}."


def lacked_of(error: RuntimeError) -> int:
    """Bytes that were asked for when memory ran out; 0 where the error does not say."""
    found = re.search(r"you tried to allocate (\d+) bytes", str(error))  # the CPU's allocator
    return int(found[1]) if found else asked_bytes(error)
