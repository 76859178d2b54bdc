"""Compile each decoder layer by torch.compile: one graph forward and one backward, shared by all layers that are alike.

What lies between a layer's products becomes few kernels, launched by code that asks nothing of autograd. What is kept
for the backward pass is torch's min-cut partitioner's choice, and that is what formulas have for a layer whose norms,
activation function and gate are one operation each: inputs of the products and of attention, what norms read, one or
two float32 numbers a norm, gate and up projection but not what the activation function gives.

It takes Triton and a C compiler where it is trained. Rows of so many tokens that a tensor has 2³¹ elements or more are
compiled anew in the probe step.
"""

from __future__ import annotations

from planner.activations import compiled_tensors
from planner.ledger import Ledger
from planner.optimizations.base import Capability, Evidence, Knobs, Optimization, Situation, With
from planner.optimizations.item import Claimed
from planner.session import Session


class _IsOneGraph:
    """Needs a layer that is one graph whatever the tokens are."""

    text = "layers that are one graph for rows of any length: no window, no experts, no four bits, no packed rows"

    def reasons(self, situation: Situation) -> tuple[str, ...]:
        """Names what would be compiled anew for each length, or for each batch."""
        model = situation.model
        found = []
        if model.sliding_layers:
            found.append(f"{model.id} has layers with a window, whose kernels are chosen by the length of the row")
        if model.experts:
            found.append(f"{model.id} has experts, whose rows depend on the tokens")
        if "nf4_weights" in situation.chosen:
            found.append("of four-bit weights the compiler keeps each 16-bit matrix that is made for a product")
        if "sequence_packing" in situation.chosen:
            found.append("each row of packed documents would be a graph of its own")
        if "streamed" in situation.chosen:
            found.append("streamed layers are cut at their attention, and run in passes")
        return tuple(found)


class CompiledLayers(Optimization):
    """Layers compiled as a whole: fewer kernels, and less saved between them."""

    id = "compiled_layers"
    title = "layers compiled by torch.compile"
    claimed = (
        Claimed(
            19,
            "30–50 % speedup",
            "in part",
            "16 to 47 % in pairs of recorded runs on one card; the longer the row, the less, for the products and "
            "attention, which no compiler changes, are most of it then.",
        ),
    )
    asked = True  # it takes half a minute before the first step, and packages that may be missing
    effect = "compiling takes its time before the first step, and needs Triton and a C compiler"
    claims = frozenset({"letter Q", "letter f", "letter g", "letter k_c"})
    requires = (
        Capability((8, 0), "torch.compile writes its kernels in Triton, which is for these cards"),
        _IsOneGraph(),
        With("exact_attention", "scores that are written out would be part of the graph"),
    )
    evidence = (
        Evidence("what is kept is chosen by a minimal cut of the graph", "torch 2.11, torch._functorch.partitioners"),
        Evidence("its graphs give the same loss and gradients, to 1e-10 in float64", "tests/test_compiled_layers.py"),
        Evidence(
            "what is saved, and that a step compiled for the CPU takes no more at its peak",
            "tests/test_compiled_layers.py",
        ),
        Evidence("bytes and seconds of a step on an H200, with it and without", "reports/optimizations.md"),
    )

    def letters(self, situation: Situation, knobs: Knobs) -> dict[str, int]:
        """No norm, no activation function and no gate is written out."""
        saved, alive = compiled_tensors(gated=situation.model.gated_mlp)
        return {"Q": 0, "f": saved, "g": alive, "k_c": 1}

    def rewrite(self, ledger: Ledger, knobs: Knobs, situation: Situation) -> Ledger:
        """All follows from its letters."""
        return ledger

    def apply(self, session: Session) -> None:
        """Have the layers compiled."""
        session.compile_layers()
