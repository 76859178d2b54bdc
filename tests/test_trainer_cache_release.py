"""The allocator's cache is given back when it is time, where much is held, and on a card alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from run_folder import record
from trainer_tiny import make_plan, save_model, write_sources

from planner.errors import PlanError
from planner.planning import Request
from planner.planning import make_plan as planned
from trainer.cache_release import CacheRelease
from trainer.run import execute

CARD = torch.device("cuda")


class _Allocator:
    """Holds so many bytes, of which all but some go when the cache is emptied."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, reserved: int, live: int) -> None:
        self.reserved, self.times = reserved, 0

        def empty() -> None:
            self.reserved, self.times = live, self.times + 1

        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: self.reserved)
        monkeypatch.setattr(torch.cuda, "empty_cache", empty)


def test_it_is_given_back_when_it_is_time_and_much(monkeypatch: pytest.MonkeyPatch) -> None:
    allocator, release = _Allocator(monkeypatch, reserved=1200, live=300), CacheRelease(every=10, share=0.1)
    assert [release.after(step, 1000, CARD) for step in range(1, 10)] == [0] * 9 and allocator.times == 0
    assert release.after(10, 1000, CARD) == 900 and allocator.times == 1 and release.released == [(10, 900)]


@pytest.mark.parametrize(("reserved", "given"), [(1100, 0), (1101, 801)])
def test_little_is_left_alone(monkeypatch: pytest.MonkeyPatch, reserved: int, given: int) -> None:
    allocator, release = _Allocator(monkeypatch, reserved, live=300), CacheRelease(every=1, share=0.1)
    assert release.after(1, 1000, CARD) == given and allocator.times == bool(given)


def test_without_a_card_there_is_nothing_to_give_back(monkeypatch: pytest.MonkeyPatch) -> None:
    allocator, release = _Allocator(monkeypatch, reserved=10_000, live=300), CacheRelease(every=1, share=0.1)
    assert release.after(1, 1000, torch.device("cpu")) == release.after(1, None, CARD) == allocator.times == 0


def test_a_plan_with_it_is_the_same_and_a_cpu_has_no_allocator_of_the_kind() -> None:
    plain, asked = planned(Request(tier=2)), planned(Request(tier=2, required=("cache_release",)))
    assert asked.memory == plain.memory and asked.time == plain.time and asked.knobs("cache_release")["every"] == 1000
    with pytest.raises(PlanError, match="it is a card's allocator"):
        planned(Request(gpu="cpu", model="smollm2-135m", total_tokens=256, required=("cache_release",)))


def test_a_run_looks_after_each_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_model("llama", tmp_path / "model")
    write_sources(tmp_path / "data")
    looked: list[int] = []
    monkeypatch.setattr(CacheRelease, "after", lambda self, step, taken, device: looked.append(step))
    choices = {"lora": {"rank": 4, "alpha": 8}, "cache_release": {"every": 2, "share": 0.1}}
    given = {"steps": 3, "data": str(tmp_path / "data"), "out": str(tmp_path / "run")}
    assert execute(make_plan(tmp_path / "model", choices=choices, **given)) == 0
    assert looked == [1, 2, 3] and record(tmp_path / "run")["cache_released"] == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a card")
def test_on_a_card_the_driver_has_it_again() -> None:
    held = torch.empty(2**20, device="cuda")
    large = torch.empty(2**28, device="cuda")
    del large
    release = CacheRelease(every=1, share=0.1)
    assert release.after(1, 2**22, torch.device("cuda")) >= 2**30
    assert torch.cuda.memory_reserved() < 2**28 and held.numel() == 2**20
