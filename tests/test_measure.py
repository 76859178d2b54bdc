"""`plan measure`: a CPU measured for real with tiny sizes, a card with a fake device, and what plans take from it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from test_machine import fake_nvml

from planner import machine
from planner.cli import main
from planner.cli_check import card_of
from planner.errors import PlanError
from planner.hardware import SHIPPED, HardwareProfile, load_profile
from planner.machine import cpu_profile, detect_local, machine_name
from planner.own_profile import folder, own_file, with_own_measurement
from planner.planning import Request, make_plan
from planner.profile_file import profile_text
from trainer import benchmark, disk_benchmark, launch_probe, machine_profile
from trainer.benchmark import Call, Effort, TooLarge
from trainer.benchmark_device import TorchDevice
from trainer.machine_profile import Probe, measured_profile
from trainer.streamed.disk_file import DiskFile

Capture = pytest.CaptureFixture[str]
TINY = Effort(0.001, 0.0, 3, (32,), (32,), 8, 4096, 4096)
IDS = sorted(path.stem for path in SHIPPED.glob("*.yaml"))


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A configuration folder for each test."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    yield tmp_path / "config" / "tierplan"


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measures with next to no effort."""
    for name in ("CPU", "CPU_QUICK", "GPU", "GPU_QUICK"):
        monkeypatch.setattr(benchmark, name, TINY)


class FakeCard:
    """A card on which every call is at once; it has no kernel called flash, and room for short sequences alone."""

    kernels = ("cudnn", "flash", "efficient", "eager")
    has_link = True

    def __init__(self) -> None:
        self.asked: list[tuple[Any, ...]] = []

    def _call(self, *asked: Any) -> Call:
        self.asked.append(asked)
        return lambda: None

    def matmul(self, dtype: str, size: int) -> Call | None:
        return self._call("matmul", dtype, size) if dtype != "bf16" else None

    def attention(self, kernel: str, dtype: str, head_size: int, tokens: int) -> tuple[Call, int] | None:
        if tokens > 2048:
            raise TooLarge
        if kernel == "flash" or (kernel == "cudnn" and dtype == "fp32"):
            return None
        return self._call(kernel, dtype, head_size, tokens), 4

    def norm(self, tokens: int) -> tuple[Call, int] | None:
        return self._call("norm", tokens), 36 * tokens

    def link(self, way: str, size: int) -> Call | None:
        return self._call(way, size)

    def pin(self, size: int) -> Call | None:
        return self._call("pin", size)

    def wait(self) -> None:
        self.asked.append(("wait",))


def measured_card(card: HardwareProfile, context: int | None = 500 * 2**20) -> HardwareProfile:
    return measured_profile(card, lambda _: None, device=FakeCard(), effort=TINY, probe=probe_with(context))


def probe_with(context: int | None = 500 * 2**20) -> Probe:
    """Instead of processes of their own."""

    def probe(module: str, *arguments: str) -> Any:
        if module == "trainer.launch_probe":
            assert load_profile(*arguments).visible_bytes.basis == "measured", "it plans with what is known by then"
            return [{"kernels": 4000.0, "seconds": 0.1}]
        return {"visible_bytes": 7900 * 2**20, "context_bytes": context}

    return probe


@pytest.mark.parametrize("name", IDS)
def test_a_shipped_card_written_and_read_is_the_same_card(tmp_path: Path, name: str) -> None:
    card = load_profile(name)
    file = tmp_path / "card.yaml"
    file.write_text(profile_text(card), encoding="utf-8")
    again = load_profile(str(file))
    assert again.facts().keys() == card.facts().keys()
    for key, fact in card.facts().items():
        assert again.facts()[key].value == (pytest.approx(fact.value, rel=1e-5) if fact.value else fact.value), key
        assert fact.value is None or again.facts()[key].basis == fact.basis
    same = ("id", "name", "aliases", "kind", "compute_capability", "gfx", "supports_bf16", "notes", "measured")
    assert all(getattr(again, key) == getattr(card, key) for key in same)
    assert again.budget_bytes() == card.budget_bytes()


