"""Keep only each layer's input and recompute the layer in the backward pass.

The saved tensors of one layer live at a time instead of those of all; the price is one more forward pass of every
layer. One checkpoint per layer, or per two where a layer saves little, is best as long as all lie on the card.
"""

from __future__ import annotations

from planner.baseline import per_layer_names
from planner.baseline_formulas import (
    bits_of_activation,
    forward_working,
    incoming_gradient,
    layer_backward_bytes,
    norm_copies_of_layer,
)
from planner.baseline_work import (
    attention_forward_flops,
    elementwise_forward_bytes,
    linear_forward_flops,
)
from planner.ledger import STEP, Ledger, Phase, Resource, Term, Work
from planner.optimizations.base import Evidence, Knobs, Optimization, Situation
from planner.optimizations.item import Claimed
from planner.session import Session
from planner.symbols import Letters, Number

LIVE = frozenset({Phase.BACKWARD})


def checkpoints(x: Letters) -> Number:
    """One hidden state of width D for each layer and token."""
    return x.L * x.B * x.S * x.D


def gradient_and_output(x: Letters) -> Number:
    """The gradient coming into a layer, and the output of its recomputed forward pass."""
    return 2 * incoming_gradient(x)


def nothing(x: Letters) -> Number:
    """No element: the layer's input is its checkpoint."""
    return 0


class GradientCheckpointing(Optimization):
    """Layer inputs are kept and layers recomputed: activations of one layer at a time."""

    id = "gradient_checkpointing"
    title = "recompute each layer in the backward pass"
    claimed = (
        Claimed(
            4,
            "60 % of the memory of activations",
            "in part",
            "More than is said: 91.8 % in a pair of recorded runs, 17.9 GB to 1.48 GB, for the forward pass of "
            "each layer once more.",
        ),
    )
    claims = frozenset(
        {"letter A", "letter p", "activations/inputs.count", "activations/norms.count", "activations/outputs.count"}
        | {"activations/forward.count", "activations/forward.bits"}
        | {"activations/backward.count"}
        | {f"{name}.phases" for name in (*per_layer_names(), "attention/mask")}
    )
    makes = frozenset({"activations/checkpoints"})
    adds = frozenset({"linear/recompute", "elementwise/recompute", "attention/recompute"})
    evidence = (
        Evidence("one more forward pass for one layer's memory", "Chen et al. 2016, arXiv 1604.06174"),
        Evidence(
            "a checkpoint per layer, or two where little else is saved, is the best spacing on the card",
            "docs/decisions.md, spacing of checkpoints",
        ),
    )

    def letters(self, situation: Situation, knobs: Knobs) -> dict[str, int]:
        """The saved tensors of one layer live at once, and each layer runs forward once more."""
        return {"A": 1, "p": 1}

    def rewrite(self, ledger: Ledger, knobs: Knobs, situation: Situation) -> Ledger:
        """Checkpoints instead of saved tensors, and a second forward pass."""
        for name in per_layer_names():
            ledger = ledger.claimed(name, phases=LIVE)
        return (
            ledger.claimed("activations/inputs", count=nothing)
            .claimed("activations/norms", count=norm_copies_of_layer)
            .claimed("activations/outputs", count=gradient_and_output)
            .claimed("activations/forward", count=forward_working, bits=bits_of_activation)
            .claimed("activations/backward", count=layer_backward_bytes)
            .claimed("attention/mask", phases=STEP - {Phase.OPTIMIZER} | {Phase.EVALUATE})
            .with_terms(
                Term(
                    "activations/checkpoints",
                    checkpoints,
                    bits_of_activation,
                    STEP - {Phase.OPTIMIZER},
                    "inputs of the layers",
                    "trainer/checkpointing.py",
                ),
            )
            .with_work(
                Work("linear/recompute", linear_forward_flops, Resource.LINEAR, Phase.BACKWARD, "linears again"),
                Work(
                    "elementwise/recompute",
                    elementwise_forward_bytes,
                    Resource.MEMORY,
                    Phase.BACKWARD,
                    "norms, activations, sums again",
                ),
                Work(
                    "attention/recompute",
                    attention_forward_flops,
                    Resource.ATTENTION,
                    Phase.BACKWARD,
                    "attention again",
                ),
            )
        )

    def apply(self, session: Session) -> None:
        """Checkpoint every layer."""
        session.checkpoint_layers()
