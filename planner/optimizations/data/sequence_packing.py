"""Join short documents into rows of full length, each of them attending to itself alone.

Positions begin anew with each document. An exact kernel is called once for each, so no mask exists; stored scores get
the mask of S × S numbers for each row that transformers builds from the positions. A document alone and the same
document in a row have the same loss and gradients. A step then trains more tokens, and an epoch has fewer steps; the
largest step takes as much as before and a little more, so packing is on only where it is asked for. Where not every
token of a row is trained, documents share a row as long as they have no more tokens than are to be trained.
"""

from __future__ import annotations

from planner.ledger import Ledger
from planner.optimizations.base import Evidence, Knob, Knobs, Needs, Optimization, Situation
from planner.optimizations.item import Claimed
from planner.session import Session


class SequencePacking(Optimization):
    """Several documents in one row, each seeing itself alone."""

    id = "sequence_packing"
    title = "short documents joined into full rows"
    claimed = (
        Claimed(
            43,
            "5–6x the throughput",
            "in part",
            "It takes out padding, and gains what that was: 4.8 to 6.3 times by the claim's own shares, nothing "
            "where each document is a row of its own.",
        ),
    )
    asked = True
    claims = frozenset({"letter d_r", "setting rows"})
    requires = (Needs("adapters/weights", "it is for training"),)
    knobs = (Knob("documents", "documents in one row at most", lambda _: (256,), letter="d_r", low=2, high=65_536),)
    evidence = (
        Evidence("best fit decreasing packs what is cut to length", "Ding et al. 2024, arXiv 2404.10830"),
        Evidence("loss and gradients are those of the documents alone", "tests/test_trainer_packing.py"),
    )
    exact = False
    effect = "a row holds several documents, so a step trains more tokens and an epoch has fewer steps"

    def settings(self, situation: Situation, knobs: Knobs) -> dict[str, str]:
        """It says what rows are."""
        return {"rows": self.id}

    def rewrite(self, ledger: Ledger, knobs: Knobs, situation: Situation) -> Ledger:
        """All follows from the letter d_r."""
        return ledger

    def apply(self, session: Session) -> None:
        """Pack rows."""
        session.pack_documents(most=int(session.knob("documents")))
