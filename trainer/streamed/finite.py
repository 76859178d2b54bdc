"""Finds the first layer and chunk whose values are no numbers any more.

The largest magnitude of what each chunk gives is kept on the card, one element for each layer and chunk: a norm reads
its input once, makes nothing as long as it, and is NaN or infinite where any element is. It is looked at once a pass.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from planner.errors import PlanError
from trainer.streamed.row import Row
from trainer.streamed.tiles import Span


class Finite:
    """Largest magnitudes of one pass.

    Args:
        layers: L; ``chunks``: of the longest row, each of ``chunk`` tokens.
    """

    def __init__(self, layers: int, chunks: int, chunk: int, dtype: torch.dtype, device: torch.device) -> None:
        self._layers, self._chunk, self._dtype = layers, chunk, dtype
        self._outputs = torch.zeros(layers + 1, chunks, dtype=dtype, device=device)  # the embedding's, then the layers'
        self._gradients = torch.zeros(layers, chunks, dtype=dtype, device=device)  # of the layers' inputs

    def begin(self) -> None:
        """Another row follows."""
        self._outputs.zero_()
        self._gradients.zero_()

    def output(self, layer: int, chunk: Span, value: Tensor) -> None:
        """What a layer gives for a chunk; layer −1: the embedding."""
        self._note(self._outputs[layer + 1], chunk, value)

    def gradient(self, layer: int, chunk: Span, value: Tensor) -> None:
        """The gradient of a layer's input."""
        self._note(self._gradients[layer], chunk, value)

    @torch.no_grad()
    def _note(self, row: Tensor, chunk: Span, value: Tensor) -> None:
        torch.linalg.vector_norm(value, math.inf, out=row[chunk[0] // self._chunk])

    def check_outputs(self, row: Row) -> None:
        """Look at what the layers gave; waits for the card.

        Raises:
            PlanError: which layer, which tokens, which document.
        """
        if (place := _first(self._outputs)) is None:
            return
        layer, chunk = place
        what = f"the output of layer {layer} of {self._layers} (layers.{layer - 1})" if layer else "the embedding"
        self._refuse(row, what, chunk, self._cure())

    def check_gradients(self, row: Row) -> None:
        """Look at what went back through the layers; as `check_outputs`."""
        backwards = self._gradients.flip(0)  # the last layer's gradient comes first
        if (place := _first(backwards)) is None:
            return
        layer = self._layers - place[0]
        what = f"the gradient of the input of layer {layer} of {self._layers} (layers.{layer - 1})"
        self._refuse(row, what, place[1], "A smaller learning rate is the first thing to try: --set train.lr=…")

    def _cure(self) -> str:
        if self._dtype is torch.float16:
            return "float16 ends at 65,504, and the model may need bfloat16, which is a matter of the card."
        return (
            "After steps that went well a smaller learning rate is the first thing to try: --set train.lr=…; in the "
            "first step the model's weights hold such a value."
        )

    def _refuse(self, row: Row, what: str, chunk: int, nearest: str) -> None:
        start = chunk * self._chunk
        stop = min(start + self._chunk, len(row))
        first, last, count = row.document_of(start) + 1, row.document_of(stop - 1) + 1, len(row.documents)
        which = f"document {first}" if first == last else f"documents {first} to {last}"
        raise PlanError("training", f"{what}, tokens {start:,}–{stop:,} ({which} of {count}), is not finite.", nearest)


def _first(largest: Tensor) -> tuple[int, int] | None:
    """Where the first value that is no number stands: row and column."""
    bad = (~torch.isfinite(largest)).cpu()
    if not bool(bad.any()):
        return None
    layer, chunk = bad.nonzero()[0].tolist()
    return layer, chunk
