"""Cross-entropy over trained tokens only, a slice of the rows at a time, its gradient written in the forward pass.

Without it the loss keeps the logits of every token in several copies, the largest tensors of the whole step.
Here `rows` rows of logits live at once. The gradient of the hidden states is kept before it is normalised and
scaled, so that in float16 it neither underflows nor depends on the loss scale.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def _slice_loss_and_gradient(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, softcap: float | None, smoothing: float
) -> Tensor:
    """Summed loss of some rows (float32 scalar); overwrites ``hidden`` ``[C, D]`` with its own gradient."""
    logits = hidden @ weight.t() if bias is None else torch.addmm(bias, hidden, weight.t())
    # In place from here on: at most the logits in compute dtype and one wide copy live at once; with a cap, two wide.
    wide = logits if logits.dtype == torch.float64 else logits.float()
    del logits
    bent = None
    if softcap is not None:
        bent = wide.div_(softcap).tanh_()
        wide = bent.mul(softcap)
    wide.sub_(wide.amax(dim=-1, keepdim=True))
    chosen = wide.gather(1, targets[:, None]).squeeze(1)
    if smoothing:
        chosen.mul_(1 - smoothing).add_(wide.mean(dim=-1), alpha=smoothing)
    wide.exp_()
    total = wide.sum(dim=-1, keepdim=True)
    loss = (total.squeeze(1).log() - chosen).sum()
    wide.div_(total)
    if smoothing:
        wide.sub_(smoothing / wide.shape[-1])
    wide.scatter_add_(1, targets[:, None], torch.full_like(targets[:, None], smoothing - 1, dtype=wide.dtype))
    if bent is not None:
        wide.mul_(bent.square_().neg_().add_(1))  # the slope of tanh
        del bent
    gradient = wide.to(hidden.dtype)
    del wide
    torch.mm(gradient, weight, out=hidden)
    return loss


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        rows: int,
        divisor: Tensor,
        softcap: float | None,
        smoothing: float,
    ) -> Tensor:
        gradient = hidden.detach().clone() if hidden.requires_grad else None
        total = torch.zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32), device=hidden.device)
        for start in range(0, hidden.shape[0], rows):
            part = slice(start, start + rows)
            work = gradient[part] if gradient is not None else hidden[part].clone()
            total += _slice_loss_and_gradient(work, weight, bias, targets[part], softcap, smoothing)
        if gradient is not None:
            ctx.save_for_backward(gradient, divisor)
            ctx.rows = rows
        return total / divisor

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        gradient, divisor = ctx.saved_tensors
        # The factor holds the loss scale: on a card a scalar tensor would be rounded to the gradient's own dtype
        # first, so the product is made in float32, some rows at a time, and rounded once.
        factor = (outputs[0] / divisor).to(torch.promote_types(gradient.dtype, torch.float32))
        for part in gradient.split(ctx.rows):
            part.copy_(part.to(factor.dtype) * factor)
        return gradient, None, None, None, None, None, None, None


def chunked_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    *,
    rows: int,
    divisor: Tensor,
    softcap: float | None = None,
    smoothing: float = 0.0,
) -> Tensor:
    """Cross-entropy of the rows, summed and divided by ``divisor``, with ``rows`` rows of logits alive at once.

    Args:
        hidden: ``[T, D]`` final hidden states of the trained tokens.
        weight: ``[V, D]`` frozen output head.
        bias: ``[V]`` or None.
        targets: ``[T]`` token ids.
        rows: rows of logits computed at a time.
        divisor: scalar, usually the number of trained tokens in the whole optimiser step.
        softcap: logits are bent by tanh so that none passes it (Gemma 2); None: they are not.
        smoothing: share of each target that is spread over the vocabulary; where nothing is differentiated, none is.

    Raises:
        ValueError: the head is trainable (its gradient is not computed here) or ``rows`` is not positive.
    """
    if weight.requires_grad or (bias is not None and bias.requires_grad):
        raise ValueError("chunked loss: the output head is trainable, and its gradient is not computed here")
    if rows < 1:
        raise ValueError(f"chunked loss: rows must be at least 1, not {rows}")
    smoothing = smoothing if hidden.requires_grad else 0.0
    return _ChunkedLoss.apply(hidden, weight, bias, targets, rows, divisor, softcap, smoothing)
