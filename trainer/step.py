"""One micro-batch forward to its loss, one optimiser step, and the loss on rows that are not trained on."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from planner.errors import PlanError
from planner.ledger import Phase
from trainer.data import Batch
from trainer.loss import chunked_cross_entropy

Mark = Callable[[str], None]
"""Told the name of a phase when it begins."""

Loss = Callable[[Batch, Tensor, Mark], Tensor]
"""A batch, the divisor (trained tokens of the whole optimiser step) and a mark to the loss, a scalar."""


def nothing(_: str) -> None:
    """A mark that nobody listens to."""


@dataclass(frozen=True)
class Head:
    """The frozen output head.

    Attributes:
        divided: what its logits are divided by (Granite); ``softcap``: what they are capped at by tanh (Gemma 2).
        smoothing: share of each target that is spread over the vocabulary in training.
    """

    linear: nn.Module
    divided: float
    softcap: float | None
    smoothing: float = 0.0

    @staticmethod
    def of(base: PreTrainedModel, smoothing: float = 0.0) -> Head:
        """The head of a model."""
        linear: Any = base.get_output_embeddings()
        divided = getattr(base.config, "logits_scaling", None) or 1.0
        return Head(linear, divided, getattr(base.config, "final_logit_softcapping", None), smoothing)

    def logits(self, hidden: Tensor) -> Tensor:
        """``[…, D]`` final hidden states to ``[…, V]`` logits."""
        logits = self.linear(hidden) if self.divided == 1 else self.linear(hidden) / self.divided
        return logits if self.softcap is None else torch.tanh(logits / self.softcap) * self.softcap

    def scaled(self, hidden: Tensor) -> Tensor:
        """What `loss` takes: what the head gives is divided where what it takes is."""
        if self.divided == 1:
            return hidden
        assert self.linear.bias is None
        return hidden / self.divided

    def loss(self, hidden: Tensor, targets: Tensor, rows: int, divisor: Tensor) -> Tensor:
        """Cross-entropy of ``[T, D]`` scaled hidden states, summed and divided, ``rows`` rows of logits at a time."""
        return chunked_cross_entropy(
            hidden,
            self.linear.weight,
            self.linear.bias,
            targets,
            rows=rows,
            divisor=divisor,
            softcap=self.softcap,
            smoothing=self.smoothing,
        )


def make_loss(base: PreTrainedModel, rows: int | None, smoothing: float = 0.0) -> Loss:
    """The loss of a batch: ``rows`` rows of logits at a time, or (None) as transformers computes it.

    The model's causal mask keeps padding on the right out of every real token's sight.
    """
    decoder, head = base.get_decoder(), Head.of(base, smoothing)

    def hidden_of(batch: Batch) -> Tensor:
        packing = {} if batch.documents is None else {"position_ids": batch.positions, "documents": batch.documents}
        hidden: Tensor = decoder(input_ids=batch.inputs, use_cache=False, **packing).last_hidden_state
        return hidden

    def until_differentiated(hidden: Tensor, mark: Mark) -> Tensor:
        if hidden.requires_grad:  # until its gradient is there, it is the loss that is differentiated
            hidden.register_hook(lambda _: mark(Phase.BACKWARD))
        return hidden

    def stock(batch: Batch, divisor: Tensor, mark: Mark) -> Tensor:
        hidden = until_differentiated(hidden_of(batch), mark)
        mark(Phase.LOSS if torch.is_grad_enabled() else Phase.EVALUATE_LOSS)
        return base.loss_function(
            logits=head.logits(hidden),
            labels=None,
            shift_labels=batch.targets,
            vocab_size=base.config.vocab_size,
            num_items_in_batch=divisor,
        )

    def chunked(batch: Batch, divisor: Tensor, mark: Mark) -> Tensor:
        assert rows is not None
        hidden = hidden_of(batch).flatten(0, 1)
        mark(Phase.LOSS if torch.is_grad_enabled() else Phase.EVALUATE_LOSS)
        hidden, targets = _trained(batch, hidden, batch.targets.flatten())  # from here on nothing holds the others
        hidden = head.scaled(until_differentiated(hidden, mark))
        return head.loss(hidden, targets, rows, divisor)

    return stock if rows is None else chunked


def _trained(batch: Batch, *of: Tensor) -> list[Tensor]:
    """Trained positions of tensors ``[B·S, …]``: themselves where these are all, else copies, which hold no more."""
    if len(batch.spans) == 1:
        start, stop = batch.spans[0]
        return [each if stop - start == len(each) else each[start:stop].clone() for each in of]
    # Made where it is used: a copy from the host would wait for all that is computed so far.
    places = torch.cat([torch.arange(start, stop, device=of[0].device) for start, stop in batch.spans])
    return [each.index_select(0, places) for each in of]


@dataclass(frozen=True)
class Update:
    """What one optimiser step did. Not ``taken``: float16 overflowed, the loss scale was lowered instead."""

    gradient_norm: float
    taken: bool


def update(optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler | None, shape: Callable[[], float]) -> Update:
    """Shape the gradients, step, and set the gradients to zero where they are.

    Args:
        shape: changes the gradients once the loss scale is off them, and gives their norm; see `Shaping`.

    Raises:
        PlanError: a gradient is not finite and no loss scale is there to be lowered.
    """
    if scaler is not None:
        scaler.unscale_(optimizer)
    norm = shape()
    if scaler is None:
        if not math.isfinite(norm):
            why = f"the gradients' norm is {norm}, so a step would destroy the adapters."
            raise PlanError("training", why, "A smaller learning rate is the first thing to try: --set train.lr=…")
        optimizer.step()
        taken = True
    else:
        before = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        taken = scaler.get_scale() >= before
    optimizer.zero_grad(set_to_none=False)
    return Update(norm, taken)


@dataclass(frozen=True)
class Evaluation:
    """Mean loss per token over some rows."""

    loss: float
    rows: int
    tokens: int

    @property
    def perplexity(self) -> float:
        """e to the loss."""
        return math.exp(self.loss) if self.loss < 700 else math.inf


def evaluate(loss: Loss, batches: Sequence[Batch], device: torch.device, mark: Mark = nothing) -> Evaluation:
    """Loss on batches, every trained token with the same weight; ``mark`` hears of each batch's two phases.

    The model stays in training mode, which changes nothing: it has no dropout.
    """
    total, one = 0.0, torch.ones((), device=device)
    with torch.no_grad():
        for batch in batches:
            mark(Phase.EVALUATE)
            total += float(loss(batch.to(device), one, mark))
    tokens = sum(batch.trained for batch in batches)
    return Evaluation(total / tokens, sum(len(batch.inputs) for batch in batches), tokens)
