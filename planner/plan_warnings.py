"""What a plan warns of: what was not measured, and what training at such a length does not promise."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from planner.calibration import calibration
from planner.compose import TRAIN_CLIPPING, TRAIN_SCHEDULE
from planner.optimizations import all_optimizations
from planner.optimizations.base import Scalar, Situation
from planner.plan import Rope, Time, Train
from planner.rope_scaling import rope_warnings
from planner.units import format_bytes, format_count, format_seconds

KERNELS_CHECKED = 524_288  # tokens; docs/decisions.md, attention kernels at length


def warnings_of(situation: Situation, total: int, rope: Rope, *, here: bool = False) -> list[str]:
    """A few sentences each, for sequences of ``total`` tokens.

    ``here``: whether the card is that of the machine at hand, which could be measured.
    """
    gpu, model = situation.gpu, situation.model
    warnings = []
    if here and gpu.measured is None:
        warnings.append(
            "This machine has not been measured. `plan measure` does it, in a minute or two, and writes a profile that "
            f"--gpu {'cpu' if gpu.kind == 'cpu' else 'local'} then plans with."
        )
    if gpu.kind == "gpu" and gpu.id not in calibration().document["measured_cards"]:
        warnings.append(
            f"No run on {gpu.name} is recorded: bound and times rest on runs on other cards (docs/validation.md)."
        )
    if gpu.context_bytes.basis == "assumed":
        size = format_bytes(int(gpu.context_bytes.value or 0))
        warnings.append(f"The CUDA context of {gpu.name} is assumed to be {size}, not measured.")
    warnings += rope_warnings(model, total, rope)
    if model.experts:
        warnings.append(
            f"Adapters and NF4 reach the linears of attention alone: the experts of {model.id}, {model.experts} in a "
            "layer, are no linears, so they stay as they are, in 16 or 32 bits."
        )
    if total > KERNELS_CHECKED:
        warnings.append(
            f"Exact attention kernels were checked against float64 up to {format_count(KERNELS_CHECKED)} tokens; "
            "beyond, some fail at 2,147,483,648 elements in one tensor."
        )
    rates = [f"{rate:g}" for rate in (model.residual_dropout, model.attention_dropout, model.embedding_dropout) if rate]
    if rates:
        warnings.append(f"The model's own dropout ({', '.join(rates)}) is off while training, so recomputing is exact.")
    return warnings


def settings_without_effect(train: Mapping[str, object], settings: Mapping[str, str]) -> list[str]:
    """A sentence for each setting of training in whose place an optimisation is.

    Args:
        train: settings that are asked for.
        settings: of the configuration: what schedules the learning rate, and what clips gradients.
    """
    usual, schedule, clipping = Train(), settings["schedule"], settings["clipping"]
    instead = {"max_grad_norm": f"{clipping} clips the gradients"} if clipping != TRAIN_CLIPPING else {}
    if schedule != TRAIN_SCHEDULE:
        names = ("schedule", "warmup") if schedule == "one_cycle" else ("schedule",)
        instead |= dict.fromkeys(names, f"{schedule} schedules the learning rate")
    return [
        f"--set train.{name}={train[name]} has no effect: {why}."
        for name, why in instead.items()
        if name in train and train[name] != getattr(usual, name)
    ]


def never_measured(ids: Iterable[str]) -> list[str]:
    """A sentence for each optimisation that no run on a card is recorded of."""
    return [
        f"No run with {name} on a card is recorded: what it changes of bytes and seconds is computed."
        for name in ids
        if not all_optimizations()[name].measured
    ]


SETTLES = ("constant", "warmup_stable_decay")
"""Schedules of the learning rate that hold it steady for most of a run."""


def schedule_beside(choices: Mapping[str, Mapping[str, Scalar]], train: Train, schedule: str) -> list[str]:
    """What does not go well with a learning rate that falls to the end of a run, with nothing held out, or few steps.

    Args:
        choices: knobs of what is on; ``schedule``: the setting of the configuration.
    """
    name = train.schedule if schedule == TRAIN_SCHEDULE else schedule
    steady = "--set train.schedule=constant holds it steady"
    steady = steady if schedule == TRAIN_SCHEDULE else f"without {name} {steady}"
    told = []
    if "early_stopping" in choices and not train.validation:
        told.append("early_stopping has no effect: --set train.validation=0 holds no documents out.")
    elif "early_stopping" in choices and name not in SETTLES:
        told.append(f"early_stopping may end training while the learning rate is high: by {name} it falls to the end; "
                    f"{steady}, and --with warmup_stable_decay does until near the end.")  # fmt: skip
    if choices.get("weight_averaging", {}).get("kind") == "swa" and name != "constant":
        told.append(f"The mean of the last steps (swa) is made for a steady learning rate, and by {name} it falls; "
                    f"{steady}.")  # fmt: skip
    stages = int(choices.get("context_stages", {}).get("stages", 1))
    if train.steps is not None and train.steps < stages:
        told.append(f"Some of the {stages} stages of context_stages have no step: --set train.steps={train.steps}.")
    if stages > 1 and "early_stopping" in choices:
        told.append("early_stopping may end training before context_stages comes to whole rows.")
    if train.evaluate_every and not train.validation:
        asked = f"--set train.evaluate_every={train.evaluate_every}"
        told.append(f"{asked} has no effect: train.validation=0 holds no documents out.")
    return told


FEWER = 30
"""Steps of a range test that still show a curve."""


FORWARD = ("forward", "attention", "loss")
"""Phases of a forward pass; that of the loss has its gradient in it, so it is a bound."""


def before_training(choices: Mapping[str, Mapping[str, Scalar]], time: Time) -> list[str]:
    """What is done before the first step and is in no time of the plan."""
    steps = choices.get("rate_range_test", {}).get("steps")
    if steps is None:
        return []
    step = time.step_seconds.estimate
    forward = sum(found.seconds or 0.0 for name, found in time.phases.items() if name in FORWARD)
    took = "" if step is None else f", about {format_seconds(int(steps) * (step + forward))}"
    return [
        f"rate_range_test makes {int(steps):,} steps and as many forward passes before training{took}, which no time "
        "here includes; a run that is stopped within them begins again."
        + (f" --set rate_range_test.steps={FEWER} makes fewer." if int(steps) > FEWER else "")
    ]


def disk_without_effect(disk_bytes: int, rejected: Mapping[str, Sequence[str]]) -> list[str]:
    """A sentence where a disk is offered and nothing is put on it."""
    if not disk_bytes or "checkpoint_disk" not in rejected:
        return []
    why = "; ".join(rejected["checkpoint_disk"])
    return [f"--disk {format_bytes(disk_bytes)} has no effect: checkpoint_disk, which would use it, is off ({why})."]


def knobs_without_effect(knobs: Mapping[str, Mapping[str, Scalar]], rejected: Mapping[str, Sequence[str]]) -> list[str]:
    """One sentence for each optimisation that is off though a knob of it was set."""
    return [
        f"{' '.join(f'--set {owner}.{name}={value}' for name, value in values.items())} has no effect: {owner} is off "
        f"({'; '.join(rejected[owner])}). --with {owner} would insist on it."
        for owner, values in knobs.items()
        if owner in rejected
    ]
