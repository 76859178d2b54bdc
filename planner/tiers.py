"""Tiers 1 to 11: context to read, target to train, rank of the adapters.

Sizes are exact powers and sums of powers of two (the claims mix units; ``claimed_*`` keeps what they say). Logits
exist for the target's tokens alone; context and target together are what must fit.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Tier:
    """One tier; sizes in tokens."""

    number: int
    context: int
    target: int
    rank: int
    claimed_requirement: str
    claimed_improvement: str

    @property
    def total(self) -> int:
        """Tokens of one sequence."""
        return self.context + self.target


TIERS: tuple[Tier, ...] = (
    Tier(1, 4_096, 512, 48, "None", "16x"),
    Tier(2, 8_192, 2_048, 32, "None", "32x"),
    Tier(3, 16_384, 2_048, 24, "Flash", "64x"),
    Tier(4, 32_768, 4_096, 12, "Flash + DeepSpeed", "128x"),
    Tier(5, 57_344, 7_168, 8, "Flash + DeepSpeed", "256x"),
    Tier(6, 131_072, 16_384, 8, "Flash + DeepSpeed", "512x"),
    Tier(7, 262_144, 32_768, 6, "Flash + DeepSpeed", "1024x"),
    Tier(8, 524_288, 65_536, 4, "+ EXTREME", "2048x"),
    Tier(9, 1_048_576, 131_072, 4, "+ Ring Attn", "4096x"),
    Tier(10, 2_097_152, 262_144, 3, "+ Ring Attn", "8192x"),
    Tier(11, 4_194_304, 524_288, 2, "+ Ring Attn", "16384x"),
)
