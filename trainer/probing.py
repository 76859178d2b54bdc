"""The probe step: before anything is trained, the largest batch of the plan shows what a step takes."""

from __future__ import annotations

import copy
import time

import torch

from planner.errors import PlanError
from planner.ledger import Phase
from planner.plan import Plan
from planner.stages import shapes
from planner.units import format_bytes
from trainer.built import BuiltRun
from trainer.data import synthetic_batch
from trainer.measure import BETWEEN, Recorder, exact_terms, resident_tensors
from trainer.step import evaluate, nothing
from trainer.training import Announce, forward_backward, nobody, wait_for

COMPILED_ON = 509
"""Tokens of the rows that layers are compiled on, or one less than there are. A prime, as no width of a model is:
dimensions of one size could be taken for one and the same, and other lengths would be compiled anew."""
PROBED = 2  # layers of a streamed model; the first alone would not do, since nobody needs its input's gradient
SHORTER = "Plan a shorter context, and please report this: the plan was wrong."


def probe(plan: Plan, built: BuiltRun, recorder: Recorder, announce: Announce = nobody) -> tuple[dict[str, int], float]:
    """One step and one evaluation on the largest batch of the plan, then everything as it was.

    Of a run in stages, each shorter one's largest batch goes forward and backward before.

    Streamed layers take the same one by one, and a step of theirs can take hours: of these the first two are run.
    Gives the exact bytes of what stays, and the step's seconds. Optimiser state is made first, from zero
    gradients, so that the step finds memory as every later step does.
    """
    train, vocab = plan.train, built.base.config.vocab_size
    size = (train.batch, plan.total_tokens, plan.target)
    batch = synthetic_batch(*size, vocab, train.seed, built.most_documents).to(built.device)
    shorter = shapes(plan.total_tokens, plan.target, train.batch, built.stages)[:-1]
    adapters = [parameter.detach().to("cpu", copy=True) for parameter in built.trained]
    optimizer = copy.deepcopy(built.optimizer.state_dict())
    scaler = built.scaler.state_dict() if built.scaler else None
    with torch.random.fork_rng(devices=[built.device] if built.device.type == "cuda" else []):
        compile_first(plan, built, announce)
        built.optimizer.step()
        stays = [*resident_tensors(built), batch.inputs, batch.targets]
        with recorder.counting(stays), built.first_layers(PROBED):
            for shape in shorter:  # in the order of the run
                announce("probe of a stage", [shape.rows * shape.total])
                rows = synthetic_batch(shape.rows, shape.total, shape.target, vocab, train.seed)
                forward_backward(built, [rows.to(built.device)], recorder)
                give_back_unused(built.device)
            began, parts = time.perf_counter(), [batch] * min(2, train.accumulation)
            announce("probe step", [part.tokens for part in parts])
            forward_backward(built, parts, recorder)
            recorder.mark(Phase.OPTIMIZER)
            if built.scaler is not None:
                built.scaler.unscale_(built.optimizer)
            built.shaping.shape(built.trained, built.first_matrices, 0, train.max_grad_norm)
            built.optimizer.step()  # past the scaler, which might skip it; the result is thrown away
            wait_for(built.device)
            seconds = time.perf_counter() - began
            terms = exact_terms(built)
            announce("probe evaluation", [batch.tokens])
            evaluate(built.loss, [batch], built.device, recorder.mark)
            recorder.mark(BETWEEN)
    with torch.no_grad():
        for parameter, value in zip(built.trained, adapters, strict=True):
            parameter.copy_(value)
    built.optimizer.load_state_dict(optimizer)
    built.optimizer.zero_grad(set_to_none=False)
    if built.scaler is not None and scaler is not None:
        built.scaler.update()  # ends the step that unscaling began
        built.scaler.load_state_dict(scaler)
    give_back_unused(built.device)
    return terms, seconds


def compile_first(plan: Plan, built: BuiltRun, announce: Announce = nobody) -> None:
    """Run layers that are compiled for the first time, on short rows: that tries kernels out, and takes memory for it.

    Several rows and a single one, as a last batch may be. None of that is in the plan's peaks, and none of it is left:
    gradients are zero after it.
    """
    if not built.compiled:
        return
    tokens = max(min(plan.total_tokens - 1, COMPILED_ON), 1)
    several = max(shape.rows for shape in shapes(plan.total_tokens, plan.target, plan.train.batch, built.stages))
    with torch.random.fork_rng(devices=[built.device] if built.device.type == "cuda" else []):
        for rows in sorted({1, min(several, 2)}):
            size = (rows, tokens, min(plan.target, tokens))
            batch = synthetic_batch(*size, built.base.config.vocab_size, plan.train.seed).to(built.device)
            announce("compiling layers", [batch.tokens])
            built.loss(batch, torch.tensor(float(batch.trained), device=built.device), nothing).backward()
            evaluate(built.loss, [batch], built.device, nothing)
    built.optimizer.zero_grad(set_to_none=False)
    give_back_unused(built.device)
    if built.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(built.device)


def give_back_unused(device: torch.device) -> None:
    """Hand back what the allocator holds unused, so that no phase pays for the sizes of the one before."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


class OverBound(PlanError):
    """The probe step took more than the plan's bound; ``size``: by so many bytes."""

    def __init__(self, asked: str, why: str, size: int) -> None:
        super().__init__(asked, why, SHORTER)
        self.size = size


def check_bound(plan: Plan, recorder: Recorder) -> None:
    """Stop where tensors took more than the plan's bound, although the card may have had it.

    What the allocator reserves is held to the budget by ``take_device``.

    Raises:
        OverBound: by how much.
    """
    taken, high = recorder.peak("allocated_bytes"), plan.memory.gpu.peak_bytes.high
    if taken is not None and taken > high:
        asked = f"{plan.total_tokens:,} tokens on {plan.gpu.name}"
        over = f"{format_bytes(taken - high)} ({100 * (taken / high - 1):.1f} %)"
        why = f"the probe step took {format_bytes(taken)}, {over} more than the plan's bound of {format_bytes(high)}."
        raise OverBound(asked, why, taken - high)
