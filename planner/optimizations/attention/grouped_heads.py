"""Fewer heads for keys and values than for queries, where a model has them.

Keys and values are kept for their own heads and are not copied for each query head, in the resident executor as far as
the kernel takes groups, in the streamed one always. A cache of keys and values is what grouped heads make small, and
training has none. A model with a key head for each query head stays as it is, unless `plan pool-heads` makes another of
it, whose heads are means of several: a worse model until it has been trained again, in the paper with a twentieth of
the compute that it was made with.
"""

from __future__ import annotations

from planner.optimizations.base import Evidence, Situation
from planner.optimizations.item import Claimed, Given, State


class GroupedHeads(Given):
    """Grouped-query attention, as the model has it."""

    id = "grouped_heads"
    title = "grouped-query attention where the model has it"
    claimed = (
        Claimed(
            36,
            "2.10 GB, the biggest single optimisation",
            "does not hold",
            "0 GB of a cache that training does not keep; keys and values of one layer are 2.68 GB at 262,144 "
            "tokens. Phi-2 has a key head for each query head.",
        ),
    )
    evidence = (
        Evidence("grouped heads make decoding's cache smaller", "Ainslie et al. 2023, arXiv 2305.13245"),
        Evidence("heads that are alike are pooled into the same model", "tests/test_pooling.py"),
        Evidence("keys and values are counted by their own heads", "term attention/qkv, letter K"),
    )

    def state(self, situation: Situation) -> tuple[State, str]:
        """As the model is."""
        model = situation.model
        if model.kv_heads < model.heads:
            return "always", f"{model.id} has {model.kv_heads} key heads for {model.heads} query heads"
        return "never", f"{model.id} has a key head for each of its {model.heads} query heads"
