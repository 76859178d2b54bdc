"""Layers compiled by torch.compile, each for itself.

It changes what a layer keeps for its backward pass, so a plan could not bound its memory before that is measured on
cards that the compiler supports (compute capability 8.0 and above; none below).
"""

from __future__ import annotations

from planner.optimizations.base import Evidence
from planner.optimizations.item import Claimed, NotYet


class CompiledLayers(NotYet):
    """Compiled layers."""

    id = "compiled_layers"
    title = "layers compiled by torch.compile"
    claimed = (
        Claimed(
            19,
            "30–50 % speedup",
            "not shown",
            "No steps of one plan with and without it are recorded.",
        ),
    )
    evidence = (
        Evidence(
            "the compiler decides what is kept and what is computed again", "torch 2.13, torch._functorch.partitioners"
        ),
    )
    missing = "what it keeps has not been measured, so no plan could bound it"
