"""Loss spikes: which loss is one, what goes back, and that a run is then what it were without the batches left out."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from run_folder import lines, record, stopped_and_resumed
from safetensors.torch import load_file
from torch import Tensor
from trainer_tiny import make_plan, save_model, write_sources

from planner.errors import PlanError
from planner.plan import Plan
from planner.planning import Request
from planner.planning import make_plan as planned
from trainer import training
from trainer.run import execute
from trainer.session import build
from trainer.spikes import Spikes
from trainer.step import Update

STEPS = 24
KNOBS = {"sigmas": 6.0, "window": 8, "every": 5, "most": 3}


def _spikes(**knobs: Any) -> Spikes:
    return Spikes(**{**KNOBS, "window": 100, **knobs})


def _known(spikes: Spikes, losses: list[float]) -> Spikes:
    spikes.losses = list(enumerate(losses, start=1))[-spikes.window :]
    return spikes


def test_a_thousand_steady_steps_hold_none_and_one_that_is_put_in_is_found() -> None:
    source, spikes = random.Random(0), _spikes()
    for step in range(1, 1001):
        loss = source.gauss(2.0, 0.1)
        assert not spikes.is_spike(loss), f"step {step}: {loss}"
        assert step < 50 or spikes.is_spike(2.0 + 10 * 0.1), f"step {step}"
        spikes.losses = [*spikes.losses, (step, loss)][-spikes.window :]


def test_a_falling_loss_holds_none_and_few_losses_say_nothing() -> None:
    spikes = _spikes(window=20)
    for step in range(1, 300):
        loss = 8 * math.exp(-step / 80)
        assert not spikes.is_spike(loss)
        spikes.losses = [*spikes.losses, (step, loss)][-20:]
    assert not _known(_spikes(), [1.0] * 9).is_spike(50.0) and _known(_spikes(), [1.0] * 10).is_spike(50.0)
    steady = _known(_spikes(), [2.0] * 50)
    assert not steady.is_spike(2.1) and steady.is_spike(2.13), "losses that hardly differ: 6 times 1 % of them"
    assert not _spikes().is_spike(math.nan) and _known(_spikes(), [1.0]).is_spike(math.nan)
    assert _known(_spikes(window=4), [1.0, 2.0, 3.0, 2.0]).is_spike(9.0), "a window of fewer than ten is enough"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("spikes")
    save_model("llama", folder / "model")
    write_sources(folder / "data")
    return folder


def _plan(place: Path, out: Path, more: dict[str, dict[str, Any]], **given: Any) -> Plan:
    choices = {"lora": {"rank": 4, "alpha": 8}, "exact_attention": {"kernel": "cpu"}} | more
    given = {"steps": STEPS, "lr": 1e-3, "evaluation_rows": 5, "validation": 0.25, "schedule": "cosine"} | given
    return make_plan(place / "model", data=str(place / "data"), out=str(out), choices=choices, **given)


def _saved(out: Path) -> dict[str, Tensor]:
    return load_file(out / "adapter" / "adapter_model.safetensors")


def _same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def _spiking(monkeypatch: pytest.MonkeyPatch, at: dict[int, float]) -> None:
    """Let the loss of these steps be that many times as large, or no number, and spoil their gradients."""
    own, count = training.forward_backward, 0

    def spoiled(built: Any, parts: Any, recorder: Any, saver: Any = None, saved: Any = None) -> float:
        nonlocal count
        loss = own(built, parts, recorder, saver, saved)
        count += 1
        if count not in at:
            return loss
        for parameter in built.trained:
            parameter.grad.fill_(1e3)
        return loss * at[count]

    monkeypatch.setattr(training, "forward_backward", spoiled)


def _leaving_out(monkeypatch: pytest.MonkeyPatch, steps: range) -> None:
    """Let these steps change nothing but the learning rate."""
    own, count = training.update, 0

    def update(optimizer: Any, scaler: Any, shape: Callable[[], float]) -> Update:
        nonlocal count
        count += 1
        if count in steps:
            optimizer.zero_grad(set_to_none=False)
            return Update(1.0, taken=True)  # so that the schedule goes on
        return own(optimizer, scaler, shape)

    monkeypatch.setattr(training, "update", update)


MORE: dict[str, dict[str, dict[str, Any]]] = {
    "plain": {},
    "eight bits": {"adamw_8bit": {}},
    "lookahead": {"lookahead": {"every": 3, "share": 0.5, "place": "gpu"}},
}


@pytest.mark.parametrize("kind", ["plain", "eight bits"])
@pytest.mark.parametrize("by", [30.0, math.nan])
def test_what_comes_after_is_as_if_those_batches_had_not_been(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, by: float
) -> None:
    """A spike at step 14: the copy is of step 10, so steps 11 to 14 are left out."""
    with monkeypatch.context() as patched:
        _leaving_out(patched, range(11, 15))
        assert execute(_plan(place, tmp_path / "left-out", MORE[kind])) == 0
    with monkeypatch.context() as patched:
        _spiking(patched, {14: by})
        assert execute(_plan(place, tmp_path / "run", MORE[kind] | {"spike_rewind": KNOBS})) == 0
    run, other = record(tmp_path / "run"), record(tmp_path / "left-out")
    assert [(each["step"], each["to"]) for each in run["spikes"]] == [(14, 10)] and run["skipped_steps"] == 0
    assert run["losses"][:10] == other["losses"][:10] and run["losses"][14:] == other["losses"][14:]
    assert _same(_saved(tmp_path / "run"), _saved(tmp_path / "left-out"))
    (told,) = [line for line in lines(tmp_path / "run") if "went_back_to" in line]
    assert (told["step"], told["went_back_to"], told["gradient_norm"]) == (14, 10, None)
    written = (tmp_path / "run" / "metrics.jsonl").read_text() + (tmp_path / "run" / "measurement.json").read_text()
    assert "NaN" not in written and (told["loss"] is None) is math.isnan(by), "JSON has no word for it"
    rates = [line["lr"] for line in lines(tmp_path / "run") if "lr" in line]
    assert rates == [line["lr"] for line in lines(tmp_path / "left-out") if "lr" in line]


def test_without_a_spike_nothing_changes(place: Path, tmp_path: Path) -> None:
    assert execute(_plan(place, tmp_path / "plain", {})) == 0
    assert execute(_plan(place, tmp_path / "run", {"spike_rewind": KNOBS | {"every": 1}})) == 0
    assert record(tmp_path / "run")["losses"] == record(tmp_path / "plain")["losses"]
    assert record(tmp_path / "run")["spikes"] == []
    assert _same(_saved(tmp_path / "run"), _saved(tmp_path / "plain"))


def test_too_many_end_the_run_with_a_sentence(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _spiking(monkeypatch, dict.fromkeys(range(14, 18), 30.0))
    with pytest.raises(PlanError, match=r"step 17 is the spike number 4, and 3 are borne.*train\.lr"):
        execute(_plan(place, tmp_path / "run", {"spike_rewind": KNOBS}))
    assert [line["step"] for line in lines(tmp_path / "run") if "went_back_to" in line] == [14, 15, 16]


@pytest.mark.parametrize("kind", MORE)
def test_all_of_the_state_goes_back_bit_for_bit(place: Path, tmp_path: Path, kind: str) -> None:
    built = build(_plan(place, tmp_path / "run", MORE[kind] | {"spike_rewind": KNOBS | {"every": 2}}))
    spikes, generator = built.spikes, torch.Generator().manual_seed(0)
    assert spikes is not None

    def step(number: int) -> None:
        spikes.good(number, 1.0, built)
        for parameter in built.trained:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        built.optimizer.step()
        if built.averages is not None:
            built.averages.update(number, STEPS)

    def state() -> list[Any]:
        found: list[Any] = [parameter.detach().clone() for parameter in built.trained]
        for parameter in built.trained:
            for value in built.optimizer.state[parameter].values():
                found.append(value.clone() if isinstance(value, Tensor) else value)
        averages = built.averages
        if averages is not None:
            found += [each.clone() for each in averages.tensors] + [averages.state()["count"]]
        return found

    for number in range(1, 5):
        step(number)
    before = state()
    step(5)  # its loss shows that what there was after four steps is good
    step(6)
    assert not _equal(before, state())
    assert spikes.back(7, 50.0, built) == 4 and _equal(before, state())
    assert [number for number, _ in spikes.losses] == [1, 2, 3, 4]
    assert all(not parameter.grad.any() for parameter in built.trained if parameter.grad is not None)


def _equal(before: list[Any], after: list[Any]) -> bool:
    pairs = zip(before, after, strict=True)
    return all(torch.equal(one, other) if isinstance(one, Tensor) else one == other for one, other in pairs)


def test_the_plan_has_its_bytes_and_so_has_the_run(place: Path, tmp_path: Path) -> None:
    for kind, more in MORE.items():
        asked = ("spike_rewind", *more)
        rank = {"lora": {"rank": 4}}
        plan = planned(Request(model=str(place / "model"), total_tokens=32, required=asked, knobs=rank))
        built = build(_plan(place, tmp_path / kind, more | {"spike_rewind": KNOBS}))
        spikes = built.spikes
        assert spikes is not None and {choice.id for choice in plan.choices} >= {*asked}
        for parameter in built.trained:
            parameter.grad = torch.ones_like(parameter)
        built.optimizer.step()
        spikes.good(2, 1.0, built)
        held = sum(value.nbytes for value in spikes._copy.values() if isinstance(value, Tensor))
        assert held == plan.memory.host.terms["adapters/rewind"], kind


def test_a_run_that_is_stopped_knows_its_losses(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        _spiking(patched, {19: 30.0})
        assert execute(_plan(place, tmp_path / "whole", {"spike_rewind": KNOBS})) == 0
    with monkeypatch.context() as patched:
        _spiking(patched, {20: 30.0})  # step 13 is taken twice, as it was not stored before the run was stopped
        stopped_and_resumed(
            _plan(place, tmp_path / "run", {"spike_rewind": KNOBS}, save_minutes=1e-9), monkeypatch, after=13
        )
    run, whole = record(tmp_path / "run"), record(tmp_path / "whole")
    assert run["spikes"] == whole["spikes"] and run["spikes"][0]["to"] == 15
    assert run["losses"] == whole["losses"] and _same(_saved(tmp_path / "run"), _saved(tmp_path / "whole"))


def test_a_run_that_goes_on_has_a_copy_at_once(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The copy of step 10 is not stored: stored after step 12, the run goes back to that."""
    with monkeypatch.context() as patched:
        _spiking(patched, {15: 30.0})  # step 13 is taken twice, so that this is step 14
        plan = _plan(place, tmp_path / "run", {"spike_rewind": KNOBS}, save_minutes=1e-9)
        stopped_and_resumed(plan, monkeypatch, after=13)
    assert [(each["step"], each["to"]) for each in record(tmp_path / "run")["spikes"]] == [(14, 12)]


def test_an_optimiser_that_has_not_stepped_is_not_copied(place: Path, tmp_path: Path) -> None:
    """While a loss scale is looked for steps are skipped, and moments come later than the first copy could."""
    built = build(_plan(place, tmp_path / "run", {"adamw_8bit": {}, "spike_rewind": KNOBS | {"every": 1}}))
    spikes = built.spikes
    assert spikes is not None
    for number in range(1, 4):
        spikes.good(number, 1.0, built)
    assert spikes._copied is None and spikes.back(4, 50.0, built) == 3, "that step alone is left out"
    for parameter in built.trained:
        parameter.grad = torch.ones_like(parameter)
    built.optimizer.step()
    spikes.good(5, 1.0, built)
    kept = [parameter.detach().clone() for parameter in built.trained]
    built.optimizer.step()
    assert spikes.back(6, 50.0, built) == 4
    assert all(torch.equal(one, other) for one, other in zip(built.trained, kept, strict=True))
