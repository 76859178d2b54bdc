"""The kernel that is fastest on the card that is there is taken where the plan fits with it, and never unasked."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import pytest
import torch

from planner.plan import Plan
from planner.planning import Request, make_plan
from trainer import kernel_choice
from trainer.kernel_choice import Timed, choose_kernel, kernel_seconds, planned_kernel, with_fastest_kernel


@cache
def planned(owner: str, command: str = "plan", gpu: str = "rtx4090") -> Plan:
    return make_plan(Request(gpu=gpu, total_tokens=16384, required=(owner,), command=command))


@pytest.mark.parametrize("owner", ["streamed", "exact_attention"])
def test_a_clearly_faster_kernel_is_planned_anew(owner: str) -> None:
    plan = planned(owner)
    assert planned_kernel(plan) == (owner, "flash")
    other, told = with_fastest_kernel(plan, {"flash": 3e-3, "cudnn": 2e-3, "efficient": 9e-3})
    assert other.knobs(owner)["kernel"] == "cudnn" and other.verdict == "fits"
    assert "cudnn 2.00 ms, flash 3.00 ms" in told and "cudnn instead of flash" in told
    before, after = ({choice.id: choice.knobs for choice in each.choices} for each in (plan, other))
    assert after == before | {owner: before[owner] | {"kernel": "cudnn"}}, "all else stays"
    assert other.train == plan.train and other.total_tokens == plan.total_tokens
    assert other.provenance.command == f"plan --set {owner}.kernel=cudnn" and planned_kernel(other) is None


def test_a_little_faster_is_noise() -> None:
    plan = planned("streamed")
    same, told = with_fastest_kernel(plan, {"flash": 1.00e-3, "cudnn": 0.97e-3})
    assert same is plan and "flash, as planned" in told


def test_the_next_is_taken_where_the_fastest_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    plan, made = planned("streamed"), kernel_choice._planned_with
    monkeypatch.setattr(
        kernel_choice, "_planned_with", lambda plan, owner, name: None if name == "cudnn" else made(plan, owner, name)
    )
    other, _ = with_fastest_kernel(plan, {"flash": 9e-3, "cudnn": 1e-3, "efficient": 2e-3})
    assert other.knobs("streamed")["kernel"] == "efficient"


def test_a_kernel_that_the_planned_one_does_not_run_beside_is_taken() -> None:
    other, told = with_fastest_kernel(planned("streamed"), {"efficient": 2e-3, "cudnn": 3e-3})
    assert other.knobs("streamed")["kernel"] == "efficient" and "flash does not run" in told


def test_a_card_that_is_full_says_nothing_about_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(kernel_choice, "on_this_card", lambda _, shape: f"a card: {shape}")
    monkeypatch.setattr(kernel_choice, "_seconds", full)
    monkeypatch.setattr(torch, "randn", lambda *_, **__: torch.empty(0))
    plan = planned("streamed")
    same, told = choose_kernel(plan, torch.device("cuda"))
    assert same is plan and "was not measured" in told


def test_what_a_user_asked_for_stays() -> None:
    plan = planned("streamed", "plan --set streamed.kernel=flash")
    assert planned_kernel(plan) is None
    assert choose_kernel(plan, torch.device("cuda")) == (plan, "")


def test_nothing_is_measured_without_a_card() -> None:
    plan = planned("streamed")
    assert choose_kernel(plan, torch.device("cpu")) == (plan, "")


def test_every_kernel_that_runs_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU with its own kernel in the place of one, and another that refuses."""

    class Refuses:
        def forward(self, *_: object) -> None:
            raise RuntimeError("no kernel for this card")

    kernels = {"cpu": object(), "flash": kernel_choice.KERNELS["cpu"], "cudnn": Refuses()}
    monkeypatch.setattr(kernel_choice, "KERNELS", kernels)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: None)
    monkeypatch.setattr(kernel_choice, "TOKENS", 64)
    found = kernel_seconds(Timed.of(planned("streamed")), torch.device("cpu"))
    assert set(found) == {"flash"} and found["flash"] > 0


class Measured:
    """Kernels that are timed by turns, and how often."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path, *found: dict[str, float]) -> None:
        self.times, waiting = 0, iter(found)

        def measure(*_: object) -> dict[str, float]:
            self.times += 1
            return next(waiting)

        self.card = "one card"
        monkeypatch.setenv("XDG_CONFIG_HOME", str(folder))
        monkeypatch.setattr(kernel_choice, "kernel_seconds", measure)
        monkeypatch.setattr(kernel_choice, "on_this_card", lambda _, shape: f"{self.card}: {shape}")
        monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)


def test_what_was_measured_is_not_measured_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    card, plan = torch.device("cuda"), planned("streamed")
    fast, slow = {"flash": 3e-3, "cudnn": 2e-3}, {"flash": 3e-3, "cudnn": 9e-3}
    measured = Measured(monkeypatch, tmp_path, fast, slow, slow, slow)
    first, told = choose_kernel(plan, card)
    again, told_again = choose_kernel(plan, card)
    assert measured.times == 1 and again == first and first.knobs("streamed")["kernel"] == "cudnn"
    assert told.startswith("Attention, measured here: cudnn")
    file = tmp_path / "tierplan" / "kernels.json"
    assert told_again.startswith(f"Attention, measured here before ({file}): cudnn")
    # Other heads, or another card, are measured for themselves, and nothing of the first is lost.
    choose_kernel(make_plan(Request("rtx4090", "llama-3.2-1b", total_tokens=16384, required=("streamed",))), card)
    measured.card = "another card"
    assert choose_kernel(plan, card)[0] is plan and measured.times == 3
    measured.card = "one card"
    assert choose_kernel(plan, card)[0] == first and measured.times == 3
    assert len(json.loads(file.read_text())) == 3


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{",
        '{"ENTRY": {}}',
        '{"ENTRY": {"flash": "fast"}}',
        '{"ENTRY": {"flash": -1.0}}',
        '{"ENTRY": {"bogus": 0.1}}',
    ],
)
def test_a_file_that_is_no_measurement_is_measured_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str
) -> None:
    plan, file = planned("streamed"), tmp_path / "tierplan" / "kernels.json"
    measured = Measured(monkeypatch, tmp_path, {"flash": 3e-3, "cudnn": 2e-3})
    file.parent.mkdir()
    file.write_text(text.replace("ENTRY", f"one card: {Timed.of(plan)}"), encoding="utf-8")
    assert choose_kernel(plan, torch.device("cuda"))[0].knobs("streamed")["kernel"] == "cudnn"
    assert measured.times == 1 and len(json.loads(file.read_text())) == 1


def test_a_kernel_that_did_not_run_once_is_tried_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    plan = planned("streamed")
    measured = Measured(monkeypatch, tmp_path, {"cudnn": 2e-3, "efficient": 4e-3}, {"flash": 1e-3, "cudnn": 2e-3})
    assert choose_kernel(plan, torch.device("cuda"))[0].knobs("streamed")["kernel"] == "cudnn"
    assert choose_kernel(plan, torch.device("cuda"))[0] is plan and measured.times == 2


def test_a_folder_that_takes_nothing_stops_no_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "tierplan").write_text("a file where the folder would be", encoding="utf-8")
    measured = Measured(monkeypatch, tmp_path, *[{"flash": 3e-3, "cudnn": 2e-3}] * 2)
    for times in (1, 2):
        assert choose_kernel(planned("streamed"), torch.device("cuda"))[0].knobs("streamed")["kernel"] == "cudnn"
        assert measured.times == times
