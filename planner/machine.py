"""The machine that runs this: its card through NVML, its CPU, its memory with the limits of containers."""

from __future__ import annotations

import importlib
import os
import platform
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from planner.card_file import squashed
from planner.errors import PlanError
from planner.hardware import RATES, HardwareProfile, Sourced, list_profiles
from planner.units import GIB, format_bytes


def detect_local() -> HardwareProfile:
    """The card of this machine, through NVML (the package nvidia-ml-py): CUDA's first visible one.

    A card is a known one only if both its printed name and its memory fit; otherwise the profile holds what
    NVML says and its rates are unknown. Raises PlanError without the package, the driver or a card.
    """
    try:
        nvml = importlib.import_module("pynvml")
    except ImportError:
        install = "Run pip install 'tierplan[gpu]', or use --gpu cpu."
        raise _no_card("needs the package nvidia-ml-py to look at the card.", install) from None
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        raise _no_card(f"no NVIDIA driver answers here ({error}).") from None
    try:
        handle = _first_visible(nvml)
        printed = nvml.nvmlDeviceGetName(handle)
        driver, uuid = nvml.nvmlSystemGetDriverVersion(), _text(nvml.nvmlDeviceGetUUID(handle))
        major, minor = nvml.nvmlDeviceGetCudaComputeCapability(handle)
        memory = nvml.nvmlDeviceGetMemoryInfo(handle, version=nvml.nvmlMemory_v2)
        total, reserved, used = int(memory.total), int(memory.reserved), int(memory.used)
    except nvml.NVMLError as error:
        raise _no_card(f"the driver does not tell about the card ({error}).") from None
    finally:
        nvml.nvmlShutdown()
    name, version = _text(printed), _text(driver)
    said = f"NVML on this machine, driver {version}"
    # Approximate: what CUDA sees is taken to be the total less what the driver reserves.
    visible = Sourced(total - reserved, f"{said}: total less reserved", basis="measured")
    in_use = Sourced(used, f"{said}: held by other processes when looked at", basis="measured")
    known = [card for card in list_profiles() if _is_card(card, name, total)]
    if known:
        card = min(known, key=lambda each: abs(total - (each.memory_bytes.value or 0)))
        shipped = card.visible_bytes  # the lower of the two: nothing is gained by trusting the higher
        lower = shipped if shipped.value is not None and shipped.value < total - reserved else visible
        return replace(card, visible_bytes=lower, in_use_bytes=in_use, uuid=uuid)
    unknown = Sourced(None, said, f"no profile has the name {name!r} with {format_bytes(total)} of memory")
    return HardwareProfile(
        id=re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-"),
        name=name,
        vendor="NVIDIA",
        aliases=(),
        kind="gpu",
        architecture="unknown",
        compute_capability=(major, minor),
        memory_bytes=Sourced(total, f"{said}: total", basis="measured"),
        visible_bytes=visible,
        context_bytes=Sourced(GIB, "above the largest found on any card, 0.81 GiB", basis="assumed"),
        bandwidth=unknown,
        rates=dict.fromkeys(RATES, unknown),
        pcie_bytes_per_second=unknown,
        # Both begin at compute capability 8.0: NVIDIA's manuals, and the flash-attention package's own list.
        supports_bf16=major >= 8,
        supports_flash_attention_2=major >= 8,
        sm_count=unknown,
        tdp_w=unknown,
        in_use_bytes=in_use,
        uuid=uuid,
    )


def cpu_profile() -> HardwareProfile:
    """This machine without a card: memory is what this process may use, rates are not known."""
    memory = Sourced(host_ram_bytes(), "this machine's memory and cgroup limits", basis="measured")
    unknown = Sourced(None, "this machine", "not measured on this machine")
    absent = Sourced(None, "this machine", "a CPU has none")
    return HardwareProfile(
        id="cpu",
        name=platform.processor() or platform.machine() or "CPU",
        vendor="unknown",
        aliases=(),
        kind="cpu",
        architecture=platform.machine(),
        compute_capability=None,
        memory_bytes=memory,
        visible_bytes=memory,
        context_bytes=Sourced(0, "no CUDA context without a card", basis="derived"),
        bandwidth=unknown,
        rates=dict.fromkeys(RATES, unknown),
        pcie_bytes_per_second=absent,
        supports_bf16=False,
        supports_flash_attention_2=False,
        sm_count=absent,
        tdp_w=unknown,
    )


