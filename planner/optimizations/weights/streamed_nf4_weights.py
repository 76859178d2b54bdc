"""Hold four-bit weights and their constants in pinned host memory, and bring each layer to the card as it is computed.

As `streamed_weights`, for weights in NF4: a quarter of the host memory and of the copies. A model of 70 billion weights
takes 35 GB of host memory, and two of its layers 0.9 GB of the card.
"""

from __future__ import annotations

from planner.ledger import Device, Ledger
from planner.optimizations.base import Knobs, Optimization, Situation
from planner.optimizations.item import Claimed
from planner.optimizations.weights.nf4_weights import constants
from planner.session import Session
from planner.streamed_weights import (
    BACKWARD,
    EVIDENCE,
    FORWARD,
    MATRICES,
    NEEDS,
    ROOM,
    copies_backward,
    copies_forward,
    layers_on_card,
    moved,
    unquantised,
)
from planner.symbols import Letters, Number, ceil_div


def layer(x: Letters) -> Number:
    """Bytes of the matrices of one layer, half a byte a weight, their constants, and experts as they are."""
    return x.P // 2 + ceil_div(constants(x), x.L) + unquantised(x)


def room(x: Letters) -> Number:
    """Bytes of the layers on the card."""
    return layers_on_card(x) * layer(x)


def forward(x: Letters) -> Number:
    """Bytes copied in the forward pass."""
    return copies_forward(x) * layer(x)


def backward(x: Letters) -> Number:
    """Bytes copied in the backward pass."""
    return copies_backward(x) * layer(x)


class StreamedNf4Weights(Optimization):
    """NF4 weights in host memory, two layers on the card."""

    id = "streamed_nf4_weights"
    title = "NF4 weights of the layers in host memory"
    claimed = (
        Claimed(
            35,
            "1.50 GB less than ZeRO-2",
            "does not hold",
            "One card has nothing to shard. The 4-bit weights of the layers in host memory take 1.22 GB off the "
            "card, less what is fetched at a time.",
        ),
    )
    claims = frozenset({"weights/constants.device", *(f"{name}.device" for name in MATRICES)})
    makes = frozenset({ROOM})
    adds = frozenset({FORWARD, BACKWARD})
    requires = (NEEDS,)
    evidence = EVIDENCE

    def rewrite(self, ledger: Ledger, knobs: Knobs, situation: Situation) -> Ledger:
        """Linears and constants in the host, and room for two layers on the card."""
        return moved(ledger, room, forward, backward).claimed("weights/constants", device=Device.PINNED)

    def apply(self, session: Session) -> None:
        """Stream the weights."""
        session.stream_weights()
