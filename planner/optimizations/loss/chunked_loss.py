"""Compute loss and gradient for a few trained tokens at a time, so that the full logits never exist.

Only target tokens have logits. The gradient of the hidden states is written during the forward pass and kept
instead of the logits. Costs nothing in arithmetic; a small slice uses the matrix units less well.
"""

from __future__ import annotations

from planner.baseline_formulas import bits_of_activation
from planner.elementwise import WIDE, narrow, norm, norm_backward
from planner.ledger import Ledger, Phase, Resource, Term, Work
from planner.optimizations.base import Evidence, Knob, Knobs, Optimization, Situation
from planner.optimizations.item import Claimed
from planner.session import Session
from planner.symbols import Letters, Number, greatest, least


def rows_at_once(x: Letters) -> Number:
    """Trained tokens that the loss takes in one slice: of all sequences together, or where layers run in passes of one.

    Never more than there are.
    """
    return least(x.C, x.T * (x.l_r + (1 - x.l_r) * x.B))


def slice_of_logits(x: Letters) -> Number:
    """Logits alive at once."""
    return rows_at_once(x) * x.V


def logits_bits(x: Letters) -> Number:
    """Logits in the compute dtype and a float32 copy, which in float32 is the same tensor.

    Where logits are capped, their tanh and what is made of it, both in float32.
    """
    return 64 - x.a * (1 - x.t)


def picked(x: Letters) -> Number:
    """1 where trained tokens are copied, so that the others are let go: where not every token is trained."""
    return least(x.S - x.T, 1)


def gradient_rows(x: Letters) -> Number:
    """Gradient of the trained tokens' hidden states, and their own copy where they are not all there is."""
    return (1 + picked(x)) * x.B * x.T * x.D


def slice_in_activations(x: Letters) -> Number:
    """The slice of logits in elements of the compute dtype."""
    return slice_of_logits(x) * (logits_bits(x) // x.a)


def normed(x: Letters) -> Number:
    """Output of the final norm, for every token.

    Where trained tokens are copied it is gone after that, and counts as far as it stands above what follows.
    """
    rows, trained = x.B * x.S * x.D, x.B * x.T * x.D
    return (1 - picked(x)) * rows + picked(x) * greatest(rows - trained - slice_in_activations(x), 0)


def normed_in_evaluation(x: Letters) -> Number:
    """The same without a gradient: the copy of the trained tokens where there is one."""
    rows, trained = x.B * x.S * x.D, x.B * x.T * x.D
    above = greatest(rows - slice_in_evaluation(x) - slice_in_activations(x), 0)
    return (1 - picked(x)) * rows + picked(x) * (trained + above)


def slice_in_evaluation(x: Letters) -> Number:
    """A copy of each slice of them, which without a gradient is made and gone."""
    return rows_at_once(x) * x.D


def head_flops(x: Letters) -> Number:
    """Logits and the gradient of the hidden states, for trained tokens alone."""
    return 4 * x.B * x.T * x.V * x.D


def sliced_logits_bytes(x: Letters) -> Number:
    """Bytes that the loss moves over the logits of trained tokens: cast, shifted, raised, summed, divided, cast back.

    Where they are capped, seven ops more. Where the loss takes sequences one by one, the final norm and its gradient.
    """
    logits = x.V * (8 * WIDE + 2 * narrow(x) * (WIDE + x.a // 8) + 15 * WIDE * x.t)
    return x.B * x.T * (logits + x.l_r * (norm(x, x.D) + norm_backward(x, x.D) + 6 * x.D * x.a // 8))


class ChunkedLoss(Optimization):
    """Loss by slices of trained tokens: the full logits never exist."""

    id = "chunked_loss"
    title = "loss by slices, trained tokens only"
    claimed = (
        Claimed(
            41,
            "0.50 GB by one kernel for norm, attention and MLP",
            "does not hold",
            "No such kernel exists. The loss in slices saves 1.80 GB at 4,096 tokens, which is the kernel that "
            "matters.",
        ),
    )
    free = True
    claims = frozenset({"loss/logits.count", "loss/logits.bits", "letter C"}) | {
        f"{name}.amount" for name in ("head/both", "logits/both")
    }
    makes = frozenset({"loss/gradient", "loss/normed", "loss/normed_evaluation", "loss/slice_evaluation"})
    knobs = (
        Knob(
            "rows",
            "trained tokens per slice",
            lambda _: (1024, 2048, 512, 256),
            letter="C",
            low=1,
            high=1 << 20,
        ),
    )
    evidence = (
        Evidence("the gradient can be written in the forward pass", "Hsu et al. 2024, arXiv 2410.10989"),
        Evidence("loss and gradients equal the unsliced loss", "tests/test_trainer_loss.py"),
    )

    def is_free(self, situation: Situation) -> bool:
        """Logits have to be wider than the hidden states whose gradient is kept instead, as in every real model."""
        return situation.model.vocab >= situation.model.width

    def rewrite(self, ledger: Ledger, knobs: Knobs, situation: Situation) -> Ledger:
        """A slice of logits, and the gradient of the hidden states."""
        return (
            ledger.claimed("loss/logits", count=slice_of_logits, bits=logits_bits)
            .with_terms(
                Term(
                    "loss/normed",
                    normed,
                    bits_of_activation,
                    frozenset({Phase.LOSS}),
                    "last hidden states after the final norm",
                    "trainer/step.py",
                ),
                Term(
                    "loss/normed_evaluation",
                    normed_in_evaluation,
                    bits_of_activation,
                    frozenset({Phase.EVALUATE_LOSS}),
                    "the same while evaluating",
                    "trainer/step.py",
                ),
                Term(
                    "loss/slice_evaluation",
                    slice_in_evaluation,
                    bits_of_activation,
                    frozenset({Phase.EVALUATE_LOSS}),
                    "a slice of them",
                    "trainer/loss.py",
                ),
                Term(
                    "loss/gradient",
                    gradient_rows,
                    bits_of_activation,
                    frozenset({Phase.LOSS}),
                    "gradient of the trained hidden states, kept from the forward pass, and their copy, if any",
                    "trainer/loss.py",
                ),
            )
            .with_work(
                Work(
                    "head/both",
                    head_flops,
                    Resource.LINEAR,
                    Phase.LOSS,
                    "output head for trained tokens, both ways",
                ),
                Work(
                    "logits/both",
                    sliced_logits_bytes,
                    Resource.MEMORY,
                    Phase.LOSS,
                    "from logits to the loss and back, for trained tokens",
                ),
            )
        )

    def apply(self, session: Session) -> None:
        """Compute the loss by slices."""
        session.chunk_loss(rows=int(session.knob("rows")))