def machine_name() -> str:
    """The processor and how many of its threads this process may use; to tell machines apart."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    except OSError:
        name = ""
    return f"{name or platform.processor() or platform.machine() or 'CPU'}, {processors()} threads"


def processors() -> int:
    """How many of its processor's threads this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def host_ram_bytes() -> int:
    """Bytes of host memory this process may use: what is built in, or a lower limit set by a cgroup."""
    import psutil

    return min([int(psutil.virtual_memory().total), *_cgroup_limits()])


def free_host_bytes() -> int:
    """Bytes of host memory that can still be had: what is free or only caches files, in the machine and each cgroup."""
    import psutil

    return max(0, min([int(psutil.virtual_memory().available), *_cgroup_room()]))


_FILES = {
    "memory.max": (("memory.current", "memory.stat"), ("active_file", "inactive_file")),
    "memory.limit_in_bytes": (
        ("memory.usage_in_bytes", "memory.stat"),
        ("total_active_file", "total_inactive_file"),
    ),
}
"""By the file of a cgroup's limit: those of its use and statistics, and what of these is cache and given up."""

_ROOT, _OWN = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def _cgroup_limits(root: Path = _ROOT, own: Path = _OWN) -> list[int]:
    """Memory limits of this process's cgroup and all above it, of version 1 and 2; none outside Linux."""
    return [limit for _, _, limit in _limited_cgroups(root, own)]


def _cgroup_room(root: Path = _ROOT, own: Path = _OWN) -> list[int]:
    """What each of these cgroups has left; those that do not tell what they use are left out."""
    room = []
    for folder, name, limit in _limited_cgroups(root, own):
        (used, statistics), caches = _FILES[name]
        try:
            held = int((folder / used).read_text(encoding="utf-8"))
            lines = (folder / statistics).read_text(encoding="utf-8").splitlines()
            cached = sum(int(line.split()[1]) for line in lines if line.split()[:1] and line.split()[0] in caches)
        except (OSError, ValueError, IndexError):
            continue
        room.append(limit - max(0, held - cached))
    return room


def _limited_cgroups(root: Path, own: Path) -> Iterator[tuple[Path, str, int]]:
    """Folder, name of the file with the limit, and the limit, of each cgroup that has one."""
    try:
        lines = own.read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for _, controllers, group in (line.split(":", 2) for line in lines if line.count(":") >= 2):
        if controllers == "":
            tree, name = root, "memory.max"
        elif "memory" in controllers.split(","):
            tree, name = root / "memory", "memory.limit_in_bytes"
        else:
            continue
        leaf = tree / group.lstrip("/")
        # In a container the group's path may be the host's and not exist here: then the root is the limit.
        for folder in [leaf, *leaf.parents][: len(leaf.parts) - len(tree.parts) + 1]:
            try:
                text = (folder / name).read_text(encoding="utf-8").strip()
            except OSError:
                continue
            if text.isdigit():  # "max" is no limit
                yield folder, name, int(text)


def _no_card(why: str, nearest: str = "Name a card, or use --gpu cpu.") -> PlanError:
    return PlanError("--gpu local", why, nearest)


def _first_visible(nvml: Any) -> Any:
    """NVML's handle of CUDA's first visible card. Approximate: in the order of the bus."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    first = (visible if visible is not None else "0").split(",")[0].strip()
    count = int(nvml.nvmlDeviceGetCount())
    if first.startswith("GPU-"):
        return nvml.nvmlDeviceGetHandleByUUID(first)
    if first.isdigit() and int(first) < count:
        return nvml.nvmlDeviceGetHandleByIndex(int(first))
    why = f"the driver lists {count} cards"
    why += f" and CUDA_VISIBLE_DEVICES is {visible!r}." if visible is not None else "."
    raise _no_card(why)


def _is_card(card: HardwareProfile, printed: str, total: int) -> bool:
    # Older drivers left out "NVIDIA "; totals differ by 2 % between drivers, by 20 % between variants.
    sold = card.memory_bytes.value
    same_name = squashed(card.name).removeprefix("nvidia") == squashed(printed).removeprefix("nvidia")
    return same_name and sold is not None and abs(total - sold) <= sold / 10


def _text(answer: str | bytes) -> str:
    return answer.decode() if isinstance(answer, bytes) else answer  # bytes from older nvidia-ml-py
