"""Compute GELU's tanh form in one operation instead of eight.

``gelu_new`` of transformers is written out in Python and saves four tensors of width F for its backward pass;
``gelu_pytorch_tanh`` is the same function as one operation of torch, and saves its input alone.
"""

from __future__ import annotations

from planner.activations import ACTIVATIONS, mlp_tensors
from planner.ledger import Ledger
from planner.optimizations.base import Evidence, Knobs, Optimization, Situation
from planner.optimizations.item import Claimed
from planner.session import Session

FUSED = {"gelu_new": ACTIVATIONS["gelu_new"].fused}  # others are the same only nearly, or in no model that is shipped


class _HasUnfusedActivation:
    """Needs a model whose activation function transformers writes out in Python."""

    text = f"a model whose activation function is {' or '.join(FUSED)}"

    def reasons(self, situation: Situation) -> tuple[str, ...]:
        """Names the activation function that the model has."""
        activation = situation.model.activation
        return (
            () if activation in FUSED else (f"{situation.model.id} has {activation}, which is one operation already",)
        )


class FusedActivation(Optimization):
    """The same activation function in one operation, with one saved tensor instead of four."""

    id = "fused_activation"
    title = "activation function in one operation"
    claimed = (
        Claimed(
            41,
            "0.50 GB by one kernel for norm, attention and MLP",
            "does not hold",
            "No such kernel exists. The activation function in one operation saves 0.28 GB of what the loss in "
            "slices leaves at 4,096 tokens.",
        ),
    )
    free = True
    claims = frozenset({"letter f", "letter g"})
    requires = (_HasUnfusedActivation(),)
    evidence = (
        Evidence("the same function, to 1e-15 in float64", "tests/test_fused_activation.py"),
        Evidence("one saved tensor instead of four", "counted by tests/test_fused_activation.py"),
    )

    def letters(self, situation: Situation, knobs: Knobs) -> dict[str, int]:
        """Tensors of width F that the MLP saves, and that live at once without autograd."""
        model = situation.model
        activation = FUSED.get(model.activation, model.activation)
        saved, alive = mlp_tensors(activation, gated=model.gated_mlp, fused=model.fused_gate_up)
        return {"f": saved, "g": alive}

    def rewrite(self, ledger: Ledger, knobs: Knobs, situation: Situation) -> Ledger:
        """All follows from the letters f and g."""
        return ledger

    def apply(self, session: Session) -> None:
        """Switch the model to the fused form."""
        session.fuse_activation()
