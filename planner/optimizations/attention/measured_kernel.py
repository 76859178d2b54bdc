"""The attention kernel that is the fastest on this card, by measurement before a run.

cuDNN's autotuner chooses algorithms of convolutions, and language models have none. What can be chosen is the kernel of
attention: each that takes the model's heads is timed forward and back, once for a card, its libraries and heads of a
shape, and the plan is made anew with a clearly faster one where that fits.
"""

from __future__ import annotations

from planner.optimizations.base import Evidence, Situation
from planner.optimizations.item import Claimed, Given, State


class MeasuredKernel(Given):
    """The kernel of attention, timed before a run."""

    id = "measured_kernel"
    title = "the fastest attention kernel, measured before a run"
    claimed = (
        Claimed(
            33,
            "5–10 % faster by cuDNN's autotuner",
            "does not hold",
            "0 %: it chooses kernels for convolutions, and Phi-2 has none. The kernel of attention is measured "
            "instead.",
        ),
    )
    evidence = (Evidence("another kernel is taken where it is clearly faster and fits", "tests/test_kernel_choice.py"),)

    def state(self, situation: Situation) -> tuple[State, str]:
        """Always on a card."""
        if situation.gpu.kind == "gpu":
            return (
                "always",
                "where a run is planned and made at once, and no kernel is set by hand; a plan file has its kernel",
            )
        return "never", "on the CPU there is one kernel"
