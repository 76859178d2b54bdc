"""The range test of the learning rate: what it finds, that it puts everything back, and that a run goes by it."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from run_folder import lines, record, stopped_and_resumed
from safetensors.torch import load_file
from trainer_tiny import make_plan, save_model, write_sources

from planner.compose import problems
from planner.errors import PlanError
from planner.hardware import load_profile
from planner.model import load_model
from planner.optimizations.base import Situation
from planner.plan import Plan
from planner.planning import Request
from planner.planning import make_plan as planned
from planner.units import format_seconds
from trainer import rate_search, running
from trainer.rate_search import go_by, half_least, picture, smoothed, steepest
from trainer.rates import RateFound, RateSearch
from trainer.run import execute

STEPS = 6
KNOBS = {"rule": "half_least", "steps": 30, "low": 1e-5, "high": 1.0}


def _curve(loss: Any, rates: list[float]) -> list[tuple[float, float, float]]:
    return [(rate, loss(rate), loss(rate)) for rate in rates]


def test_the_rates_are_a_geometric_row() -> None:
    rates = RateSearch(5, 1e-4, 1.0).rates()
    assert rates == pytest.approx([1e-4, 1e-3, 1e-2, 1e-1, 1.0])


@pytest.mark.parametrize("middle", [1e-3, 3e-2])
def test_the_steepest_place_of_a_known_curve(middle: float) -> None:
    """A fall whose slope over the logarithm is greatest in the middle, and a rise to more than before behind it."""

    def loss(rate: float) -> float:
        fall = 1 / (1 + (rate / middle) ** 2)
        return fall + 10 * max(0.0, math.log10(rate / middle) - 1.5)

    rates = RateSearch(121, 1e-6, 1.0).rates()
    found = steepest(_curve(loss, rates))
    assert found is not None and abs(math.log10(found / middle)) <= 0.05


@pytest.mark.parametrize("middle", [1e-3, 3e-2])
def test_half_of_where_a_known_curve_is_least(middle: float) -> None:
    rates = RateSearch(121, 1e-6, 1.0).rates()
    found = half_least(_curve(lambda rate: math.log10(rate / middle) ** 2 - 1, rates))
    assert found == pytest.approx(middle / 2, rel=0.06)
    assert half_least(_curve(lambda rate: math.log10(rate / middle) ** 2, rates)) is None, "it is no less than before"


def test_a_loss_that_still_fell_at_the_last_rate_is_told_of() -> None:
    search = RateSearch(30, 1e-5, 1.0)  # the last of which is not 1 to the last digit
    falling, turning = (
        _curve(loss, search.rates()) for loss in (lambda rate: -rate, lambda rate: abs(rate - 1e-3) - 1)
    )
    assert RateFound(tuple(falling), half_least(falling)).still_fell(search)
    assert not RateFound(tuple(turning), half_least(turning)).still_fell(search)
    assert not RateFound(tuple(falling[:-1]), half_least(falling[:-1])).still_fell(search), "it ended before"
    assert not RateFound(tuple(falling), steepest(falling)).still_fell(RateSearch(30, 1e-5, 1.0, "steepest"))
    assert not RateFound((), None).still_fell(search)


def test_a_loss_that_never_falls_has_no_place() -> None:
    rates = RateSearch(20, 1e-6, 1.0).rates()
    assert half_least(_curve(lambda rate: 2 + rate, rates)) is None
    assert steepest(_curve(lambda rate: 2 + rate, rates)) is None and steepest(_curve(lambda _: 2.0, rates)) is None
    assert steepest(_curve(lambda rate: -rate, rates[:2])) is None, "two steps are no curve"


def test_a_rise_beyond_the_least_does_not_count() -> None:
    losses = [3.0, 2.9, 2.5, 2.4, 9.0, 5.0, 30.0]
    curve = [(10.0**place, loss, loss) for place, loss in enumerate(losses)]
    assert steepest(curve) == 10.0, "from 9 to 5 it falls more, but it has been lower before"


def test_a_smoothed_change_is_the_mean_of_its_neighbours() -> None:
    changes = [0.0, 9.0, 0.0, 0.0, 9.0, 0.0, 0.0, 0.0, 0.0, 9.0, 0.0]
    found = smoothed(changes)
    assert found[0] == 0.0 and found[1] == pytest.approx(3.0) and found[4] == pytest.approx(18 / 9)
    assert smoothed([1.0, 2.0, 3.0, 4.0]) == [1.0, 2.0, 3.0, 4.0], "a straight line stays"


def test_what_a_batch_costs_by_itself_is_no_change(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each batch is set against itself before training, and adapters of the first step have changed nothing yet."""
    kept: list[RateFound] = []
    own = rate_search.search_rate

    def kept_search(*given: Any) -> RateFound:
        kept.append(own(*given))
        return kept[-1]

    monkeypatch.setattr(running, "search_rate", kept_search)
    with tempfile.TemporaryDirectory() as out:
        assert (
            execute(
                _plan(place, Path(out) / "run", {"rate_range_test": KNOBS | {"steps": 12, "low": 1e-9, "high": 1e-8}})
            )
            == 0
        )
    losses = [loss for _, loss, _ in kept[0].curve]
    assert max(losses) - min(losses) > 0.01, "batches differ"
    assert all(abs(change) < 1e-4 for *_, change in kept[0].curve), "and no step changed anything"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rates")
    save_model("llama", folder / "model")
    write_sources(folder / "data")
    return folder


