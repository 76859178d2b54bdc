"""A learning-rate range test: some steps by rates from small to large, and the rate that a rule takes from the losses.

It trains on the run's own first rows. Losses of two batches differ by more than a step can change them, so each batch's
loss is set against that of the same batch before any step was made. Afterwards adapters, optimiser and loss scale are
as they were: only the adapters are copied for that, into host memory, since the optimiser has done nothing yet.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice

import torch

from planner import svg
from planner.errors import PlanError
from planner.ledger import Phase
from planner.plan import Train
from trainer.built import BuiltRun
from trainer.data import Batch
from trainer.measure import BETWEEN, Recorder
from trainer.rates import RateFound, RateSearch
from trainer.step import evaluate, update
from trainer.training import Announce, forward_backward, nobody

BESIDE = 4
"""Steps before and after one that its smoothed loss is the mean of, as far as there are as many on both sides."""
DIVERGED = 3.0
"""The test ends where a loss is so many times what it was before training."""


def smoothed(changes: Sequence[float]) -> list[float]:
    """Each of them as the mean of itself and its neighbours, as many on either side."""
    found = []
    for place in range(len(changes)):
        beside = min(BESIDE, place, len(changes) - 1 - place)
        found.append(math.fsum(changes[place - beside : place + beside + 1]) / (2 * beside + 1))
    return found


def steepest(curve: Sequence[tuple[float, float, float]]) -> float | None:
    """The rate at which the smoothed change falls most for the same factor of the rate, before it is least."""
    if len(curve) < 3:
        return None
    least = min(range(len(curve)), key=lambda place: curve[place][2])
    slopes = {
        place: (curve[place + 1][2] - curve[place - 1][2]) / math.log(curve[place + 1][0] / curve[place - 1][0])
        for place in range(1, min(least + 1, len(curve) - 1))
    }
    if not slopes or min(slopes.values()) >= 0:
        return None
    return curve[min(slopes, key=lambda place: slopes[place])][0]


def half_least(curve: Sequence[tuple[float, float, float]]) -> float | None:
    """Half of the rate after which the smoothed change is least; None where the loss never falls.

    At the least itself the steps begin to be too large: beyond it the loss rises.
    """
    if len(curve) < 3:
        return None
    rate, _, least = min(curve, key=lambda each: each[2])
    return rate / 2 if least < min(0.0, curve[0][2]) else None


RULES: Mapping[str, tuple[Callable[[Sequence[tuple[float, float, float]]], float | None], str]] = {
    "half_least": (half_least, "half of the rate at which the loss is least"),
    "steepest": (steepest, "where the loss falls steepest"),
}
"""What may be taken from a curve, and what it is in words."""


def search_rate(
    search: RateSearch,
    built: BuiltRun,
    train: Train,
    batches: Callable[[], Iterator[Batch]],
    recorder: Recorder,
    announce: Announce = nobody,
    show: Callable[[int, float, float], None] = lambda step, rate, loss: None,
) -> RateFound:
    """Try the rates, put everything back, and give what came of it.

    Args:
        batches: micro-batches of the run, from its first on, as often as they are asked for.
        show: hears of each step: its number, its rate, its loss.
    """
    adapters = [parameter.detach().to("cpu", copy=True) for parameter in built.trained]
    optimizer = copy.deepcopy(built.optimizer.state_dict())
    scaler = built.scaler.state_dict() if built.scaler is not None else None
    highest = [group["lr"] for group in built.optimizer.param_groups]
    planned = min(highest)
    rates = search.rates()
    made: list[tuple[float, float, float]] = []  # rate, loss, and by how much that is more than it was before
    try:
        before = _before(built, rates, batches(), train.accumulation, recorder, announce)
        for step, (rate, untrained, parts) in enumerate(_steps(rates, before, batches(), train.accumulation), start=1):
            for group, own in zip(built.optimizer.param_groups, highest, strict=True):
                group["lr"] = rate * own / planned  # LoRA+ has two rates, in a ratio that stays
            announce(f"range test, step {step} of {search.steps}", [part.tokens for part in parts])
            loss = forward_backward(built, parts, recorder)
            recorder.mark(Phase.OPTIMIZER)
            if not math.isfinite(loss) and built.scaler is None:
                break
            if math.isfinite(loss):
                made.append((rate, loss, loss - untrained))
                show(step, rate, loss)
                if loss > DIVERGED * untrained:
                    break
            shape = partial(built.shaping.shape, built.trained, built.first_matrices, step - 1, train.max_grad_norm)
            try:
                update(built.optimizer, built.scaler, shape)
            except PlanError:  # gradients that are no numbers, which is as far as a rate can go
                break
            recorder.mark(BETWEEN)
    finally:
        recorder.mark(BETWEEN)
        with torch.no_grad():
            for parameter, value in zip(built.trained, adapters, strict=True):
                parameter.copy_(value)
        built.optimizer.load_state_dict(optimizer)
        built.optimizer.zero_grad(set_to_none=False)
        if built.scaler is not None and scaler is not None:
            built.scaler.load_state_dict(scaler)
    changes = smoothed([change for *_, change in made])
    curve = tuple((rate, loss, change) for (rate, loss, _), change in zip(made, changes, strict=True))
    rule, told = RULES[search.rule]
    return RateFound(curve, rule(curve), told)


Steps = Iterator[tuple[float, float, list[Batch]]]


def _before(
    built: BuiltRun,
    rates: Sequence[float],
    batches: Iterator[Batch],
    accumulation: int,
    recorder: Recorder,
    announce: Announce,
) -> list[float]:
    """The loss of each step's batches before any step is made."""
    found = []
    for step, _ in enumerate(rates, start=1):
        parts = list(islice(batches, accumulation))
        if not parts:
            break
        announce(f"range test, loss {step} of {len(rates)}", [part.tokens for part in parts])
        found.append(evaluate(built.loss, parts, built.device, recorder.mark).loss)
    recorder.mark(BETWEEN)
    return found


