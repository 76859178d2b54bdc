"""Attention to the last tokens alone, where a model is made so, and a cache of keys and values, which training has not.

A layer with a window computes what is inside it alone, by the kernels' own operators in the resident executor and by
stretches in the streamed one. Another model with a window on top would be another model. Text that is written after
training (`planner.generating`) has a cache, in which such a layer keeps its window alone.
"""

from __future__ import annotations

from planner.optimizations.base import Evidence, Situation
from planner.optimizations.item import Claimed, Given, State


class Windows(Given):
    """Sliding windows, as the model has them; no cache in training."""

    id = "windows"
    title = "sliding windows where the model has them; no cache in training"
    claimed = (
        Claimed(
            27,
            "a cache of keys and values with a sliding window",
            "does not hold",
            "Training keeps no cache. A window that the model has saves work, not the memory of exact attention. "
            "`plan generate` keeps a cache: of layers with a window that alone, in host memory, or in eight bits.",
        ),
    )
    evidence = (
        Evidence("a window is in the model's config", "Jiang et al. 2023, arXiv 2310.06825"),
        Evidence("windows are those of transformers", "tests/streamed/test_gradients.py"),
        Evidence("text is written as from whole rows, in the bytes counted on the CPU", "tests/test_generating.py"),
    )

    def state(self, situation: Situation) -> tuple[State, str]:
        """As the model is."""
        model = situation.model
        if model.sliding_window is not None:
            return "always", f"layers of {model.id} attend to the last {model.sliding_window:,} tokens"
        return "never", f"every layer of {model.id} attends to all tokens before it, and training keeps no cache"
