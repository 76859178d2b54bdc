"""Hold the matrices of the layers in pinned host memory, and bring each layer to the card as it is computed.

The card has room for two layers: while one computes the next one is copied. So a model need not fit the card, only two
of its layers, embedding and output head. Each layer crosses the link once in each pass, and more often where one
layer input is kept for several layers. With sequences long enough the copies hide behind the computation.
"""

from __future__ import annotations

from planner.ledger import Ledger
from planner.optimizations.base import Knobs, Optimization, Situation
from planner.optimizations.item import Claimed
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
from planner.symbols import Letters, Number


def layer(x: Letters) -> Number:
    """Bytes of the matrices of one layer."""
    return x.P * x.w // 8 + unquantised(x)


def room(x: Letters) -> Number:
    """Bytes of the layers on the card."""
    return layers_on_card(x) * layer(x)


def forward(x: Letters) -> Number:
    """Bytes copied in the forward pass."""
    return copies_forward(x) * layer(x)


def backward(x: Letters) -> Number:
    """Bytes copied in the backward pass."""
    return copies_backward(x) * layer(x)


class StreamedWeights(Optimization):
    """Weights in host memory as they are, two layers on the card."""

    id = "streamed_weights"
    title = "weights of the layers in host memory"
    claimed = (
        Claimed(
            35,
            "1.50 GB less than ZeRO-2",
            "does not hold",
            "One card has nothing to shard. 16-bit weights in host memory make room for models that no card would "
            "hold, and each layer crosses the link for every pass.",
        ),
    )
    # Its formulas go by the bits of weights as they are; those in four bits have constants besides.
    claims = frozenset({"weights/linear.bits", *(f"{name}.device" for name in MATRICES)})
    makes = frozenset({ROOM})
    adds = frozenset({FORWARD, BACKWARD})
    requires = (NEEDS,)
    evidence = EVIDENCE

    def rewrite(self, ledger: Ledger, knobs: Knobs, situation: Situation) -> Ledger:
        """Linears in the host, and room for two layers on the card."""
        return moved(ledger, room, forward, backward)

    def apply(self, session: Session) -> None:
        """Stream the weights."""
        session.stream_weights()
