"""Let attention go by blocks of the row where one head of all of it is more than the card holds.

A kernel is shown a block of queries and a block of keys at a time. Outputs over different keys are merged by their
log-sum-exp in float32, as in ring attention on one card; backward, every pair of blocks gives its part of the
gradients. The result is exact, and nothing on the card is as long as the row. It costs copies: keys cross the link once
for each block of queries, and backward the queries with their gradient once for each block of keys.
"""

from __future__ import annotations

from planner import streamed_blocks as blocks
from planner.baseline_formulas import float32
from planner.ledger import Device, Ledger, Phase, Resource, Term, Work, held
from planner.optimizations.base import Evidence, Knob, Knobs, Needs, Optimization, Situation
from planner.optimizations.item import Claimed
from planner.session import Session
from planner.symbols import Letters, Number

SOURCE = "trainer/streamed/blocks.py"
_WAITING = "gradients of the queries between two blocks of keys"


FORWARD, BACKWARD, AGAIN = Phase.ATTENTION, Phase.ATTENTION_BACKWARD, "again"
LINK, MEMORY, LAUNCH = Resource.LINK, Resource.MEMORY, Resource.LAUNCH
_WORK = (
    Work("pairs/in", blocks.keys_again, LINK, FORWARD, "keys for every block of queries"),
    Work("pairs/merged", blocks.merged_bytes, MEMORY, FORWARD, "outputs over several blocks merged"),
    Work("pairs/launches", blocks.launches_forward, LAUNCH, FORWARD, "kernels of pairs of blocks"),
    Work("pairs_again/in", blocks.keys_once_more, LINK, BACKWARD, "keys for every block of queries, again", AGAIN),
    Work("pairs_again/merged", blocks.merged_bytes_again, MEMORY, BACKWARD, "outputs merged again", AGAIN),
    Work("pairs_again/launches", blocks.launches_again, LAUNCH, BACKWARD, "kernels of pairs of blocks again"),
    Work("pairs_back/in", blocks.pairs_back_in, LINK, BACKWARD, "queries for every block of keys"),
    Work("pairs_back/out", blocks.pairs_back_out, LINK, BACKWARD, "their gradient so far"),
    Work("pairs_back/merged", blocks.merged_bytes_back, MEMORY, BACKWARD, "gradients over several blocks added up"),
    Work("pairs_back/launches", blocks.launches_backward, LAUNCH, BACKWARD, "kernels of pairs of blocks"),
)


def nothing(x: Letters) -> Number:
    """Gradients of a key head that several groups read are summed block by block."""
    return 0


class SequenceBlocks(Optimization):
    """Attention by blocks of the sequence: memory of the card flat in its length."""

    id = "sequence_blocks"
    title = "attention by blocks of the sequence, merged by their log-sum-exp"
    claimed = (
        Claimed(
            42,
            "memory that does not grow, and context without an end",
            "does not hold",
            "Blocks of the row keep the card's share small, but every token still takes host memory: on one card "
            "there is no ring.",
        ),
    )
    last_resort = "streamed"
    claims = frozenset(
        {"letter S_b", "attention/shared.count", "attention/group.count", "attention/group_backward.count"}
    )
    makes = frozenset({"buffers/query_gradient", "buffers/query_gradient_on_card"})
    adds = frozenset(each.name for each in _WORK)
    requires = (Needs("buffers/staging", "only streamed layers have their heads elsewhere than on the card"),)
    knobs = (
        Knob(
            "tokens",
            "tokens of a block of queries, and of one of keys",
            # A card is kept busy by as many, and they are little beside the chunks of the other passes.
            lambda _: (32_768,),
            letter="S_b",
            low=64,
            high=1 << 24,
        ),
    )
    evidence = (
        Evidence("loss and gradients equal stock to 1e-10 in float64", "tests/streamed/test_gradients.py"),
        Evidence("bytes counted pair by pair", "tests/streamed/test_memory.py"),
        Evidence("attention by blocks of queries and keys", "Liu et al. 2023, arXiv 2310.01889"),
    )

    def rewrite(self, ledger: Ledger, knobs: Knobs, situation: Situation) -> Ledger:
        """A pair of blocks instead of a whole head on the card; the gradient of the queries waits beside the rest."""
        places = (
            ("buffers/query_gradient", blocks.waiting_in_host, Device.PINNED),
            ("buffers/query_gradient_on_card", blocks.waiting_on_card, Device.GPU),
        )
        return (
            ledger.claimed("attention/shared", count=nothing)
            .claimed("attention/group", count=blocks.group_forward)
            .claimed("attention/group_backward", count=blocks.group_backward)
            .with_terms(
                *(
                    Term(name, count, float32, held(device), _WAITING, SOURCE, device=device)
                    for name, count, device in places
                )
            )
            .with_work(*_WORK)
        )

    def apply(self, session: Session) -> None:
        """Attend by blocks."""
        session.block_sequence(tokens=int(session.knob("tokens")))