def test_a_measured_card_written_and_read_has_its_rates(tmp_path: Path) -> None:
    card = measured_card(load_profile("rtx2060s"))
    assert card.measured is not None
    file = tmp_path / "card.yaml"
    file.write_text(profile_text(card), encoding="utf-8")
    again = load_profile(str(file))
    assert again.measured is not None and again.measured.file == str(file)
    assert profile_text(again) == profile_text(card)
    assert {*again.measured.matmul} == {"fp32", "tf32", "fp16"}
    assert {*again.measured.attention} == {"cudnn", "efficient", "eager"}
    assert {*again.measured.attention["efficient"]} == {"fp32", "fp16", "bf16"}
    assert {*again.measured.attention["cudnn"]["bf16"]} == {64, 80, 128, 256}
    assert again.measured.kernels_per_second == 40_000
    assert again.budget_bytes() == (7900 - 500) * 2**20
    assert again.context_bytes.basis == again.visible_bytes.basis == "measured"


def test_a_context_that_the_driver_does_not_tell_is_left_as_it_was() -> None:
    card = load_profile("rtx2060s")
    assert measured_card(card, context=None).context_bytes == card.context_bytes


def test_buffers_leave_room_in_both_memories() -> None:
    within = machine_profile._within(benchmark.GPU, 2**30, 2**31)
    assert (within.linked, within.pinned, within.normed) == (2**27, 2**28, 2**13)
    assert machine_profile._within(benchmark.GPU, 2**40, 2**40) == benchmark.GPU


def test_what_is_measured_and_how_often() -> None:
    card = FakeCard()
    ladder = replace(TINY, enough=1e9, tokens=(1024, 2048, 4096))
    found = benchmark.measure(card, ladder, "a test", "a machine", 2**30, lambda _: None)
    lengths = [asked[3] for asked in card.asked if asked[0] == "efficient"]
    assert lengths == [1024, 2048] * 12, "up to the longest there is room for"
    assert found.attention["efficient"]["fp16"][64] > 0
    ways = ("to_host", "to_device", "both_ways", "pin", "norm")
    assert [asked for asked in card.asked if asked[0] in ways] == [
        ("norm", 8), ("to_host", 4096), ("to_device", 4096), ("both_ways", 4096), ("pin", 4096),
    ]  # fmt: skip


