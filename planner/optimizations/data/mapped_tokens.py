"""Tokens in a file that is mapped into memory, so that data larger than host memory can be trained on.

Until it is there, all documents are read and their tokens kept in host memory, four bytes each.
"""

from __future__ import annotations

from planner.optimizations.base import Evidence
from planner.optimizations.item import Claimed, NotYet


class MappedTokens(NotYet):
    """Tokens on disk."""

    id = "mapped_tokens"
    title = "tokens in a file that is mapped into memory"
    claimed = (
        Claimed(
            28,
            "handles huge datasets",
            "not shown",
            "Texts and tokens of a run are in host memory while it trains, beside what its plan counts.",
        ),
    )
    evidence = (Evidence("files of the Arrow format can be mapped", "pyarrow 26, pyarrow.memory_map"),)
    missing = "documents and tokens are read into host memory"
