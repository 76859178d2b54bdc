"""What happens to gradients between the backward pass and the optimiser: noise, centralisation, clipping, in order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from zlib import crc32

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_, get_total_norm

from planner.launches import NOISE_PIECE


@dataclass(frozen=True)
class Noise:
    """Noise on the gradients that fades.

    Attributes:
        variance: of the first step's noise; ``decay``: the power of the steps by which it falls.
        relative: whether the variance is a share of the mean square of each matrix's gradient.
    """

    variance: float
    decay: float
    relative: bool = False

    def add(self, gradient: Tensor, done: int, generator: torch.Generator) -> None:
        """Add the noise of the step after ``done`` others to one matrix's gradient, piece by piece."""
        size = (self.variance / (1 + done) ** self.decay) ** 0.5
        # Never read by the host, which would wait for the card.
        norm = torch.linalg.vector_norm(gradient) if self.relative else None
        for piece in gradient.view(-1).split(NOISE_PIECE):
            noise = torch.randn(piece.shape, generator=generator, device=piece.device, dtype=piece.dtype)
            if norm is None:
                piece.add_(noise, alpha=size)
            else:
                piece.addcmul_(noise, norm, value=size / gradient.numel() ** 0.5)


@dataclass
class Shaping:
    """What is done to gradients, by what a plan's hooks ask for.

    Attributes:
        noise: what is added to them, if anything.
        centralized: whether rows of first matrices lose their mean.
        by_rows: clip each row's gradient to this share of its norm, which counts as no smaller than the second number;
            None: the norm of all is clipped.
        seed: of the noise.
    """

    noise: Noise | None = None
    centralized: bool = False
    by_rows: tuple[float, float] | None = None
    seed: int = 0

    def shape(self, trained: Sequence[Tensor], first: Sequence[Tensor], done: int, most: float) -> float:
        """Change the gradients in place; gives their norm before they are clipped.

        Args:
            trained: all that has a gradient; ``first``: those of it that are first matrices, ``[R, inputs]``.
            done: steps before this one.
            most: what the norm of all is clipped to, unless rows are.
        """
        if self.noise is not None:
            self._add_noise(self.noise, trained, done)
        if self.centralized:
            for parameter in first:
                if parameter.grad is not None:
                    parameter.grad.sub_(parameter.grad.mean(dim=-1, keepdim=True))
        if self.by_rows is None:
            return float(clip_grad_norm_(trained, most))
        norm = float(get_total_norm([each.grad for each in trained if each.grad is not None]))
        with torch.no_grad():
            for parameter in trained:
                _clip_rows(parameter, *self.by_rows)
        return norm

    def _add_noise(self, noise: Noise, trained: Sequence[Tensor], done: int) -> None:
        # A generator of the CPU takes 32 bits of its seed.
        generator = torch.Generator(trained[0].device).manual_seed(crc32(f"noise {self.seed} {done}".encode()))
        for parameter in trained:
            if parameter.grad is not None:
                noise.add(parameter.grad, done, generator)


def _clip_rows(parameter: Tensor, ratio: float, floor: float) -> None:
    gradient = parameter.grad
    if gradient is None:
        return
    allowed = ratio * parameter.norm(dim=-1, keepdim=True).clamp_(min=floor)
    norm = gradient.norm(dim=-1, keepdim=True)
    gradient.mul_(torch.where(norm > allowed, allowed / norm, torch.ones_like(norm)))
