"""RMSNorm of transformers as one operation of torch."""

from __future__ import annotations

from types import MethodType
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from planner.errors import PlanError


def is_written_out(module: nn.Module) -> bool:
    """Whether a module is an RMSNorm of transformers; each family has a class of its own, all by that name."""
    return type(module).__name__.endswith("RMSNorm") and not isinstance(module, nn.RMSNorm)


def fuse_norms(model: nn.Module) -> int:
    """Give every RMSNorm of a model the one operation; returns how many there are.

    Raises:
        PlanError: there is none, or one that computes something else.
    """
    norms = [(path, module) for path, module in model.named_modules() if is_written_out(module)]
    if not norms:
        raise PlanError("fused_norm", "is planned for, and the model has no RMSNorm.", "Plan again for this model.")
    for path, norm in norms:
        if not hasattr(norm, "variance_epsilon"):  # Gemma's is called eps, and multiplies by one plus its weight
            why = f"is planned for, and {path} is a {type(norm).__name__}, which multiplies by more than its weight."
            raise PlanError("fused_norm", why, "Plan again for this model.")
        norm.forward = MethodType(_forward, norm)  # type: ignore[method-assign]
    return len(norms)


def _forward(norm: Any, hidden: Tensor) -> Tensor:
    """``[..., D]``, and for query and key ``[..., heads, E]``, to the same, normed over its last dimension."""
    # Looked up at each call, so that what counts without a card can put its own in the place of the CPU's many.
    return functional.rms_norm(hidden, norm.weight.shape, norm.weight, norm.variance_epsilon)
