"""Hold the checkpoints in pinned host memory; they leave the card in the forward pass and return in the backward.

Copies run beside the computation on a stream of their own: one hidden state is on its way out in the forward pass,
and the next one is fetched ahead in the backward pass. Host buffers are exactly as large as what they hold.
"""

from __future__ import annotations

from planner.baseline_formulas import bits_of_activation
from planner.ledger import Device, Ledger, Phase, Resource, Term, Work, held
from planner.optimizations.base import Evidence, Knobs, OnCard, Optimization, Situation
from planner.optimizations.item import Claimed
from planner.session import Session
from planner.symbols import Letters, Number

HELD = held(Device.PINNED) - {Phase.MERGE}
"""The buffers are taken with the model and used again by every step; before merging they are given back."""


def outgoing(x: Letters) -> Number:
    """The input of the layer that runs, and the one still on its way to the host."""
    return 2 * x.B * x.S * x.D


def last(x: Letters) -> Number:
    """The input of the last layer, the first that the backward pass needs."""
    return x.B * x.S * x.D


def incoming(x: Letters) -> Number:
    """The checkpoint in use and the next one, fetched ahead."""
    return 2 * x.B * x.S * x.D


def traffic(x: Letters) -> Number:
    """Bytes one way: every checkpoint crosses the link once out and once back."""
    return x.L * x.B * x.S * x.D * x.a // 8


def one(x: Letters) -> Number:
    """Bytes of one layer's, which has nothing to hide behind: the last one out, the first one back."""
    return x.B * x.S * x.D * x.a // 8


class CheckpointOffload(Optimization):
    """Checkpoints in pinned host memory instead of on the card."""

    id = "checkpoint_offload"
    title = "checkpoints in host memory"
    claimed = (
        Claimed(
            4,
            "60 % of the memory of activations",
            "in part",
            "What is left of them, the input of each layer, goes to host memory.",
        ),
    )
    claims = frozenset({"activations/checkpoints.device", "activations/checkpoints.phases"})
    makes = frozenset({"buffers/checkpoints_out", "buffers/checkpoints_last", "buffers/checkpoints_in"})
    adds = frozenset({"link/out", "link/in", "link_exposed/out", "link_exposed/in"})
    requires = (OnCard("with the CPU alone there is one memory, so there is nowhere to move checkpoints to"),)
    evidence = (
        Evidence("checkpoints in host memory", "Rajbhandari et al. 2021, arXiv 2104.07857"),
        Evidence("pinned blocks of torch's allocator are powers of two", "docs/decisions.md, pinned memory"),
    )

    def rewrite(self, ledger: Ledger, knobs: Knobs, situation: Situation) -> Ledger:
        """Checkpoints move to pinned host memory; two hidden states pass through the card."""
        source = "trainer/host_store.py"
        return (
            ledger.claimed("activations/checkpoints", device=Device.PINNED, phases=HELD)
            .with_terms(
                Term(
                    "buffers/checkpoints_out",
                    outgoing,
                    bits_of_activation,
                    frozenset({Phase.FORWARD}),
                    "hidden states on their way to the host",
                    source,
                ),
                Term(
                    "buffers/checkpoints_last",
                    last,
                    bits_of_activation,
                    frozenset({Phase.LOSS}),
                    "the last layer's input, which need not leave",
                    source,
                ),
                Term(
                    "buffers/checkpoints_in",
                    incoming,
                    bits_of_activation,
                    frozenset({Phase.BACKWARD}),
                    "checkpoints fetched from the host",
                    source,
                ),
            )
            .with_work(
                Work("link/out", traffic, Resource.LINK, Phase.FORWARD, "checkpoints to the host"),
                Work("link/in", traffic, Resource.LINK, Phase.BACKWARD, "checkpoints from the host"),
                Work("link_exposed/out", one, Resource.EXPOSED, Phase.FORWARD, "the last one, which nothing hides"),
                Work("link_exposed/in", one, Resource.EXPOSED, Phase.BACKWARD, "the first one, which nothing hides"),
            )
        )

    def apply(self, session: Session) -> None:
        """Hold checkpoints in the host."""
        session.offload_checkpoints()
