"""Keep what attention gave in every layer, beside what lies between the passes, instead of computing it again.

At length attention is nearly all of a step, and the backward pass needs its outputs and their log-sum-exp. Kept, they
take as much host memory as the layer inputs; computed again, they cost one forward pass of attention in 4.5.
"""

from __future__ import annotations

from planner.baseline_formulas import one_byte
from planner.ledger import Device, Ledger, Term, held
from planner.optimizations.base import Evidence, Knobs, Needs, Optimization, Situation
from planner.optimizations.item import Claimed
from planner.session import Session
from planner.symbols import Letters, Number


def outputs(x: Letters) -> Number:
    """Bytes of attended values and log-sum-exp of all layers but one, which is there anyway."""
    return (x.L - 1) * x.B * x.S * x.H * (x.E * x.a // 8 + 4)


def in_host(x: Letters) -> Number:
    """The same where staging is in host memory, and else nothing."""
    return x.j_h * outputs(x)


def on_card(x: Letters) -> Number:
    """The same where staging is on the card, and else nothing."""
    return (1 - x.j_h) * outputs(x)


class KeptAttention(Optimization):
    """Attended values of all layers are kept: attention runs forward once."""

    id = "kept_attention"
    title = "outputs of attention kept for the backward pass"
    claimed = (
        Claimed(
            37,
            "1.92 GB less than a checkpoint for each layer",
            "does not hold",
            "Selective recomputation: attention is not computed again, for as much memory again as the layer "
            "inputs take. It saves time and no memory.",
        ),
    )
    claims = frozenset({"letter k_a"})
    makes = frozenset({"attention/kept", "attention/kept_on_card"})
    requires = (Needs("buffers/staging", "only streamed layers can take attention's outputs from elsewhere"),)
    evidence = (Evidence("gradients equal stock", "tests/streamed/test_gradients.py"),)

    def letters(self, situation: Situation, knobs: Knobs) -> dict[str, int]:
        """Attention is not computed again."""
        return {"k_a": 1}

    def rewrite(self, ledger: Ledger, knobs: Knobs, situation: Situation) -> Ledger:
        """Outputs of every layer, where what lies between the passes is."""
        places = (
            ("attention/kept", in_host, Device.PINNED),
            ("attention/kept_on_card", on_card, Device.GPU),
        )
        return ledger.with_terms(
            *(
                Term(
                    name,
                    count,
                    one_byte,
                    held(device),
                    "attended values and log-sum-exp of the other layers",
                    "trainer/streamed/layer.py",
                    device=device,
                )
                for name, count, device in places
            )
        )

    def apply(self, session: Session) -> None:
        """Keep them."""
        session.keep_attention_outputs()