def test_the_rate_is_work_over_the_median_call(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    waits = iter([9.0, 4.0, 1.0, 2.0, 3.0, 6.0, 8.0, 9.0])  # warming up, the first, then three turns of two calls
    monkeypatch.setattr(benchmark.time, "perf_counter", lambda: now[0])

    def call() -> None:
        now[0] += next(waits)

    two = replace(TINY, enough=5.0, seconds=5.0)
    assert benchmark._largest(FakeCard(), two, (1,), lambda _: (call, 100)) == 200 / 9.0


@pytest.mark.usefixtures("tiny")
def test_the_cpu_is_measured_and_plans_take_it(own_folder: Path, capsys: Capture) -> None:
    before = make_plan(Request(gpu="cpu", model="smollm2-135m", total_tokens=512))
    assert before.time.step_seconds.estimate is None and before.gpu.measured_file is None
    assert main(["measure", "--gpu", "cpu", "--quick"]) == 0
    out, err = capsys.readouterr()
    file = own_folder / "cpu.yaml"
    assert f"Written: {file}" in out and "Plan with it: plan --gpu cpu" in out
    assert "measuring: products of matrices, fp32" in err
    assert [path.name for path in own_folder.iterdir()] == ["cpu.yaml"], "nothing half-written is left"
    profile = load_profile(str(file))
    found = profile.measured
    assert found is not None and found.machine == machine_name() and f"torch {torch.__version__}" in found.source
    assert {"fp32", "bf16"} <= {*found.matmul} and {*found.attention} == {"cpu", "eager"}
    assert {*found.attention["cpu"]["fp32"]} == {64, 80, 128, 256}
    assert found.memory is not None and found.host_memory == machine.host_ram_bytes()
    assert found.to_host is None and found.pinning is None
    for gpu in ("cpu", str(file)):
        plan = make_plan(Request(gpu=gpu, model="smollm2-135m", total_tokens=512))
        assert plan.time.step_seconds.estimate is not None and plan.time.step_seconds.bound is None
        assert {rate.basis for rate in plan.time.rates.values()} == {"measured"}
        assert plan.gpu.measured_file == str(file) and plan.gpu.kind == "cpu"
        assert "plan measure" in plan.time.basis
    assert card_of(plan) == "cpu"
    assert main(["measure", "--gpu", "cpu"]) == 0, "its own file is written anew"


@pytest.mark.usefixtures("tiny")
def test_out_names_the_file_and_nothing_else_is_overwritten(tmp_path: Path, capsys: Capture) -> None:
    place = tmp_path / "mine.yaml"
    assert main(["measure", "--gpu", "cpu", "--out", str(place)]) == 0
    assert f"plan --gpu {place}" in capsys.readouterr().out and not folder().exists()
    place.write_text("a: 1\n")
    assert main(["measure", "--gpu", "cpu", "--out", str(place)]) == 2
    assert "`plan measure` did not write" in capsys.readouterr().err and place.read_text() == "a: 1\n"
    assert main(["measure", "--gpu", "cpu", "--out", str(tmp_path / "no" / "mine.yaml")]) == 2
    assert main(["measure", "--gpu", "cpu", "--scratch", str(tmp_path / "no")]) == 2
    assert "is no folder" in capsys.readouterr().err
    assert main(["measure", "--gpu", "rtx2060s"]) == 2
    assert "Only local and cpu can be measured" in capsys.readouterr().err


def test_an_interrupted_measurement_leaves_nothing(monkeypatch: pytest.MonkeyPatch, own_folder: Path) -> None:
    def interrupted(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(benchmark, "measure", interrupted)
    assert main(["measure", "--gpu", "cpu"]) == 130
    assert not list(own_folder.iterdir())


def test_without_the_train_extra_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.setitem(sys.modules, "trainer.machine_profile", None)
    assert main(["measure", "--gpu", "cpu"]) == 2
    assert "pip install 'tierplan[train]'" in capsys.readouterr().err


def test_a_measurement_from_another_machine_is_not_used(monkeypatch: pytest.MonkeyPatch, own_folder: Path) -> None:
    card = measured_profile(cpu_profile(), lambda _: None, device=FakeCard(), effort=TINY)
    own_folder.mkdir(parents=True)
    own_file(card).write_text(profile_text(card))
    assert with_own_measurement(cpu_profile()).measured is not None
    monkeypatch.setattr("planner.own_profile.machine_name", lambda: "another, 64 threads")
    assert with_own_measurement(cpu_profile()).measured is None


def test_a_measurement_that_cannot_be_read_says_what_to_do(own_folder: Path) -> None:
    own_folder.mkdir(parents=True)
    (own_folder / "cpu.yaml").write_text("a: [")
    with pytest.raises(PlanError, match=r"Run `plan measure --gpu cpu` again, or remove"):
        make_plan(Request(gpu="cpu"))


@pytest.mark.parametrize("by_name", [False, True], ids=["by-uuid", "by-name"])
def test_a_local_card_takes_its_measurement(monkeypatch: pytest.MonkeyPatch, own_folder: Path, by_name: bool) -> None:
    fake_nvml(monkeypatch, ("NVIDIA GeForce RTX 2060 SUPER", 8192, 440, 300))
    card = detect_local()
    assert own_file(card) == own_folder / "GPU-0.yaml"
    measured = measured_card(card)
    own_folder.mkdir(parents=True)
    place = own_folder / "nvidia-geforce-rtx-2060-super.yaml" if by_name else own_file(card)
    place.write_text(profile_text(measured))
    plan = make_plan(Request(gpu="local", total_tokens=4096))
    assert plan.gpu.id == "rtx2060s" and plan.gpu.measured_file == str(place)
    assert plan.gpu.context_bytes == 500 * 2**20 and plan.gpu.context_basis == "measured"
    assert plan.memory.gpu.budget_bytes == (8192 - 440 - 300 - 500) * 2**20, "what is visible and in use is asked anew"
    assert {rate.basis for rate in plan.time.rates.values()} == {"measured"}
    assert plan.time.rates["launch"].per_second == 40_000
    assert card_of(plan) == str(place), "a plan file finds what it was made with"
    monkeypatch.setattr("planner.own_profile.machine_name", lambda: "another, 64 threads")
    elsewhere = with_own_measurement(card).measured
    assert (elsewhere is None) is by_name, "a UUID is this card's wherever it is put"
    if elsewhere is not None:
        assert measured.measured is not None and elsewhere.matmul == pytest.approx(
            {**measured.measured.matmul}, rel=1e-5
        )
        gone = (elsewhere.kernels_per_second, elsewhere.to_host, elsewhere.disk, elsewhere.host_memory)
        assert gone == (None,) * 4, "what the host has a part in stays with the host"
    other = make_plan(Request(gpu="rtx2060s", total_tokens=4096))
    assert other.gpu.measured_file is None, "a card that is only named is planned by its shipped profile"


def test_an_unknown_card_gets_times_by_being_measured(monkeypatch: pytest.MonkeyPatch, own_folder: Path) -> None:
    fake_nvml(monkeypatch, ("NVIDIA Something New", 16384, 400, 0))
    card = detect_local()
    assert make_plan(Request(gpu="local", total_tokens=4096)).time.step_seconds.estimate is None
    own_folder.mkdir(parents=True)
    own_file(card).write_text(profile_text(measured_card(card)))
    time = make_plan(Request(gpu="local", total_tokens=4096)).time
    assert time.step_seconds.estimate is not None and time.step_seconds.bound is None


@pytest.mark.parametrize("name", ["local", "cpu"])
def test_a_plan_for_this_machine_says_how_to_measure_it_until_it_is(
    name: str, monkeypatch: pytest.MonkeyPatch, own_folder: Path
) -> None:
    card = replace(load_profile("rtx4090"), uuid="GPU-1") if name == "local" else cpu_profile()
    monkeypatch.setattr("planner.planning.detect_local", lambda: card)

    def told(gpu: str) -> list[str]:
        plan = make_plan(Request(gpu, "smollm2-135m", total_tokens=256))
        return [warning for warning in plan.warnings if "`plan measure`" in warning]

    assert len(told(name)) == 1 and f"--gpu {name} then plans with" in told(name)[0]
    assert told("rtx4090") == []
    own_folder.mkdir(parents=True)
    own_file(card).write_text(profile_text(measured_card(card)), encoding="utf-8")
    assert told(name) == []


def test_a_card_that_torch_does_not_see(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    fake_nvml(monkeypatch, ("NVIDIA GeForce RTX 2060 SUPER", 8192, 440, 300))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["measure"]) == 2
    assert "sees no CUDA device" in capsys.readouterr().err


def test_the_process_that_measures_the_context_failing_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    failed = subprocess.CompletedProcess([], 1, "", "Traceback\nRuntimeError: no driver\n")
    monkeypatch.setattr(machine_profile.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(PlanError, match="RuntimeError: no driver"):
        machine_profile.fresh_process("trainer.context_probe")
    said = subprocess.CompletedProcess([], 0, 'a word\n{"visible_bytes": 1, "context_bytes": null}\n', "")
    monkeypatch.setattr(machine_profile.subprocess, "run", lambda *_, **__: said)
    assert machine_profile.fresh_process("trainer.context_probe") == {"visible_bytes": 1, "context_bytes": None}


def test_a_device_that_has_no_such_thing_says_none() -> None:
    cpu = TorchDevice(torch.device("cpu"))
    assert cpu.matmul("tf32", 8) is cpu.matmul("fp16", 8) is cpu.attention("cpu", "bf16", 64, 8) is None
    assert cpu.link("to_host", 8) is cpu.pin(8) is None
    call, heads = cpu.attention("cpu", "fp32", 16, 8) or (None, 0)
    assert call is not None and heads > 0
    assert cpu.attention("eager", "fp32", 16, 4096) is None, "scores of long sequences are not held"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"matmul": {"fp99": "1 TFLOP/s"}}, "measured.matmul.fp99"),
        ({"matmul": {"fp16": "1 TB/s"}}, "so it is not a rate"),
        ({"matmul": {"fp16": "99999999 TFLOP/s"}}, "measured on no machine"),
        ({"attention": {"magic": {}}}, "measured.attention.magic"),
        ({"to_hots": "1 GB/s"}, "to_hots"),
        ({"source": ""}, "measured.source"),
    ],
)
def test_mistakes_in_the_measured_block_are_told(tmp_path: Path, change: dict[str, Any], told: str) -> None:
    document = yaml.safe_load((SHIPPED / "rtx2060s.yaml").read_text())
    document["measured"] = {"source": "a test", "machine": "a test"} | change
    (tmp_path / "card.yaml").write_text(yaml.safe_dump(document))
    with pytest.raises(PlanError) as caught:
        load_profile(str(tmp_path / "card.yaml"))
    assert told in str(caught.value) and "card.yaml" in str(caught.value)


