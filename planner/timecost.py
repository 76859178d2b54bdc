"""Time of one step: a roofline with a lower bound and an estimate.

Matrix products and attention share the matrix units, so their times add; copies over the link run beside them.
The bound takes the card's peak rates; the estimate multiplies them by the shares in ``calibration.yaml``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from planner.calibration import Calibration
from planner.compose import Configuration
from planner.hardware import HardwareProfile
from planner.ledger import Phase, Resource
from planner.symbols import greatest

# Rates that stand in where a card's are unknown: they rank configurations and are never shown.
NOMINAL = {Resource.LINEAR: 1e12, Resource.ATTENTION: 1e12, Resource.MEMORY: 1e11, Resource.LINK: 1e10}


@dataclass(frozen=True)
class StepTime:
    """Seconds of one micro-batch; numbers or numpy arrays.

    Attributes:
        bound: no step can be faster; None where the card's rates are unknown.
        estimate: what is expected; None where the card's rates are unknown.
        rank: what configurations are ranked by: the estimate, or the same sum at nominal rates.
    """

    bound: Any
    estimate: Any
    rank: Any

    def times(self, count: int) -> StepTime:
        """The time of so many, one after the other."""
        if self.bound is None:
            return StepTime(None, None, self.rank * count)
        return StepTime(self.bound * count, self.estimate * count, self.rank * count)


def step_time(
    configuration: Configuration, amounts: Mapping[str, Any], gpu: HardwareProfile, constants: Calibration
) -> StepTime:
    """Time of one forward and backward pass, given the amount of every piece of work.

    The optimiser's own work on the adapters is left out.

    Approximate: norms, activations and other bandwidth-bound work are within the shares of the matrix products.
    """
    kernel = configuration.settings["attention"]
    shares = {
        Resource.LINEAR: constants.efficiency("linear"),
        Resource.ATTENTION: constants.attention_efficiency(kernel, gpu.compute_capability),
        Resource.MEMORY: constants.efficiency("memory"),
        Resource.LINK: constants.efficiency("link"),
    }
    peak = gpu.rates.get(configuration.settings["dtype"])
    known = {
        Resource.LINEAR: peak.value if peak else None,
        Resource.ATTENTION: peak.value if peak else None,
        Resource.MEMORY: gpu.bandwidth.value,
        Resource.LINK: gpu.pcie_bytes_per_second.value,
    }
    used = {work.resource for work in configuration.ledger.work.values()}
    complete = all(known[resource] for resource in used)
    rates = {resource: float(known[resource] or 0) if complete else NOMINAL[resource] for resource in Resource}
    bound: Any = 0.0
    estimate: Any = 0.0
    for phase in (Phase.FORWARD, Phase.LOSS, Phase.BACKWARD):
        ideal, likely, ideal_link, likely_link = 0.0, 0.0, 0.0, 0.0
        for work in configuration.ledger.work.values():
            if work.phase is not phase:
                continue
            seconds = amounts[work.name] / rates[work.resource]
            if work.resource is Resource.LINK:
                ideal_link, likely_link = ideal_link + seconds, likely_link + seconds / shares[work.resource]
            else:
                ideal += 0.0 if work.resource is Resource.MEMORY else seconds
                likely += seconds / shares[work.resource]
        bound = bound + greatest(ideal, ideal_link)
        # One layer's copy has nothing to hide behind: the last out, the first back.
        estimate = estimate + greatest(likely, likely_link) + likely_link / configuration.letters["L"]
    return StepTime(bound, estimate, estimate) if complete else StepTime(None, None, estimate)
