"""The machine at hand: NVML's answers, its CPU, and the memory limits of containers."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import yaml

from planner import machine
from planner.errors import PlanError
from planner.hardware import SHIPPED, load_profile
from planner.machine import cpu_profile, detect_local, host_ram_bytes

MIB = 2**20
IDS = sorted(path.stem for path in SHIPPED.glob("*.yaml"))


def write(folder: Path, data: Any, name: str = "mine.yaml") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text(data if isinstance(data, str) else yaml.safe_dump(data), encoding="utf-8")
    return path


class FakeError(Exception):
    pass


def fake_nvml(monkeypatch: pytest.MonkeyPatch, *cards: tuple[Any, int, int, int], fail: str = "") -> list[str]:
    """Stand in for pynvml: cards of (name, total, reserved, used) in MiB; ``fail`` names the failing call."""
    calls: list[str] = []

    def call(name: str, answer: Any) -> Any:
        def called(*args: Any, **named: Any) -> Any:
            calls.append(name)
            if name == fail:
                raise FakeError("as asked")
            return answer(*args, **named)

        return called

    def memory(index: int, version: int) -> SimpleNamespace:
        _, total, reserved, used = cards[index]
        return SimpleNamespace(total=total * MIB, reserved=reserved * MIB, used=used * MIB)

    answers = {
        "nvmlInit": lambda: None,
        "nvmlShutdown": lambda: None,
        "nvmlDeviceGetCount": lambda: len(cards),
        "nvmlDeviceGetHandleByIndex": lambda index: index,
        "nvmlDeviceGetHandleByUUID": lambda uuid: int(uuid.removeprefix("GPU-")),
        "nvmlDeviceGetName": lambda index: cards[index][0],
        "nvmlDeviceGetUUID": lambda index: f"GPU-{index}",
        "nvmlSystemGetDriverVersion": lambda: "580.1",
        "nvmlDeviceGetCudaComputeCapability": lambda index: (7, 5),
        "nvmlDeviceGetMemoryInfo": memory,
    }
    functions = {name: call(name, answer) for name, answer in answers.items()}
    nvml = SimpleNamespace(NVMLError=FakeError, nvmlMemory_v2=2, **functions)
    monkeypatch.setitem(sys.modules, "pynvml", nvml)  # type: ignore[arg-type]
    return calls


@pytest.mark.parametrize("name", ["NVIDIA GeForce RTX 2060 SUPER", "GeForce RTX 2060 SUPER", b"GeForce RTX 2060 SUPER"])
def test_a_known_local_card_with_this_drivers_memory(monkeypatch: pytest.MonkeyPatch, name: str | bytes) -> None:
    calls = fake_nvml(monkeypatch, (name, 8192, 440, 300))
    card, shipped = detect_local(), load_profile("rtx2060s")
    assert (card.id, card.rates, card.context_bytes) == ("rtx2060s", shipped.rates, shipped.context_bytes)
    assert card.visible_bytes.value == (8192 - 440) * MIB
    assert card.visible_bytes.basis == "measured" and "580.1" in card.visible_bytes.source
    assert card.in_use_bytes.value == 300 * MIB
    assert card.budget_bytes() == (8192 - 440 - 300 - 621) * MIB
    assert calls[-1] == "nvmlShutdown"


def test_a_driver_that_shows_more_than_the_profile_is_not_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_nvml(monkeypatch, ("NVIDIA GeForce RTX 2060 SUPER", 8192, 0, 0))
    assert detect_local().visible_bytes == load_profile("rtx2060s").visible_bytes


@pytest.mark.parametrize(
    ("name", "total"), [("NVIDIA GeForce RTX 3060", 8192), ("NVIDIA GeForce RTX 3060 Laptop GPU", 12288)]
)
def test_an_unknown_local_card_gets_nobody_elses_numbers(
    monkeypatch: pytest.MonkeyPatch, name: str, total: int
) -> None:
    fake_nvml(monkeypatch, (name, total, 200, 0))
    card = detect_local()
    assert card.id not in IDS and card.name == name
    assert card.memory_bytes.value == total * MIB
    assert card.compute_capability == (7, 5) and not card.supports_bf16
    assert all(rate.value is None for rate in card.rates.values())
    assert card.bandwidth.value is None and name in card.bandwidth.why
    assert card.context_bytes.basis == "assumed"
    assert card.budget_bytes() == (total - 200 - 1024) * MIB
    assert [line.partition(":")[0] for line in card.missing()] == [
        "memory_bandwidth",
        "pcie_bandwidth",
        "rates.fp16",
    ]


def test_cuda_visible_devices_chooses_the_local_card(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_nvml(monkeypatch, ("NVIDIA GeForce RTX 3090", 24576, 450, 0), ("NVIDIA GeForce RTX 4090", 24564, 350, 0))
    assert detect_local().id == "rtx3090"
    for chosen in ("1", "1,0", "GPU-1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", chosen)
        assert detect_local().id == "rtx4090"
    for nothing in ("", "-1", "2"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", nothing)
        with pytest.raises(PlanError, match="lists 2 cards and CUDA_VISIBLE_DEVICES"):
            detect_local()


def test_no_package_no_driver_no_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with pytest.raises(PlanError, match=r"pip install 'tierplan\[gpu\]', or use --gpu cpu"):
        detect_local()
    fake_nvml(monkeypatch, fail="nvmlInit")
    with pytest.raises(PlanError, match="no NVIDIA driver answers here"):
        detect_local()
    fake_nvml(monkeypatch)
    with pytest.raises(PlanError, match=r"the driver lists 0 cards.*--gpu cpu"):
        detect_local()
    calls = fake_nvml(monkeypatch, ("NVIDIA H200", 143771, 615, 0), fail="nvmlDeviceGetMemoryInfo")
    with pytest.raises(PlanError, match="does not tell about the card"):
        detect_local()
    assert calls[-1] == "nvmlShutdown"


def test_the_cpu_has_memory_and_unknown_rates() -> None:
    cpu = cpu_profile()
    assert (cpu.kind, cpu.compute_capability, cpu.supports_bf16) == ("cpu", None, False)
    assert cpu.budget_bytes() == host_ram_bytes() > 0
    assert all(rate.value is None and rate.why for rate in cpu.rates.values())
    assert not any(line.startswith("pcie") for line in cpu.missing())


def cgroups(folder: Path, own: str, files: dict[str, str]) -> list[int]:
    for name, text in files.items():
        path = folder / "fs" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n", encoding="utf-8")
    write(folder, own, "own")
    return machine._cgroup_limits(folder / "fs", folder / "own")


def test_cgroup_limits_of_both_versions(tmp_path: Path) -> None:
    second = {"a/b/memory.max": "max", "a/memory.max": "2000", "memory.max": "3000", "c/memory.max": "1"}
    assert sorted(cgroups(tmp_path, "0::/a/b\n", second)) == [2000, 3000]
    first = {"memory/a/memory.limit_in_bytes": "4000", "memory/memory.limit_in_bytes": str(2**63 - 4096)}
    own = "5:cpu,memory:/a/gone\n4:cpuset:/a\n0::/nowhere\n"
    assert sorted(cgroups(tmp_path, own, first)) == [3000, 4000, 2**63 - 4096]
    assert machine._cgroup_limits(tmp_path, tmp_path / "absent") == []


def test_a_cgroup_lowers_host_memory_and_never_raises_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=32 * 2**30))
    for limits, expected in (([], 32), ([16 * 2**30], 16), ([2**63 - 4096, 8 * 2**30], 8), ([2**40], 32)):
        monkeypatch.setattr(machine, "_cgroup_limits", lambda limits=limits: limits)
        assert host_ram_bytes() == expected * 2**30
    assert cpu_profile().memory_bytes.value == 32 * 2**30


def test_what_a_cgroup_has_left_leaves_its_cache_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    statistics = "anon 700\nfile 400\nactive_file 100\ninactive_file 250\nslab_reclaimable 9"
    second = {"a/memory.max": "2000", "a/memory.current": "1200", "a/memory.stat": statistics, "memory.max": "9000"}
    cgroups(tmp_path / "2", "0::/a\n", second)
    assert machine._cgroup_room(tmp_path / "2" / "fs", tmp_path / "2" / "own") == [2000 - (1200 - 350)]
    statistics = "cache 50\ntotal_active_file 30\ntotal_inactive_file 20"
    first = {"limit_in_bytes": "5000", "usage_in_bytes": "4100", "stat": statistics}
    cgroups(tmp_path / "1", "4:memory:/\n", {f"memory/memory.{name}": text for name, text in first.items()})
    assert machine._cgroup_room(tmp_path / "1" / "fs", tmp_path / "1" / "own") == [950]
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=3 * 2**30))
    for room, expected in (([], 3 * 2**30), ([2**30], 2**30), ([2**40], 3 * 2**30), ([-5], 0)):
        monkeypatch.setattr(machine, "_cgroup_room", lambda room=room: room)
        assert machine.free_host_bytes() == expected


def test_reading_a_card_imports_neither_torch_nor_nvml() -> None:
    code = (
        "import sys; from planner.hardware import load_profile; load_profile('rtx2060s');"
        "print([name for name in ('torch', 'pynvml', 'psutil', 'sympy') if name in sys.modules])"
    )
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