def test_launches_are_timed_on_the_trainers_own_step(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, value in (("TOKENS", 16), ("WARMING", 1), ("STEPS", 3)):
        monkeypatch.setattr(launch_probe, name, value)
    plain, packed = launch_probe.launched("cpu", (launch_probe.PLAIN, (*launch_probe.PLAIN, "sequence_packing")))
    assert plain["kernels"] > 100 and plain["seconds"] > 0 and packed["kernels"] >= plain["kernels"]
    plan = launch_probe.small_plan("cpu", tmp_path / "model")
    assert {choice.id for choice in plan.choices} >= {*launch_probe.PLAIN}
    assert plain["kernels"] == sum(phase.kernels for name, phase in plan.time.phases.items() if name != "optimizer")


def test_a_disk_is_measured_where_it_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny: None, capsys: Capture
) -> None:
    monkeypatch.setattr(machine_profile, "QUICK_DISK_BYTES", 2**20)
    monkeypatch.setattr(disk_benchmark, "PART", 2**18)
    direct: list[bool] = []
    own = DiskFile.__init__

    def seen(file: DiskFile, *arguments: Any) -> None:
        own(file, *arguments)
        direct.append(file.direct)
        file.direct = True  # as on a disk; what is written here is whole pages

    monkeypatch.setattr(DiskFile, "__init__", seen)
    monkeypatch.setattr(disk_benchmark, "file_system", lambda _: "ext4")
    place = tmp_path / "mine.yaml"
    assert main(["measure", "--gpu", "cpu", "--quick", "--scratch", str(tmp_path), "--out", str(place)]) == 0
    assert f"disk of {tmp_path}: " in " ".join(capsys.readouterr().out.split()) and len(direct) == 1
    found = load_profile(str(place)).measured
    assert found is not None and found.disk is not None and found.rates("cpu", "fp32", 64)["disk"] == found.disk
    assert [path.name for path in tmp_path.iterdir()] == ["mine.yaml"], "nothing of it is left"


def test_a_disk_that_is_memory_or_full_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(disk_benchmark, "file_system", lambda _: "tmpfs")
    with pytest.raises(PlanError, match=r"measuring the disk of .* no disk but memory \(tmpfs\).*--scratch names"):
        disk_benchmark.disk_rate(tmp_path, 2**20)
    monkeypatch.setattr(disk_benchmark, "file_system", lambda _: "ext4")
    with pytest.raises(PlanError, match=r"measuring the disk of .*(is full|too large).*--scratch names"):
        disk_benchmark.disk_rate(tmp_path, 2**60)
