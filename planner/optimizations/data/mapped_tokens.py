"""Keep the tokens of the data in a file that is mapped into memory, and texts where they are.

Documents are read one after the other, tokenised in groups, and their tokens written to an Arrow file in the folder of
``train.scratch``, four bytes each; rows are then parts of that file, which the system brings in as they are read and
drops as it needs room. The file has no name once it is mapped, and its bytes come back with the end of the process.
What is trained is the same. Without it texts and tokens are in host memory while a run lasts.

Approximate: neither what data take of host memory nor the file is in a plan, as neither follows from model and length.
"""

from __future__ import annotations

from planner.optimizations.base import Evidence, Needs, Optimization
from planner.optimizations.item import Claimed
from planner.session import Session


class MappedTokens(Optimization):
    """Data larger than host memory."""

    id = "mapped_tokens"
    title = "tokens in a file that is mapped into memory"
    claimed = (
        Claimed(
            28,
            "handles huge datasets",
            "holds",
            "Host memory holds what is being read, not the data; the tokens of a run are on disk. It takes nothing off "
            "the card.",
        ),
    )
    asked = True
    requires = (Needs("adapters/weights", "it is what they are trained on"),)
    evidence = (
        Evidence("files of the Arrow format are mapped, not read", "pyarrow 26, pyarrow.memory_map"),
        Evidence("what stays in memory, and that rows are the same", "tests/test_token_file.py"),
    )
    effect = "what is trained is the same; texts are read twice, and tokens lie on disk"

    def apply(self, session: Session) -> None:
        """Keep them there."""
        session.map_tokens()
