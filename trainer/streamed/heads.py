"""Attention of a layer by groups of heads, each over the whole row."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from trainer.streamed.arrays import HeadArray
from trainer.streamed.between import Arrays, Sizes
from trainer.streamed.kernels import Kernel
from trainer.streamed.row import Group, Row, head_groups
from trainer.streamed.tiles import attend, attend_backward
from trainer.streamed.transfers import Transfers


class Attention(Protocol):
    """From query, key and value in the arrays to attended values, and back."""

    def forward(self, row: Row, place: int, window: int | None, scale: float) -> None:
        """Attended values and their log-sum-exp, into that place of the arrays.

        Args:
            window: of a layer whose tokens see so many keys only.
            scale: of the scores.
        """
        ...

    def backward(self, row: Row, place: int, window: int | None, scale: float) -> None:
        """Gradients of query, key and value in their place, from that of the attended values; as `forward`."""
        ...


class ByHeads(Attention):
    """A group of heads over the whole row at once."""

    def __init__(self, kernel: Kernel, transfers: Transfers, arrays: Arrays, sizes: Sizes) -> None:
        self.kernel, self.transfers, self.arrays = kernel, transfers, arrays
        self.groups = head_groups(sizes.heads, sizes.key_heads, sizes.group)
        self._partial: list[Tensor] = []

    def forward(self, row: Row, place: int, window: int | None, scale: float) -> None:
        """See `Attention`."""
        attended, sums = self.arrays.attended[place], self.arrays.log_sum_exp[place]

        def work(group: Group, loaded: tuple[Tensor, ...]) -> None:
            output, log_sum_exp = attend(self.kernel, *loaded, row.documents, window, scale)
            self._put(attended, group.first, group.last, output)
            self._put(sums, group.first, group.last, log_sum_exp.unsqueeze(-1))

        self.transfers.run(self.groups, lambda group: self._inputs_of(group, row), work)

    def backward(self, row: Row, place: int, window: int | None, scale: float) -> None:
        """See `Attention`."""
        attended, sums = self.arrays.attended[place], self.arrays.log_sum_exp[place]

        def load(group: Group) -> tuple[Tensor, ...]:
            others = (self.arrays.attended_gradient, attended, sums)
            mine = (self._get(each, group.first, group.last, row) for each in others)
            return (*self._inputs_of(group, row), *mine)

        def work(group: Group, loaded: tuple[Tensor, ...]) -> None:
            query, key, value, gradient, output, log_sum_exp = loaded
            made = attend_backward(
                self.kernel, gradient, query, key, value, output, log_sum_exp.squeeze(-1), row.documents, window, scale
            )
            self._put(self.arrays.query, group.first, group.last, made[0])
            for array, gradient in zip(
                (self.arrays.key, self.arrays.value), self._summed(group, made[1:]), strict=False
            ):
                self._put(array, group.key_first, group.key_last, gradient)

        self.transfers.run(self.groups, load, work)

    def _summed(self, group: Group, parts: tuple[Tensor, ...]) -> list[Tensor]:
        """Gradients of a key and a value head that several groups read, in float32; none before the last of them."""
        if group.opens and group.closes:
            return list(parts)
        if group.opens:
            self._partial = [part.to(torch.promote_types(part.dtype, torch.float32)) for part in parts]
            return []
        for whole, part in zip(self._partial, parts, strict=True):
            whole += part
        if not group.closes:
            return []
        done = [whole.to(part.dtype) for whole, part in zip(self._partial, parts, strict=True)]
        self._partial = []
        return done

    def _inputs_of(self, group: Group, row: Row) -> tuple[Tensor, Tensor, Tensor]:
        return (
            self._get(self.arrays.query, group.first, group.last, row),
            self._get(self.arrays.key, group.key_first, group.key_last, row),
            self._get(self.arrays.value, group.key_first, group.key_last, row),
        )

    def _get(self, array: HeadArray, first: int, last: int, row: Row) -> Tensor:
        """Some heads of the whole row, on the card."""
        return self.transfers.gather(array, first, last, 0, len(row))

    def _put(self, array: HeadArray, first: int, last: int, value: Tensor) -> None:
        """Put ``[heads, N, E]`` away."""
        self.transfers.scatter(value, array, first, last, 0, value.shape[1])