def _plan(place: Path, out: Path, more: dict[str, dict[str, Any]], **given: Any) -> Plan:
    choices = {"lora": {"rank": 4, "alpha": 8}, "exact_attention": {"kernel": "cpu"}} | more
    given = {"steps": STEPS, "lr": 1e-3, "evaluation_rows": 5, "validation": 0.25, "warmup": 0.0} | given
    return make_plan(place / "model", data=str(place / "data"), out=str(out), choices=choices, **given)


def _same(one: Path, other: Path) -> bool:
    mine, theirs = (load_file(out / "adapter" / "adapter_model.safetensors") for out in (one, other))
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


@pytest.mark.parametrize("more", [{}, {"adamw_8bit": {}}, {"lora_plus": {"ratio": 4.0}}], ids=str)
def test_a_run_is_as_if_that_rate_had_been_given(
    place: Path, tmp_path: Path, more: dict[str, dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert execute(_plan(place, run, more | {"rate_range_test": KNOBS})) == 0
    found = record(run)["rate_search"]
    ended = found["curve"][-1][1] > 2 * found["curve"][0][1]
    assert len(found["curve"]) == KNOBS["steps"] or ended, "all rates, or the loss is many times what it was"
    rate = found["rate"]
    assert rate is not None and 1e-5 < rate < 1.0
    assert f"the rate is {rate:.3g}, half of the rate at which the loss is least." in " ".join(
        capsys.readouterr().out.split()
    )
    assert execute(_plan(place, tmp_path / "given", more, lr=rate)) == 0
    assert record(run)["losses"] == record(tmp_path / "given")["losses"] and _same(run, tmp_path / "given")
    first = next(line for line in lines(run) if "taken" in line)
    assert first["lr"] == pytest.approx(rate, rel=1e-12)
    assert f"{rate:g} (by a range test)" in (run / "adapter" / "README.md").read_text()
    assert f"taken: {rate:.3g}" in (run / "rate_search.svg").read_text()


def test_where_the_loss_never_falls_the_plan_s_rate_stays(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    own = rate_search.forward_backward
    losses = iter(range(2, 2000))

    def rising(*given: Any) -> float:
        own(*given)
        return float(next(losses))

    with monkeypatch.context() as patched:
        patched.setattr(rate_search, "forward_backward", rising)
        assert execute(_plan(place, tmp_path / "run", {"rate_range_test": KNOBS})) == 0
    assert execute(_plan(place, tmp_path / "plain", {})) == 0
    assert record(tmp_path / "run")["rate_search"]["rate"] is None and _same(tmp_path / "run", tmp_path / "plain")
    assert "the loss never fell; train.lr 0.001 stays" in " ".join(capsys.readouterr().out.split())


def test_a_loss_that_is_no_number_ends_the_test(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    own, count = rate_search.forward_backward, 0

    def failing(*given: Any) -> float:
        nonlocal count
        count += 1
        loss = own(*given)
        return math.nan if count == 9 else loss

    monkeypatch.setattr(rate_search, "forward_backward", failing)
    assert execute(_plan(place, tmp_path / "run", {"rate_range_test": KNOBS})) == 0
    assert len(record(tmp_path / "run")["rate_search"]["curve"]) == 8
    count = 8
    assert execute(_plan(place, tmp_path / "at-once", {"rate_range_test": KNOBS})) == 0
    assert record(tmp_path / "at-once")["rate_search"] == {"rate": None, "curve": []}
    assert not (tmp_path / "at-once" / "rate_search.svg").exists()
    assert "no step of it had a loss that is a number; train.lr 0.001 stays" in " ".join(
        capsys.readouterr().out.split()
    )


def test_a_run_that_is_stopped_keeps_the_rate(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {"rate_range_test": KNOBS}
    assert execute(_plan(place, tmp_path / "whole", asked)) == 0
    stopped_and_resumed(_plan(place, tmp_path / "run", asked, save_minutes=1e-9), monkeypatch, after=3)
    assert record(tmp_path / "run")["losses"] == record(tmp_path / "whole")["losses"]
    assert record(tmp_path / "run")["rate_search"] == record(tmp_path / "whole")["rate_search"]
    assert _same(tmp_path / "run", tmp_path / "whole")


def test_one_has_the_rate_and_the_plan_has_the_copy(place: Path, tmp_path: Path) -> None:
    plan = planned(Request(tier=3, required=("rate_range_test",), train={"lr": 1e-3}))
    assert plan.memory.host.terms["adapters/before_search"] == 4 * 24 * 32 * 46_080
    assert plan.memory.gpu == planned(Request(tier=3)).memory.gpu
    (told,) = [warning for warning in plan.warnings if "rate_range_test" in warning]
    assert plan.time.step_seconds.estimate is not None
    forward = sum(plan.time.phases[name].seconds or 0.0 for name in ("forward", "attention", "loss"))
    took = format_seconds(100 * (plan.time.step_seconds.estimate + forward))
    assert f"100 steps and as many forward passes before training, about {took}, which no" in told
    situation = Situation(load_profile("rtx3090"), load_model("phi-2"), 2**35)
    assert problems({"lora", "batch_rate", "rate_range_test"}, situation)["batch_rate"] == (
        "setting rate is already claimed by rate_range_test",
    )
    with pytest.raises(PlanError, match=r"goes from a rate of 1 to one of 0\.1"):
        execute(_plan(place, tmp_path / "run", {"rate_range_test": KNOBS | {"low": 1.0, "high": 0.1}}))


def test_the_ratio_between_groups_stays() -> None:
    parameters = [torch.nn.Parameter(torch.zeros(2)) for _ in range(2)]
    optimizer = torch.optim.AdamW([{"params": parameters[:1], "lr": 1e-3}, {"params": parameters[1:], "lr": 8e-3}])
    go_by(RateFound((), None), optimizer)
    assert [group["lr"] for group in optimizer.param_groups] == [1e-3, 8e-3]
    go_by(RateFound((), 2e-3), optimizer)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([2e-3, 16e-3])


def test_the_picture_of_few_and_of_level_losses() -> None:
    level = RateFound(((1e-3, 2.0, 2.0), (2e-3, 2.0, 2.0)), None)
    assert picture(level).count("<polyline") == 1 and "taken" not in picture(level)
