"""Progress inside a step: what is left is weighed by layers done before, and lines without a terminal are few."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from rich.console import Console
from trainer_tiny import make_plan, save_model, write_sources

from planner.plan import PhaseWork
from trainer.layer_progress import USUAL_RATIO, LayerDone, LayerProgress, Pace, planned_ratio
from trainer.output import RunFolder
from trainer.progress import QUIET_SECONDS, Progress
from trainer.run import execute

CPU = torch.device("cpu")
STREAMED = {
    "lora": {"rank": 4, "alpha": 8},
    "chunked_loss": {"rows": 16},
    "streamed": {"chunk": 8, "heads": 2, "staging": "host", "kernel": "cpu"},
}


class Clock:
    """Stands still until it is told to go on."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def _shown(passes: list[tuple[list[float], list[float]]], tokens: list[int], ratio: float = 3.0) -> list[LayerDone]:
    """What is shown of passes whose forward and backward layers take so many seconds, in the order they run."""
    clock, shown = Clock(), []
    layers = LayerProgress(CPU, ratio, shown.append, clock)
    layers.begin("step 1 of 1", tokens)
    for forward, backward in passes:
        for direction, each in (("forward", forward), ("backward", backward)):
            layers(direction, 0, len(forward))  # type: ignore[arg-type]
            for done, seconds in enumerate(each, 1):
                clock.now += seconds
                layers(direction, done, len(forward))  # type: ignore[arg-type]
    return shown


def test_first_pass_goes_by_the_planned_ratio_until_a_backward_layer_is_done() -> None:
    shown = _shown([([2.0] * 4, [8.0] * 4)], [1000])
    assert [each.seconds_left for each in shown] == pytest.approx([30, 28, 26, 24, 24, 16, 8, 0])
    assert shown[-1].tokens_per_second == pytest.approx(1000 / 40)
    assert str(shown[5]).startswith("step 1 of 1, layer 2 of 4 backward, 25 tokens/s")


def test_layers_with_a_window_keep_their_own_time() -> None:
    """Layers 1 and 3 of four see all keys: after one pass the next, twice as slow, is known from its first layer on."""
    forward, backward = [1.0, 5.0, 1.0, 5.0], [20.0, 2.0, 20.0, 2.0]
    slower = ([2 * each for each in forward], [2 * each for each in backward])
    shown = _shown([(forward, backward), slower], [10, 10])
    assert shown[8].seconds_left == pytest.approx(2 * sum(forward + backward) - 2)
    assert shown[12].seconds_left == pytest.approx(2 * sum(backward[1:]))


def test_in_the_first_pass_a_backward_layer_goes_by_its_own_forward() -> None:
    shown = _shown([([1.0, 5.0, 1.0, 5.0], [20.0, 2.0, 20.0, 2.0])], [10])
    assert shown[4].seconds_left == pytest.approx(20 / 5 * (1 + 5 + 1))
    assert shown[6].seconds_left == pytest.approx((20 + 2 + 20) / (5 + 1 + 5) * 1)


def test_micro_batches_to_come_are_counted_by_their_tokens() -> None:
    shown = _shown([([1.0], [3.0])], [100, 300])
    assert [each.seconds_left for each in shown] == pytest.approx([3 + 12, 0 + 12])


def test_evaluation_never_goes_back() -> None:
    clock, shown = Clock(), []
    layers = LayerProgress(CPU, 3.0, shown.append, clock)
    layers.begin("held-out rows", [50])
    layers("evaluate", 0, 2)
    for done in (1, 2):
        clock.now += 4
        layers("evaluate", done, 2)
    assert [each.seconds_left for each in shown] == [4, 0]
    assert "layer 1 of 2 forward" in str(shown[0])


def test_a_pass_that_goes_on_in_the_middle_has_no_unknown_time() -> None:
    pace = Pace(3.0)
    pace.begin(4, backward=True)
    pace.note(4 + 2, 6.0)
    assert pace.left(4 + 2) == pytest.approx(6.0)


def test_a_pass_over_fewer_layers_says_nothing_of_one_over_all() -> None:
    pace = Pace(3.0)
    pace.begin(1, backward=True)
    pace.note(0, 1.0)
    pace.note(1, 3.0)
    pace.begin(4, backward=True)
    pace.note(0, 2.0)
    assert pace.left(0) == pytest.approx(3 * 2 + 4 * 6)


def test_ratio_is_the_plans_where_it_has_one(tmp_path: Path) -> None:
    save_model("llama", tmp_path)
    plan = make_plan(tmp_path)
    assert planned_ratio(plan) == USUAL_RATIO

    def work(seconds: float) -> PhaseWork:
        return PhaseWork(seconds=seconds, flops=0, memory_bytes=0, to_host_bytes=0, to_device_bytes=0)

    phases = {"forward": work(2), "attention": work(3), "backward": work(4), "attention_backward": work(9)}
    timed = plan.model_copy(update={"time": plan.time.model_copy(update={"phases": phases})})
    assert planned_ratio(timed) == 13 / 5


def test_without_a_terminal_a_line_comes_now_and_then(tmp_path: Path) -> None:
    save_model("llama", tmp_path / "model")
    text, clock = io.StringIO(), Clock()
    folder = RunFolder(make_plan(tmp_path / "model", out=str(tmp_path / "out")))
    progress = Progress(Console(file=text, width=200), folder, 3, clock)
    layers = LayerProgress(CPU, 3.0, progress.show_layer, clock)
    layers.begin("step 1 of 3", [5000])
    layers("forward", 0, 100)
    for done in range(1, 101):
        clock.now += 1
        layers("forward", done, 100)
    lines = text.getvalue().splitlines()
    assert len(lines) == int(100 // QUIET_SECONDS)
    assert lines[0].startswith("step 1 of 3, layer 30 of 100 forward, 12 tokens/s, ") and "6 min 10 s left" in lines[0]


def test_a_streamed_run_tells_of_layers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save_model("llama", tmp_path / "model")
    write_sources(tmp_path / "data")
    monkeypatch.setattr("trainer.progress.QUIET_SECONDS", 0.0)
    plan = make_plan(
        tmp_path / "model",
        data=str(tmp_path / "data"),
        out=str(tmp_path / "out"),
        choices=STREAMED,
        steps=2,
        accumulation=2,
        executor="streamed",
        evaluation_rows=2,
    )
    assert execute(plan) == 0
    told = [line.partition(",")[0] for line in capsys.readouterr().out.splitlines() if ", layer " in line]
    wanted = ["probe step"] * 8 + ["probe evaluation"] * 2 + ["held-out rows before training"] * 6
    wanted += ["step 1 of 2"] * 12 + ["step 2 of 2"] * 12 + ["held-out rows after training"] * 6
    assert told == wanted
