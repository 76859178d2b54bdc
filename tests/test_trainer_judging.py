"""Evaluations while a run trains: when it stops, what it goes back to, and what is kept on disk."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from run_folder import lines, record, stopped_and_resumed
from safetensors.torch import load_file
from torch import Tensor
from trainer_tiny import make_plan, save_model, write_sources

from planner.errors import PlanError
from planner.plan import Plan, Train
from planner.planning import Request
from planner.planning import make_plan as planned
from trainer import running
from trainer.judging import FOLDER, Judge, Judged, Judging
from trainer.run import execute
from trainer.session import build
from trainer.shown import shown_as_saved

STEPS = 12
STOPPING = {"patience": 2, "threshold": 0.001}


class _Writes:
    """Writes a folder of so many bytes, and notes which."""

    def __init__(self, size: int = 100) -> None:
        self.size = size

    def __call__(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        (folder / "adapter.bin").write_bytes(bytes(self.size))


def _there(out: Path) -> list[int]:
    folder = out / FOLDER
    return sorted(int(each.name.removeprefix("step-")) for each in folder.iterdir()) if folder.is_dir() else []


def _judge(judging: Judging, out: Path, losses: list[float]) -> tuple[Judge, list[str | None]]:
    judge = Judge(judging, out, 5)
    return judge, [judge.after(5 * (n + 1), loss, _Writes()) for n, loss in enumerate(losses)]


def test_it_stops_after_so_many_that_are_no_better(tmp_path: Path) -> None:
    judge, told = _judge(Judging(stopping=(2, 0.01)), tmp_path, [3.0, 2.0, 1.99, 1.985])
    assert told[:3] == [None] * 3 and told[3] is not None and "1 % in 2 evaluations" in told[3]
    assert judge.judged.best == (20, 1.985), "the least loss, though by little"
    assert _there(tmp_path) == [20], "and its adapters alone"
    better, told = _judge(Judging(stopping=(2, 0.01)), tmp_path / "b", [3.0, 3.1, 2.9, 2.95, 2.8])
    assert told == [None] * 5 and better.judged.worse == 0 and _there(tmp_path / "b") == [25]
    steady, told = _judge(Judging(), tmp_path / "c", [1.0, 2.0, 3.0])
    assert (
        told == [None] * 3 and steady.judged.losses == [(5, 1.0), (10, 2.0), (15, 3.0)] and not _there(tmp_path / "c")
    )


def test_a_loss_that_is_no_number_is_never_the_best(tmp_path: Path) -> None:
    judge, told = _judge(Judging(stopping=(3, 0.0)), tmp_path, [math.nan, 3.0, math.nan, 1.0, math.inf])
    assert told == [None] * 5 and judge.judged.best == (20, 1.0) and judge.judged.worse == 1
    assert _there(tmp_path) == [20]


@pytest.mark.parametrize(
    ("keeping", "losses", "kept"),
    [
        ((2, 0), [1.0, 2.0, 3.0, 4.0], [5, 15, 20]),
        ((2, 0), [4.0, 3.0, 2.0, 1.0], [15, 20]),
        ((3, 250), [1.0, 2.0, 3.0, 4.0], [5, 20]),
        ((3, 99), [2.0, 1.0, 3.0, 4.0], [10]),
        ((1, 0), [2.0, 1.0, 3.0], [10, 15]),
    ],
)
def test_what_is_kept(tmp_path: Path, keeping: tuple[int, int], losses: list[float], kept: list[int]) -> None:
    judge, _ = _judge(Judging(keeping=keeping), tmp_path, losses)
    assert _there(tmp_path) == judge.judged.kept == kept
    assert f"after steps {', '.join(map(str, kept))}" in judge.told()


def test_without_held_out_rows_the_newest_are_kept(tmp_path: Path) -> None:
    judge = Judge(Judging(keeping=(2, 0), stopping=(1, 0.0)), tmp_path, 5)
    assert [judge.after(step, None, _Writes()) for step in (5, 10, 15)] == [None] * 3
    assert _there(tmp_path) == [10, 15] and judge.judged.best is None


def test_how_often() -> None:
    every = Train(evaluate_every=7)
    assert [Judging().every(Train(), 100), Judging().every(every, 100)] == [0, 7]
    asked = Judging(stopping=(3, 0.0))
    assert [asked.every(Train(), steps) for steps in (100, 1000, 5)] == [10, 100, 1] and asked.every(every, 100) == 7
    judge = Judge(asked, Path("nowhere"), 10)
    assert [step for step in range(1, 31) if judge.due(step, 30)] == [10, 20], "the last step is judged anyway"
    assert not Judge(Judging(), Path("nowhere"), 0).due(10, 30)


def test_what_was_given_is_stored_and_what_came_later_is_dropped(tmp_path: Path) -> None:
    judge, _ = _judge(Judging(keeping=(2, 0), stopping=(9, 0.0)), tmp_path, [3.0, 2.0, 2.5])
    stored = judge.judged.document()
    judge.after(20, 1.0, _Writes())
    assert _there(tmp_path) == [15, 20]
    again = Judge(Judging(keeping=(2, 0), stopping=(9, 0.0)), tmp_path, 5, Judged.of(stored))
    assert _there(tmp_path) == [15] and again.judged.losses == [(5, 3.0), (10, 2.0), (15, 2.5)]
    assert again.judged.best is None, "its adapters are gone: those of step 20 had taken their place"
    assert again.judged.kept == [15] and again.judged.worse == 1 and Judged.of(None) == Judged()
    plain = Judge(Judging(), tmp_path / "plain", 5, Judged.of(stored | {"kept": []}))
    assert plain.judged.best == (10, 2.0), "where none are kept, none are missing"


def test_a_disk_that_takes_nothing_is_told(tmp_path: Path) -> None:
    def full(folder: Path) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(PlanError, match="step-5: cannot be written: No space left"):
        Judge(Judging(keeping=(1, 0)), tmp_path, 5).after(5, 1.0, full)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("judging")
    save_model("llama", folder / "model")
    write_sources(folder / "data")
    return folder


def _plan(place: Path, out: Path, asked: dict[str, dict[str, Any]], **given: Any) -> Plan:
    choices = {"lora": {"rank": 4, "alpha": 8}, "exact_attention": {"kernel": "cpu"}} | asked
    given = {"steps": STEPS, "lr": 1e-2, "evaluation_rows": 5, "validation": 0.25} | given
    return make_plan(place / "model", data=str(place / "data"), out=str(out), choices=choices, **given)


def _saved(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def _same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_evaluating_on_the_way_changes_nothing_and_is_written_down(place: Path, tmp_path: Path) -> None:
    assert execute(_plan(place, tmp_path / "plain", {})) == 0
    assert execute(_plan(place, tmp_path / "run", {}, evaluate_every=4)) == 0
    plain, run = record(tmp_path / "plain"), record(tmp_path / "run")
    assert run["losses"] == plain["losses"] and run["evaluation"] == plain["evaluation"]
    assert _same(_saved(tmp_path / "run" / "adapter"), _saved(tmp_path / "plain" / "adapter"))
    judged = run["judged"]["losses"]
    assert [step for step, _ in judged] == [4, 8] and plain["judged"]["losses"] == []
    told = [
        (line["step"], line["loss"]) for line in lines(tmp_path / "run") if "after step" in line.get("evaluation", "")
    ]
    assert [list(each) for each in told] == judged
    assert not (tmp_path / "run" / FOLDER).exists()


def _rising(monkeypatch: pytest.MonkeyPatch, losses: list[float]) -> list[str]:
    """Let evaluations on the way give these losses; gives when each was made."""
    own, made = running.Running._judge, []

    def judge(self: Any, when: str, step: int | None = None) -> Any:
        found = own(self, when, step)
        if when == "before" or len(made) == len(losses):
            return found
        made.append(when)
        return type(found)(losses[len(made) - 1], found.rows, found.tokens)

    monkeypatch.setattr(running.Running, "_judge", judge)
    return made


def test_a_run_stops_and_saves_its_best(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = _rising(monkeypatch, [5.0, 4.0, 4.5, 4.6])
    out = tmp_path / "run"
    assert execute(_plan(place, out, {"early_stopping": STOPPING}, evaluate_every=2)) == 0
    assert made == ["after step 2", "after step 4", "after step 6", "after step 8"]
    assert len(record(out)["losses"]) == 8 and record(out)["judged"]["stopped"] == 8
    assert "Stopped after step 8: the held-out loss has not fallen by 0.1 % in 2" in " ".join(
        capsys.readouterr().out.split()
    )
    assert _same(_saved(out / "adapter"), _saved(out / FOLDER / "step-4")) and _there(out) == [4]
    assert "trained for 4 steps" in (out / "adapter" / "README.md").read_text()
    monkeypatch.undo()
    first = tmp_path / "first"
    assert execute(_plan(place, first, {}, evaluate_every=4)) == 0
    wanted = dict(map(tuple, record(first)["judged"]["losses"]))[4]  # type: ignore[arg-type]
    assert record(out)["evaluation"]["after"]["loss"] == wanted, "what is evaluated in the end is the best"


def test_a_run_that_gets_better_goes_to_its_end_and_saves_its_last(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = _rising(monkeypatch, [6.0, 5.0, 4.0, 3.0, 2.0, 1.0])
    out = tmp_path / "run"
    assert execute(_plan(place, out, {"early_stopping": STOPPING}, evaluate_every=2)) == 0
    assert made[-1] == "after" and record(out)["judged"]["best"] == [12, 1.0]
    assert record(out)["judged"]["stopped"] is None
    assert record(out)["evaluation"]["after"]["loss"] == 1.0, "the last step is judged once"
    assert len(record(out)["losses"]) == STEPS and _there(out) == [12]
    assert _same(_saved(out / "adapter"), _saved(out / FOLDER / "step-12"))
    assert "trained for 12 steps" in (out / "adapter" / "README.md").read_text()


def test_a_last_step_that_is_no_better_is_not_saved(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _rising(monkeypatch, [6.0, 5.0, 4.0, 3.0, 2.0, 2.5])
    out = tmp_path / "run"
    assert execute(_plan(place, out, {"early_stopping": STOPPING}, evaluate_every=2)) == 0
    assert _there(out) == [10] and _same(_saved(out / "adapter"), _saved(out / FOLDER / "step-10"))
    assert "trained for 10 steps" in (out / "adapter" / "README.md").read_text()


@pytest.mark.parametrize("done", [4, 5, 6])
@pytest.mark.parametrize(
    "kept",
    [
        {"lookahead": {"every": 3, "share": 0.3, "place": "host"}},
        {"lookahead": {"every": 5, "share": 0.5, "place": "gpu"}},
        {"weight_averaging": {"kind": "swa", "decay": 0.9, "place": "gpu"}},
    ],
    ids=str,
)
def test_what_is_judged_is_what_would_be_saved(
    place: Path, tmp_path: Path, kept: dict[str, dict[str, Any]], done: int
) -> None:
    """Of a run that ends there, with the same learning rate at each step."""
    steady = {"schedule": "constant", "warmup": 0.0}
    short, run = tmp_path / "short", tmp_path / "run"
    assert execute(_plan(place, short, kept, **steady, steps=done)) == 0
    asked = kept | {"kept_checkpoints": {"count": 9, "disk": 0.0}}
    assert execute(_plan(place, run, asked, **steady, steps=done + 1, evaluate_every=done)) == 0
    if "weight_averaging" not in kept:  # whose mean begins at a share of all steps
        assert _same(_saved(run / FOLDER / f"step-{done}"), _saved(short / "adapter"))
    plain = tmp_path / "plain"
    assert execute(_plan(place, plain, kept, **steady, steps=done + 1)) == 0
    assert _same(_saved(run / "adapter"), _saved(plain / "adapter"))


def test_adapters_are_back_where_showing_averages_fails(place: Path, tmp_path: Path) -> None:
    average = {"weight_averaging": {"kind": "ema", "decay": 0.9, "place": "gpu"}}
    built = build(_plan(place, tmp_path / "run", average))
    with torch.no_grad():
        for parameter in built.trained:
            parameter.add_(1.0)
    before = [parameter.detach().clone() for parameter in built.trained]

    def half() -> None:
        with torch.no_grad():
            built.trained[0].fill_(7.0)
        raise torch.OutOfMemoryError("no room")

    assert built.averages is not None
    built.averages.show = half  # type: ignore[method-assign]
    with pytest.raises(torch.OutOfMemoryError), shown_as_saved(built):
        raise AssertionError("nothing is judged")
    assert all(torch.equal(one, other) for one, other in zip(built.trained, before, strict=True))


def test_averages_are_what_is_judged_and_training_goes_on_without_them(place: Path, tmp_path: Path) -> None:
    for where in ("gpu", "host"):
        average = {"weight_averaging": {"kind": "ema", "decay": 0.9, "place": where}}
        kept = {"kept_checkpoints": {"count": 2, "disk": 0.0}}
        plain, run, short = (tmp_path / f"{name}-{where}" for name in ("plain", "run", "short"))
        assert execute(_plan(place, plain, average)) == 0
        assert execute(_plan(place, run, average | kept, evaluate_every=4)) == 0
        assert record(run)["losses"] == record(plain)["losses"]
        assert _same(_saved(run / "adapter"), _saved(plain / "adapter"))
        given = {"steps": 4, "schedule": "constant", "warmup": 0.0}
        again = _plan(place, tmp_path / f"again-{where}", average | kept, evaluate_every=4, **given | {"steps": STEPS})
        assert execute(_plan(place, short, average, **given)) == 0 and execute(again) == 0
        assert _same(_saved(tmp_path / f"again-{where}" / FOLDER / "step-4"), _saved(short / "adapter"))


def test_a_run_that_is_stopped_in_between_goes_on_as_it_was(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = {"early_stopping": {"patience": 50, "threshold": 0.0}, "kept_checkpoints": {"count": 2, "disk": 0.0}}
    assert execute(_plan(place, tmp_path / "whole", asked, evaluate_every=2)) == 0
    stopped = _plan(place, tmp_path / "run", asked, evaluate_every=2, save_minutes=1e-9)
    stopped_and_resumed(stopped, monkeypatch, after=7)
    run, whole = record(tmp_path / "run"), record(tmp_path / "whole")
    assert run["judged"] == whole["judged"] and run["losses"] == whole["losses"]
    assert _there(tmp_path / "run") == _there(tmp_path / "whole")
    assert _same(_saved(tmp_path / "run" / "adapter"), _saved(tmp_path / "whole" / "adapter"))


def test_the_plan_has_the_bytes_and_warns_of_what_does_not_go_together(place: Path, tmp_path: Path) -> None:
    size = 4 * 24 * 32 * 46_080  # rank 24: 46,080 inputs and outputs in each of 32 layers
    plan = planned(
        Request(tier=3, required=("early_stopping", "kept_checkpoints"), knobs={"kept_checkpoints": {"count": 5}})
    )
    assert plan.memory.disk.terms["adapters/best"] == 2 * size
    assert plan.memory.disk.terms["adapters/kept"] == 7 * size and plan.memory.disk.training_bytes == 0
    assert plan.memory.gpu == planned(Request(tier=3)).memory.gpu
    assert any("early_stopping may end training while the learning rate is high: by cosine" in w for w in plan.warnings)
    for train in ({"schedule": "constant"}, {"schedule": "constant", "evaluate_every": 10}):
        steady = planned(Request(tier=3, required=("early_stopping",), train=train))
        assert not any("early_stopping" in warning for warning in steady.warnings)
    blind = planned(Request(tier=3, required=("early_stopping",), train={"validation": 0, "evaluate_every": 5}))
    assert sum("holds no documents out" in warning for warning in blind.warnings) == 2
    cycle = planned(Request(tier=3, required=("early_stopping", "one_cycle")))
    assert any("without one_cycle --set train.schedule=constant holds it steady" in told for told in cycle.warnings)
    swa = planned(Request(tier=3, required=("weight_averaging",), knobs={"weight_averaging": {"kind": "swa"}}))
    assert any("(swa) is made for a steady learning rate" in warning for warning in swa.warnings)
    for gib, sets in ((0.5, 4), (0.1, 2), (100.0, 7)):  # of 0.132 GiB each, and one that is being written
        knobs = {"kept_checkpoints": {"count": 5, "disk": gib}}
        within = planned(Request(tier=3, required=("kept_checkpoints",), knobs=knobs))
        assert within.memory.disk.terms["adapters/kept"] == sets * size
    out = tmp_path / "run"
    assert execute(_plan(place, out, {"kept_checkpoints": {"count": 3, "disk": 0.0}}, steps=4)) == 0
    assert {file.name for file in (out / FOLDER / "step-1").iterdir()} >= {"adapter_config.json", "README.md"}
    assert not list((out / FOLDER).glob("*/tokenizer*")), "once is enough"
    files = [(out / FOLDER / f"step-{step}" / "adapter_model.safetensors").stat().st_size for step in _there(out)]
    tensors = sum(each.nbytes for each in _saved(out / "adapter").values())
    assert len(files) == 3 and all(tensors < each < tensors + 16_384 for each in files), "a header more than the term"
