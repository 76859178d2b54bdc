"""Weights that are streamed to the card: what stays in host memory, room for two layers, and how often each is copied.

Between the passes nothing is copied twice: where the forward pass ends the backward pass begins, with the two layers
that are on the card, and the next step begins where the backward pass ends.
"""

from __future__ import annotations

from planner.baseline_formulas import one_byte
from planner.expert_formulas import expert_weights
from planner.ledger import ALWAYS, Device, Formula, Ledger, Phase, Resource, Term, Work
from planner.optimizations.base import Evidence, Needs
from planner.symbols import Letters, Number, ceil_div, greatest, least

ROOM, FORWARD, BACKWARD = "buffers/weights", "weights/in", "weights_back/in"
MATRICES = ("weights/linear", "weights/experts", "weights/routers")
"""Terms of the matrices of a layer: all of them are put away."""
NEEDS = Needs("buffers/staging", "only streamed layers are computed one after the other, each by itself")
EVIDENCE = (
    Evidence("loss and gradients equal stock to 1e-10 in float64", "tests/streamed/test_weights.py"),
    Evidence("layers brought to the card one ahead", "Ren et al. 2021, ZeRO-Offload, arXiv 2101.06840"),
)


def layers_on_card(x: Letters) -> Number:
    """Layers that there is room for: the one that computes and the one that comes."""
    return least(x.L, 2)


def unquantised(x: Letters) -> Number:
    """Bytes of the experts of one layer and of their router, which no quantisation here changes."""
    return (expert_weights(x) + x.j) * x.w // 8


def copies_forward(x: Letters) -> Number:
    """Layers copied in the forward pass: all but the two that the step before left on the card."""
    return greatest(x.L - 2, 0)


def copies_backward(x: Letters) -> Number:
    """Layers copied in the backward pass: all but two, and more where one input is kept for several layers.

    Then every span of layers but the last is gone through twice: all but its last layer forward, and all of it
    backward, where the layer that comes second is still on the card.
    """
    spans, several = ceil_div(x.L, x.L_s), least(x.L_s - 1, 1)
    last = x.L - (spans - 1) * x.L_s
    again = (spans - 1) * (2 * x.L_s - 2) + greatest(last - 2, 0)
    return several * again + (1 - several) * greatest(x.L - 2, 0)


def moved(ledger: Ledger, room: Formula, forward: Formula, backward: Formula) -> Ledger:
    """The ledger with the layers' matrices in host memory; bytes of the room on the card, and copied in each pass."""
    for name in MATRICES:
        ledger = ledger.claimed(name, device=Device.PINNED)
    return ledger.with_terms(
        Term(ROOM, room, one_byte, ALWAYS, "a layer's matrices, and the next one's", "trainer/streamed/weights.py")
    ).with_work(
        Work(FORWARD, forward, Resource.PREFETCH, Phase.FORWARD, "matrices of the layers from the host"),
        Work(BACKWARD, backward, Resource.PREFETCH, Phase.BACKWARD, "matrices of the layers from the host again"),
    )
