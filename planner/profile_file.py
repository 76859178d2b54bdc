"""Writes a card's profile as the YAML file that `planner.card_file` reads."""

from __future__ import annotations

from typing import Any

import yaml

from planner.hardware import HardwareProfile, Sourced
from planner.measured import Measured


def profile_text(profile: HardwareProfile) -> str:
    """The file's text; reading it gives the profile again, but for what other programs held of the card.

    Rates keep six digits.
    """
    document: dict[str, Any] = {
        "id": profile.id,
        "name": profile.name,
        "aliases": list(profile.aliases),
        "vendor": profile.vendor,
        "architecture": profile.architecture or "unknown",
        "kind": profile.kind,
        "compute_capability": _capability(profile),
        "sm_count": _fact(profile.sm_count, int),
        "tdp": _fact(profile.tdp_w, lambda value: f"{value:g} W"),
        "memory": _fact(profile.memory_bytes, _bytes),
        "visible_memory": _fact(profile.visible_bytes, _bytes),
        "cuda_context": _fact(profile.context_bytes, _bytes),
        "memory_bandwidth": _fact(profile.bandwidth, _bandwidth),
        "pcie_bandwidth": _fact(profile.pcie_bytes_per_second, _bandwidth),
        "rates": {name: _fact(rate, _flops) for name, rate in profile.rates.items()},
        "bf16": {"value": profile.supports_bf16, "source": "as tierplan knows this machine"},
        "flash_attention_2": {"value": profile.supports_flash_attention_2, "source": "as tierplan knows this machine"},
        "notes": list(profile.notes),
    }
    if profile.measured is not None:
        document["measured"] = _measured(profile.measured)
    return yaml.safe_dump(document, sort_keys=False, allow_unicode=True, width=110)


def _fact(fact: Sourced, write: Any) -> dict[str, Any]:
    if fact.value is None:
        return {"value": "unknown", "why": fact.why or "not looked up"}
    return {"value": write(fact.value), "basis": fact.basis, "source": fact.source}


def _capability(profile: HardwareProfile) -> dict[str, Any]:
    if profile.compute_capability is not None:
        told = ".".join(map(str, profile.compute_capability))
    elif profile.gfx:
        told = profile.gfx
    else:
        return {"value": "unknown", "why": "a CPU has none" if profile.kind == "cpu" else "not known"}
    return {"value": told, "source": "as tierplan knows this machine"}


def _measured(measured: Measured) -> dict[str, Any]:
    kernels = {
        kernel: {
            dtype: {size: _flops(rate) for size, rate in sorted(sizes.items())} for dtype, sizes in by_dtype.items()
        }
        for kernel, by_dtype in measured.attention.items()
    }
    links = ("memory", "to_host", "to_device", "both_ways", "pinning", "disk")
    found: dict[str, Any] = {name: getattr(measured, name) for name in links}
    document: dict[str, Any] = {
        "source": measured.source,
        "machine": measured.machine,
        "matmul": {dtype: _flops(rate) for dtype, rate in measured.matmul.items()},
        "attention": kernels,
        **{name: _bandwidth(rate) for name, rate in found.items() if rate is not None},
    }
    if measured.disk_folder:
        document["disk_folder"] = measured.disk_folder
    if measured.kernels_per_second is not None:
        document["kernels_per_second"] = float(f"{measured.kernels_per_second:.6g}")
    return document if measured.host_memory is None else document | {"host_memory": _bytes(measured.host_memory)}


def _bytes(size: float) -> str:
    return f"{int(size) // 2**20} MiB" if int(size) % 2**20 == 0 and size else f"{int(size)} B"


def _bandwidth(rate: float) -> str:
    return f"{_plain(rate / 1e9)} GB/s"


def _flops(rate: float) -> str:
    return f"{_plain(rate / 1e12)} TFLOP/s"


def _plain(number: float) -> str:
    """Six digits without an exponent, which quantities are not read with."""
    return f"{float(f'{number:.6g}'):.12f}".rstrip("0").rstrip(".")
