"""What every coded form of a layer input needs of a model."""

from __future__ import annotations

from planner.optimizations.base import Situation

BLOCK = 64


class WholeBlocks:
    """Needs a width of whole blocks of elements that share a scale."""

    text = f"a model whose width is a multiple of {BLOCK}"

    def reasons(self, situation: Situation) -> tuple[str, ...]:
        """Names the width."""
        width = situation.model.width
        return () if width % BLOCK == 0 else (f"{situation.model.id} has width {width}, no multiple of {BLOCK}",)
