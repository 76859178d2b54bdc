"""Gradient checkpointing of decoder layers: keep a layer's input, recompute the layer in the backward pass.

Where the kept inputs lie is the store's business: on the card (`DeviceStore`) or in pinned host memory
(`trainer.host_store.HostStore`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn


class Store(Protocol):
    """Keeps layer inputs from the forward to the backward pass, last in, first out."""

    def keep(self, hidden: Tensor) -> Any:
        """Take a layer's input; returns the ticket that gives it back."""
        ...

    def fetch(self, ticket: Any) -> Tensor:
        """Give a layer's input back, once."""
        ...


class DeviceStore:
    """Keeps layer inputs where they are."""

    def keep(self, hidden: Tensor) -> Tensor:
        """The tensor is its own ticket."""
        return hidden

    def fetch(self, ticket: Tensor) -> Tensor:
        """Give the tensor back."""
        return ticket


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, run: Callable[[Tensor], Tensor], store: Store, hidden: Tensor, anchor: Tensor) -> Tensor:
        ctx.run, ctx.store, ctx.ticket = run, store, store.keep(hidden)
        return run(hidden)  # autograd is off inside a Function's forward

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        hidden = ctx.store.fetch(ctx.ticket).detach().requires_grad_(ctx.needs_input_grad[2])
        ctx.ticket = None
        with torch.enable_grad():
            output = ctx.run(hidden)
        torch.autograd.backward(output, gradients[0])
        return None, None, hidden.grad, None


def checkpoint_layers(layers: nn.ModuleList, store: Store) -> None:
    """Checkpoint every layer into the store: its forward as it is now, which transformers or a compiler gave it.

    What transformers has for that itself moved from a layer's call to its forward in 5.21, and knows no store.
    The layers must be deterministic (no dropout): the recomputed forward has to give the same values.

    Raises:
        ValueError: a layer has active dropout.
    """
    for path, module in layers.named_modules():
        if isinstance(module, nn.Dropout) and module.p > 0:
            raise ValueError(f"layer {path}: dropout {module.p} would differ when the layer is recomputed")
    # A Function's output is part of the graph only if an input is; the first layer's input comes from a frozen
    # embedding, so this empty tensor stands in.
    anchor = torch.empty(0, requires_grad=True)

    def checkpointed(run: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def forward(hidden: Tensor, *same: Any, **given: Any) -> Tensor:
            """``same`` and ``given`` are what a layer is given beside its input; they stay as they are."""
            if not torch.is_grad_enabled():
                return run(hidden, *same, **given)
            return _Recomputed.apply(lambda again: run(again, *same, **given), store, hidden, anchor)

        return forward

    for layer in layers:
        layer.forward = checkpointed(layer.forward)  # type: ignore[method-assign, arg-type]
