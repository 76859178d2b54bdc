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
from traceback import clear_frames
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
from trainer.output import RunFolder
from trainer.probing import SHORTER, give_back_unused
from trainer.saving import FOLDER, STATE, Saved, between_steps, store

Replan = Literal["never", "late", "always"]
"""When too little memory is answered with another plan: not at all, while it trains, or by the probe step as well."""
LEAST_PART = 50  # of a bound: by so much at least the next one is lower
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


@dataclass(frozen=True)
class Asked:
    """What a run was asked for besides its plan; see `trainer.run.execute`."""

    layers_run: int | None = None
    last_held: int | None = None
    replan: Replan = "late"

    def answers(self, saved: Saved | None) -> bool:
        """Whether another plan answers before the first step, or before a plan that is another already goes on.

        What lies on the disk of a run that was stopped stays there for its own plan.
        """
        if saved is None:
            return self.replan == "always"
        return saved.elsewhere and self.replan != "never"


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


def answered(
    short: Short, plan: Plan, device: torch.device, folder: RunFolder, tell: Callable[[str], None], *, last: bool
) -> tuple[Plan, RunFolder]:
    """The plan to go on by and the folder with it; what was built by the one before has to be gone.

    What was done is stored before anything else, for the plan that did it, and for the new one once there is one.

    Args:
        tell: hears of it.
        last: whether it was the last plan that is tried.

    Raises:
        PlanError: nothing smaller fits.
    """
    saved, asked = short.saved, f"{plan.total_tokens:,} tokens on {plan.gpu.name}"
    if saved is not None:
        _stored(saved, plan, tell)
    let_go(device)
    limit = _limit(short, plan, device)
    try:
        host = min(plan.memory.host.budget_bytes, free_host_bytes() + host_anonymous_bytes())
        made = None if last or limit <= 0 else smaller_plan(plan, limit, host, shorter=saved is None)
        why = f"{MOST} plans were tried." if last else "The same training fits in less by no other settings."
    except PlanError as error:
        made, why = None, f"A smaller plan could not be made: {error}"
    if made is None:
        raise PlanError(asked, f"{short.why} {why}", SHORTER if saved is None else going_on(saved, plan))
    tell(f"{asked}: {short.why}")
    length = "" if made.total_tokens == plan.total_tokens else f"for {made.total_tokens:,} tokens, "
    goes_on = "" if saved is None else f" It goes on {saved.where}."
    tell(
        f"Planned again, {length}within {format_bytes(limit)}: {_differences(plan, made)}; "
        f"its bound is {format_bytes(made.memory.gpu.peak_bytes.high)}.{goes_on}"
    )
    try:
        folder = folder.replanned(made, None if saved is None else f"plan-until-step-{saved.step}.yaml")
    except PlanError as error:
        raise PlanError(error.asked, error.why, "" if saved is None else going_on(saved, plan)) from error
    if saved is not None:
        saved.replanned(short.why, plan)
        _stored(saved, made, tell)
    return made, folder


def _stored(saved: Saved, plan: Plan, tell: Callable[[str], None]) -> None:
    try:
        store(saved, plan)
    except PlanError as error:  # it is in memory still, and may go on
        tell(f"What was done so far could not be stored. {error}")


def going_on(saved: Saved, plan: Plan) -> str:
    """How a run is gone on with that was stored for a plan."""
    if not (saved.folder / STATE).is_file():
        return f"What was done until then, {saved.step} steps, could not be stored."
    command = f"plan --plan {Path(plan.train.out) / 'plan.yaml'} --execute --resume"
    return f"What was done is stored: `{command}` goes on {saved.where}."


def let_go(device: torch.device, error: BaseException | None = None) -> None:
    """Let go of all that hangs on what failed: a step, or a run that is over.

    Args:
        error: whose frames hold on to the tensors of a step; they are cleared.
    """
    if error is not None:
        clear_frames(error.__traceback__)
    # A backward pass that failed in this thread leaves in its queue what was ready; the next one drains it.
    with torch.autograd.set_multithreading_enabled(False):
        torch.ones((), requires_grad=True).clone().backward()
    gc.collect()  # modules and their hooks know each other in circles, and tensors of the card hang on them
    if device.type == "cuda":
        torch._C._cuda_clearCublasWorkspaces()  # those of a thread that the next plan may not have
    give_back_unused(device)


def _limit(short: Short, plan: Plan, device: torch.device) -> int:
    """What a bound may be at most: less by what lacked, and by enough to be worth building everything anew."""
    high = plan.memory.gpu.peak_bytes.high
    return min(high - max(short.lacked, high // LEAST_PART), _to_have(plan, device))


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


def lacked_of(error: RuntimeError) -> int:
    """Bytes that were asked for when memory ran out; 0 where the error does not say."""
    found = re.search(r"you tried to allocate (\d+) bytes", str(error))  # the CPU's allocator
    return int(found[1]) if found else asked_bytes(error)
