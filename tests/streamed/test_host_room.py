"""Host memory: too little is refused before any is taken, and what fails midway gives everything back."""

from __future__ import annotations

import mmap
import weakref
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from trainer_tiny import make_plan, save_model, write_sources

from planner.errors import PlanError
from planner.plan import HostMemory, Plan
from planner.units import GIB
from trainer import host_memory, host_room, run
from trainer.host_memory import Arena, pinned_now
from trainer.session import build
from trainer.streamed import build as streamed_build

CHOICES: dict[str, dict[str, Any]] = {
    "lora": {"rank": 4, "alpha": 8},
    "chunked_loss": {"rows": 16},
    "streamed": {"chunk": 8, "heads": 2, "staging": "host", "kernel": "cpu"},
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("room")
    save_model("llama", folder / "model")
    write_sources(folder / "data")
    return folder


def _plan(place: Path, **given: Any) -> Plan:
    return make_plan(
        place / "model", data=str(place / "data"), out=str(place / "out"), choices=CHOICES, executor="streamed", **given
    )


def _large(place: Path, *, total: int = 524_288, target: int = 524_288) -> Plan:
    """80 GiB of layer inputs and 10 GiB between the passes, beside 3 GiB that do not depend on the length."""
    terms = {"activations/checkpoints": 80 * GIB, "buffers/staging": 10 * GIB, "runtime/process": 3 * GIB}
    plan = _plan(place, total_tokens=total, target=target)
    host = HostMemory(budget_bytes=128 * GIB, peak_bytes=93 * GIB, pinned_bytes=90 * GIB, terms=terms)
    return plan.model_copy(update={"memory": plan.memory.model_copy(update={"host": host})})


def _free(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(host_room, "free_host_bytes", lambda: size)
    monkeypatch.setattr(host_room, "host_anonymous_bytes", lambda: 0)


def test_too_little_is_refused_before_anything_is_taken(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _free(monkeypatch, 48 * GIB)
    monkeypatch.setattr(run, "build", lambda _: pytest.fail("the model was loaded"))
    said = (
        r"524,288 tokens on CPU: the plan takes 93\.00 GiB of host memory, 90\.00 GiB of it pinned, and 48\.00 GiB can "
        r"be had here now, 45\.00 GiB less\. With the same settings 262,144 tokens would do: --context 262144\. "
        r"--host-ram 48GiB plans for what there is\."
    )
    with pytest.raises(PlanError, match=said):
        run.execute(_large(place))
    assert not (place / "out").exists()


def test_what_the_process_holds_already_counts_as_there(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _free(monkeypatch, 92 * GIB)
    with pytest.raises(PlanError, match=r"1\.00 GiB less"):
        host_room.check_host(_large(place))
    monkeypatch.setattr(host_room, "host_anonymous_bytes", lambda: GIB)
    host_room.check_host(_large(place))


@pytest.mark.parametrize(("there", "target", "tokens"), [
    (93 * GIB, 524_288, 524_288),
    (48 * GIB, 1000, 262_144),
    (48 * GIB + GIB // 100, 524_288, 262_144),
    (48 * GIB, 300_000, None),  # no shorter sequence has so many trained tokens
    (3 * GIB, 524_288, None),
    (GIB, 524_288, None),
])  # fmt: skip
def test_nearest_context_is_proportional(place: Path, there: int, target: int, tokens: int | None) -> None:
    assert host_room.longest_within(_large(place, target=target), there) == tokens


def test_without_room_for_any_sequence_none_is_named(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _free(monkeypatch, GIB // 2)
    with pytest.raises(PlanError, match=r"92\.50 GiB less\. Free some\.$"):
        host_room.check_host(_large(place))


def test_memory_that_cannot_be_mapped_midway_is_given_back(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[weakref.ref[Any]] = []
    own = mmap.mmap

    class Pages(own):  # type: ignore[misc, valid-type]
        """Pages that can be watched; there are five of them and no more."""

        def __new__(cls, *args: Any, **named: Any) -> Any:
            if len(made) == 5:
                raise OSError(12, "Cannot allocate memory")
            pages = own.__new__(cls, *args, **named)
            made.append(weakref.ref(pages))
            return pages

    monkeypatch.setattr(host_memory.mmap, "mmap", Pages)
    with pytest.raises(PlanError, match=r"B of host memory .*, after 32\.00 KiB: the system refused.*Cannot all"):
        build(_plan(place))
    assert len(made) == 5 and all(each() is None for each in made)


@pytest.mark.parametrize("fails", [1, 2, 7])
def test_memory_that_cannot_be_pinned_midway_is_given_back(
    place: Path, monkeypatch: pytest.MonkeyPatch, fails: int
) -> None:
    registered: list[int] = []
    asked = []

    def register(address: int, size: int, flags: int) -> int:
        asked.append(size)
        if len(asked) == fails:
            return 2  # cudaErrorMemoryAllocation
        registered.append(address)
        return 0

    def unregister(address: int) -> int:
        registered.remove(address)
        return 0

    driver = SimpleNamespace(cudaHostRegister=register, cudaHostUnregister=unregister)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: driver)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)

    def pinning(*args: Any, **named: Any) -> Arena:
        return Arena(*args, **(named | {"pinned": True}))

    monkeypatch.setattr(streamed_build, "Arena", partial(pinning))
    before = pinned_now()
    with pytest.raises(PlanError, match=r"the driver refused to pin it \(CUDA error 2\)\. A shorter context"):
        build(_plan(place))
    assert len(asked) == fails and registered == [] and pinned_now() == before


def test_a_run_that_ends_gives_everything_back(place: Path) -> None:
    built = build(_plan(place))
    assert built.host is not None
    held = [weakref.ref(array) for array in built.host.held]
    assert built.host.pinned_bytes == sum(array.nbytes for array in built.host.held) > 0
    built.close()
    assert built.host.pinned_bytes == 0
    del built
    assert all(each() is None for each in held)
