"""Keep one layer input for several layers, and compute the inputs between them again in the backward pass.

With streamed layers the kept inputs are what fills the host's memory: L of them, two bytes for each token and element
of width D. One for every k layers leaves L/k, and k − 1 more for the layers of the span that is being worked on; about
√L of each is least. It costs one more forward pass of nearly every layer.
"""

from __future__ import annotations

from planner.ledger import Ledger
from planner.optimizations.base import Evidence, Knob, Knobs, Needs, Optimization, Scalar, Situation
from planner.optimizations.item import Claimed
from planner.session import Session


def _spacings(situation: Situation) -> tuple[Scalar, ...]:
    """From two layers up to the root of all, of which each leaves fewer inputs than those before: more costs time."""
    layers, found = situation.model.layers, list[int]()
    for every in range(2, max(2, round(layers**0.5)) + 1):
        if not found or _inputs(layers, every) < _inputs(layers, found[-1]):
            found.append(every)
    return tuple(found)


def _inputs(layers: int, every: int) -> int:
    """Inputs that are there at once: one for each span of layers, and those within the span that is worked on."""
    return -(-layers // every) + every - 1


class CheckpointSpacing(Optimization):
    """One kept layer input for several layers: less host memory for one more forward pass."""

    id = "checkpoint_spacing"
    title = "one layer input kept for several layers"
    claimed = (
        Claimed(
            37,
            "1.92 GB less than a checkpoint for each layer",
            "in part",
            "On the card segments take more: 3.59 GB against 1.41 GB at 4,096 tokens. Nested, over host memory, "
            "they turn 42.9 GB into 14.8 GB there, for one more forward pass.",
        ),
    )
    claims = frozenset({"letter L_s"})
    requires = (Needs("buffers/staging", "on the card spacing saves nothing once layers are recomputed"),)
    knobs = (Knob("every", "layers for which one input is kept", _spacings, letter="L_s", low=2, high=1024),)
    evidence = (
        Evidence("about √L kept inputs are least", "Chen et al. 2016, arXiv 1604.06174"),
        Evidence("gradients equal stock for every spacing", "tests/streamed/test_gradients.py"),
    )

    def rewrite(self, ledger: Ledger, knobs: Knobs, situation: Situation) -> Ledger:
        """All follows from the letter L_s."""
        return ledger

    def apply(self, session: Session) -> None:
        """Keep fewer layer inputs."""
        session.space_checkpoints(every=int(session.knob("every")))
