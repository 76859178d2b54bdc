"""How fast a card does each kind of work: the most it could, and what a run is expected to reach.

What `plan measure` found on the card itself comes before the card's peak times a share from ``calibration.yaml``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from planner.calibration import Calibration
from planner.hardware import HardwareProfile
from planner.ledger import Resource, Work

TO_HOST, TO_DEVICE, ON_DISK, LAUNCH = "to_host", "to_device", "disk", "launch"
KINDS = ("linear", "attention", "memory", TO_HOST, TO_DEVICE, ON_DISK, LAUNCH)
"""Products with weights, attention, the device's own memory, the link to the host and from it, the disk, the host."""
UNBOUNDED = frozenset({"memory", ON_DISK, LAUNCH})
"""What no bound goes by: caches may serve it, or no peak is known."""


AT_ONCE = 1e15
"""A rate that takes no time worth telling."""


@dataclass(frozen=True)
class Rates:
    """FLOP/s, bytes/s or kernels/s by kind of work; None where it is unknown.

    Attributes:
        most: no work of that kind is done faster.
        likely: what is expected.
    """

    most: Mapping[str, float | None]
    likely: Mapping[str, float | None]


def kind_of(work: Work) -> str:
    """The rate that a piece of work goes by; over the link, work whose name ends in ``/out`` leaves the card."""
    if work.resource is Resource.PREFETCH:
        return TO_DEVICE
    if work.resource not in (Resource.LINK, Resource.EXPOSED):
        return work.resource.value
    return TO_HOST if work.name.endswith("/out") else TO_DEVICE


def rates_of(kernel: str, dtype: str, head_size: int, gpu: HardwareProfile, constants: Calibration) -> Rates:
    """Rates of a configuration on a card.

    A peak in a data sheet is that of a nominal clock, which cards exceed: where more was measured, the bound goes by
    what was measured.

    Args:
        kernel: attention kernel.
        dtype: ``fp32``, ``fp16`` or ``bf16``.
        head_size: width of one head.
    """
    sheet = gpu.rates.get(dtype)
    peak = float(sheet.value) if sheet is not None and sheet.value is not None else None
    bandwidth, link = _value(gpu.bandwidth.value), _value(gpu.pcie_bytes_per_second.value)
    attention = float(constants.attention_share(kernel, gpu.compute_capability, dtype, head_size)["value"])
    most = {"linear": peak, "attention": peak, "memory": bandwidth, TO_HOST: link, TO_DEVICE: link}
    most |= {ON_DISK: None, LAUNCH: None}
    shares = {
        "linear": constants.efficiency("linear"),
        "attention": attention,
        "memory": constants.efficiency("memory"),
        TO_HOST: constants.efficiency("link"),
        TO_DEVICE: constants.efficiency("link"),
    }
    likely = {kind: None if rate is None else rate * shares[kind] for kind, rate in most.items() if kind in shares}
    likely[ON_DISK] = constants.disk_rate()
    # With the CPU alone nothing is launched: what computes is who would launch.
    likely[LAUNCH] = 1 / constants.launch_seconds() if gpu.kind == "gpu" else AT_ONCE
    if gpu.measured is None:
        return Rates(most, likely)
    found = gpu.measured.rates(kernel, dtype, head_size)
    if peak is None and found["attention"] is None and found["linear"] is not None:
        # Approximate: a kernel that was not measured, on a card without a known peak, gets its share of the products.
        found["attention"] = found["linear"] * attention
    for kind, rate in found.items():
        if rate is not None:
            likely[kind] = rate
            known = most[kind]
            most[kind] = None if known is None else max(known, rate)
    return Rates(most, likely)


def _value(fact: float | int | None) -> float | None:
    return None if fact is None else float(fact)
