"""Now and then the allocator gives back what it holds unused, where that is measured to be worth it."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch


@dataclass
class CacheRelease:
    """When the allocator's cache is given back.

    Attributes:
        every: steps between two looks at it.
        share: of the largest bytes that tensors took; so much more has to be reserved.
        released: after which steps it was given back, and how many bytes were.
    """

    every: int
    share: float
    released: list[tuple[int, int]] = field(default_factory=list)

    def after(self, step: int, taken: int | None, device: torch.device) -> int:
        """Look after a step, and give back if it is time and worth it; gives the bytes.

        Args:
            taken: the largest bytes of tensors so far; None where no allocator tells.
        """
        if step % self.every or taken is None or device.type != "cuda":
            return 0
        before = torch.cuda.memory_reserved(device)
        if before - taken <= self.share * taken:
            return 0
        torch.cuda.empty_cache()
        given = before - torch.cuda.memory_reserved(device)
        self.released.append((step, given))
        return given
