"""Attention of some heads over a row of documents, of stock kernels' calls alone, none with a mask.

A document is computed in one causal call; where a layer has a window that is shorter, block by block
(``trainer/streamed/windows.py``).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from trainer.streamed.kernels import Kernel
from trainer.streamed.windows import banded, banded_backward

Span = tuple[int, int]
"""A range of tokens, half open."""


def attend(
    kernel: Kernel,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    documents: Sequence[Span],
    window: int | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Attention within each document; query ``[G, n, E]``, key and value ``[g, n, E]``.

    Args:
        documents: they follow each other and fill the n tokens.

    Gives the output ``[G, n, E]`` and the log-sum-exp ``[G, n]``.
    """
    found = []
    for start, stop in documents:
        parts = tuple(each[None, :, start:stop] for each in (query, key, value))
        whole = window is None or stop - start <= window
        found.append(kernel.forward(*parts, True, scale) if whole else banded(kernel, parts, window or 0, scale))
    outputs, sums = ([each[place][0] for each in found] for place in (0, 1))
    return (outputs[0], sums[0]) if len(found) == 1 else (torch.cat(outputs, 1), torch.cat(sums, 1))


def attend_backward(
    kernel: Kernel,
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    log_sum_exp: Tensor,
    documents: Sequence[Span],
    window: int | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value, given what `attend` gave; shapes as there."""
    found = []
    for start, stop in documents:
        heads = [each[None, :, start:stop] for each in (gradient, query, key, value, output, log_sum_exp)]
        whole = window is None or stop - start <= window
        made = kernel.backward(*heads, True, scale) if whole else banded_backward(kernel, heads, window or 0, scale)
        found.append(tuple(each[0] for each in made))
    if len(found) == 1:
        return found[0]
    made_of = [list(each) for each in zip(*found, strict=True)]
    found.clear()
    dq, dk, dv = (_joined(made_of.pop(0)) for _ in range(3))
    return dq, dk, dv


def _joined(pieces: list[Tensor]) -> Tensor:
    """One tensor of the documents' own, which are gone then: what is joined next finds room."""
    return torch.cat(pieces, 1)