def _steps(rates: Sequence[float], before: Sequence[float], batches: Iterator[Batch], accumulation: int) -> Steps:
    """For each step its rate, what its batches' loss was before, and these."""
    for rate, untrained in zip(rates, before, strict=False):  # where rows run out, before all rates are tried
        yield rate, untrained, list(islice(batches, accumulation))


def go_by(found: RateFound, optimizer: torch.optim.Optimizer) -> None:
    """Let the found rate be the highest of the run; a ratio between groups stays."""
    if found.rate is not None:
        planned = min(group["lr"] for group in optimizer.param_groups)
        for group in optimizer.param_groups:
            group["lr"] *= found.rate / planned


def picture(found: RateFound) -> str:
    """Change of the loss over rate, the rate by powers of ten, and the one that was found."""
    rates, smooth = [rate for rate, *_ in found.curve], [each for *_, each in found.curve]
    low, high = math.floor(math.log10(rates[0])), math.ceil(math.log10(rates[-1]))
    bottom, top = min(smooth), max(smooth)
    margin = 0.05 * (top - bottom) or 1.0
    across, up = svg.Scale(low, max(high, low + 1), 84, 700), svg.Scale(bottom - margin, top + margin, 340, 50)
    shapes = [svg.label(84, 28, "Range test: what training changes the loss by", size=15, bold=True)]
    for power in range(low, max(high, low + 1) + 1):
        shapes += [svg.line(across(power), 340, across(power), 50, svg.GREY, 0.5)]
        shapes += [svg.label(across(power), 358, f"{10.0**power:g}", "middle", 11)]
    for value in (bottom, (bottom + top) / 2, top):
        shapes += [svg.line(84, up(value), 700, up(value), svg.GREY, 0.5)]
        shapes += [svg.label(76, up(value) + 4, f"{value:+.3g}", "end", 11)]
    shapes.append(svg.path([(across(math.log10(rate)), up(each)) for rate, _, each in found.curve], svg.BLUE))
    if found.rate is not None:
        x = across(math.log10(found.rate))
        shapes += [svg.line(x, 340, x, 50, svg.RED, 1.4, "4 3"), svg.label(x + 6, 64, f"taken: {found.rate:.3g}")]
    shapes += [svg.label(392, 380, "learning rate", "middle"), svg.sideways(28, 195, "loss, less before training")]
    return svg.drawing(730, 396, "Loss of a range test over the learning rate", shapes)
