"""Learning rates: schedules against those of torch and transformers, rates of matrices, batches and ranks."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from run_folder import lines, record, stopped_and_resumed
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR
from trainer_tiny import make_plan, save_model, write_sources
from transformers import AutoModelForCausalLM, get_polynomial_decay_schedule_with_warmup, get_wsd_schedule

from planner.cli_check import same_settings
from planner.compose import problems
from planner.errors import PlanError
from planner.optimizations.adapters.lora import RSLORA_ALPHA, alpha_of
from planner.optimizations.base import Situation
from planner.plan import Plan, Train
from planner.planning import Request
from planner.planning import make_plan as planned
from planner.smaller import same_training
from planner.tier_table import tier_table
from trainer.optimizers import OptimizerChoice
from trainer.rates import Rates
from trainer.run import execute
from trainer.session import build

EXACT = 1e-12
STEPS = (2, 7, 50)
SCHEDULES: dict[str, dict[str, float]] = {
    "one_cycle": {"share": 0.3, "rise": 25.0, "fall": 1e4},
    "polynomial_decay": {"power": 2.0, "end": 0.1},
    "warmup_stable_decay": {"decay": 0.4},
}


def _trace(make: Callable[[torch.optim.Optimizer], LRScheduler], steps: int, rate: float) -> list[float]:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1, dtype=torch.float64))], lr=rate)
    schedule, found = make(optimizer), []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"] / rate)
        optimizer.step()
        schedule.step()
    return found


def _ours(kind: str, knobs: dict[str, float], steps: int, warmup: float = 0.0) -> list[float]:
    return [Rates(kind, knobs).factor(Train(warmup=warmup), done, steps) for done in range(steps)]


@pytest.mark.parametrize("share", [0.2, 0.3, 0.75])
@pytest.mark.parametrize("steps", [7, 10, 50])
def test_one_cycle_is_that_of_torch(steps: int, share: float) -> None:
    knobs = {"share": share, "rise": 25.0, "fall": 1e4}
    rate = 3e-4

    def make(optimizer: torch.optim.Optimizer) -> LRScheduler:
        return OneCycleLR(
            optimizer,
            max_lr=rate,
            total_steps=steps,
            pct_start=share,
            div_factor=25.0,
            final_div_factor=1e4,
            cycle_momentum=False,
        )

    assert _ours("one_cycle", knobs, steps, warmup=0.5) == pytest.approx(_trace(make, steps, rate), rel=EXACT)


@pytest.mark.parametrize(("power", "end"), [(1.0, 0.0), (2.0, 0.1), (0.5, 0.3)])
@pytest.mark.parametrize("steps", STEPS)
def test_polynomial_decay_is_that_of_transformers(steps: int, power: float, end: float) -> None:
    rate = 1e-3

    def make(optimizer: torch.optim.Optimizer) -> LRScheduler:
        return get_polynomial_decay_schedule_with_warmup(optimizer, 0, steps, lr_end=end * rate, power=power)

    ours = _ours("polynomial_decay", {"power": power, "end": end}, steps)
    assert ours == pytest.approx(_trace(make, steps, rate), rel=1e-9), "their end is a difference of floats"
    if end == 0.0:
        assert ours == pytest.approx(_trace(make, steps, rate), rel=EXACT)


@pytest.mark.parametrize("decay", [0.0, 0.2, 1.0])
@pytest.mark.parametrize("steps", STEPS)
def test_warm_up_and_decay_are_those_of_transformers(steps: int, decay: float) -> None:
    falling = math.ceil(decay * steps)

    def make(optimizer: torch.optim.Optimizer) -> LRScheduler:
        return get_wsd_schedule(
            optimizer, 0, num_decay_steps=falling, num_training_steps=steps, decay_type="linear", min_lr_ratio=0.0
        )

    ours = _ours("warmup_stable_decay", {"decay": decay}, steps)
    assert ours == pytest.approx(_trace(make, steps, 1e-3), rel=EXACT)


@pytest.mark.parametrize("kind", ["polynomial_decay", "warmup_stable_decay"])
def test_warming_up_comes_first(kind: str) -> None:
    found = _ours(kind, SCHEDULES[kind], 20, warmup=0.2)
    assert found[:4] == [0.25, 0.5, 0.75, 1.0] and found[4] == 1.0 and found[-1] < 0.4


BOUNDS: list[tuple[str, dict[str, float]]] = [
    *(
        ("one_cycle", {"share": share, "rise": 25.0, "fall": fall})
        for share in (0.01, 0.5, 0.99)
        for fall in (1.0, 1e9)
    ),
    *(("polynomial_decay", {"power": power, "end": end}) for power in (0.1, 20.0) for end in (0.0, 1.0)),
    *(("warmup_stable_decay", {"decay": decay}) for decay in (0.0, 0.5, 1.0)),
    ("", {}),
]


@pytest.mark.parametrize("steps", [1, 2, 3, 10])
@pytest.mark.parametrize("warmup", [0.0, 0.5, 0.99])
@pytest.mark.parametrize(("kind", "knobs"), BOUNDS, ids=str)
def test_every_step_has_a_rate_at_the_bounds_of_the_knobs_too(
    kind: str, knobs: dict[str, float], warmup: float, steps: int
) -> None:
    """And there is one after the last step, which torch asks for; some step has the highest rate, and none has more."""
    rates = [Rates(kind, knobs).factor(Train(warmup=warmup), done, steps) for done in range(steps + 1)]
    assert all(0 <= rate <= 1 + 1e-12 for rate in rates)
    assert max(rates[:-1]) > 0.3, "a run trains"
    if kind == "one_cycle" and knobs["share"] * steps < 1:
        assert rates[0] == 1.0


def test_a_fall_that_begins_while_it_warms_up_takes_the_lower_rate() -> None:
    found = _ours("warmup_stable_decay", {"decay": 0.8}, 10, warmup=0.5)
    assert found == pytest.approx([0.2, 0.4, 0.6, 0.8, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125], rel=EXACT)


@pytest.mark.parametrize("decay", [0.0, 1.0])
def test_a_run_ends_whatever_share_of_it_falls(place: Path, tmp_path: Path, decay: float) -> None:
    assert execute(_plan(place, tmp_path / "run", {"warmup_stable_decay": {"decay": decay}}, steps=2)) == 0
    assert (tmp_path / "run" / "adapter").is_dir()


def test_the_model_card_tells_the_rates_that_were_used(place: Path, tmp_path: Path) -> None:
    more: dict[str, dict[str, Any]] = {"batch_rate": {"rows": 1}, "lora_plus": {"ratio": 16.0}}
    assert execute(_plan(place, tmp_path / "run", more, steps=1, accumulation=4, schedule="constant", warmup=0.0)) == 0
    card = (tmp_path / "run" / "adapter" / "README.md").read_text(encoding="utf-8")
    assert "| learning rate | 0.02, 0.32 for second matrices, constant" in card


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rates")
    save_model("llama", folder / "model")
    write_sources(folder / "data")
    return folder


def _plan(place: Path, out: Path, more: dict[str, dict[str, Any]], alpha: int = 8, **given: Any) -> Plan:
    choices: dict[str, dict[str, Any]] = {"lora": {"rank": 4, "alpha": alpha}, "exact_attention": {"kernel": "cpu"}}
    given = {"steps": 8, "lr": 1e-2, "validation": 0.0, "warmup": 0.25} | given
    return make_plan(place / "model", data=str(place / "data"), out=str(out), choices=choices | more, **given)


@pytest.mark.parametrize("kind", [*SCHEDULES, ""])
def test_a_run_goes_by_its_schedule(place: Path, tmp_path: Path, kind: str) -> None:
    knobs = SCHEDULES.get(kind, {})
    plan = _plan(place, tmp_path / "run", {kind: knobs} if kind else {}, accumulation=2)
    assert execute(plan) == 0
    logged = [line["lr"] / 1e-2 for line in lines(tmp_path / "run") if "step" in line]
    assert logged == pytest.approx([Rates(kind, knobs).factor(plan.train, done, 8) for done in range(8)], rel=EXACT)
    others = [_ours(other, SCHEDULES.get(other, {}), 8, warmup=0.25) for other in {*SCHEDULES, ""} - {kind}]
    assert all(logged != pytest.approx(other, rel=1e-3) for other in others)
    card = (tmp_path / "run" / "adapter" / "README.md").read_text(encoding="utf-8")
    assert f"| learning rate | 0.01, {kind or 'cosine'}" in card and ("warm-up" in card) is (kind != "one_cycle")


def test_two_schedules_are_refused_with_both_named() -> None:
    situation: Situation = _situation()
    for one in SCHEDULES:
        for other in {*SCHEDULES} - {one}:
            found = problems({"lora", one, other}, situation)
            assert any("setting schedule is already claimed by" in reason for reason in found[one])
    with pytest.raises(PlanError, match="--with one_cycle --with polynomial_decay: both claim setting schedule"):
        planned(Request(tier=1, required=("one_cycle", "polynomial_decay")))


def _situation() -> Situation:
    from planner.hardware import load_profile
    from planner.model import load_model

    return Situation(load_profile("rtx3090"), load_model("phi-2"), 2**35)


def test_a_setting_that_a_schedule_does_not_go_by_is_told() -> None:
    train = {"schedule": "linear", "warmup": 0.2}

    def told(*names: str) -> list[str]:
        warnings = planned(Request(tier=1, required=names, train=train)).warnings
        return [line for line in warnings if "has no effect" in line]

    assert [line.partition(" has")[0] for line in told("one_cycle")] == [
        "--set train.schedule=linear",
        "--set train.warmup=0.2",
    ]
    assert told("polynomial_decay") == [
        "--set train.schedule=linear has no effect: polynomial_decay schedules the learning rate."
    ]
    assert not told()


def test_a_rate_changes_neither_memory_nor_what_else_is_chosen() -> None:
    plain = planned(Request(tier=3))
    for name in (*SCHEDULES, "lora_plus", "rslora", "batch_rate"):
        plan = planned(Request(tier=3, required=(name,)))
        assert plan.memory == plain.memory and plan.time.step_seconds == plain.time.step_seconds
        assert {choice.id for choice in plan.choices} == {choice.id for choice in plain.choices} | {name}
        off = next(each for each in plain.rejected if each.id == name)
        assert off.reasons[0].startswith(f"on only where it is asked for, by --with {name}")
        assert name in same_training(plan).required, "a smaller plan of the same training keeps it"
        again = planned(same_settings(plan, plan.gpu.id))
        assert [(each.id, each.knobs) for each in again.choices] == [(each.id, each.knobs) for each in plan.choices]


def _adapted(place: Path, double: bool = True) -> PeftModel:
    model = build(_plan(place, place / "none", {})).model
    if double:
        model.double()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model


def _gradients(model: PeftModel, step: int) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter.dtype)


def _by_hand(values: list[Tensor], gradients: list[list[Tensor]], rate: float, decay: float) -> list[Tensor]:
    """AdamW as its paper has it, with torch's usual numbers."""
    first, second = ([torch.zeros_like(value) for value in values] for _ in range(2))
    values = [value.clone() for value in values]
    for step, each in enumerate(gradients, 1):
        for number, gradient in enumerate(each):
            values[number] *= 1 - rate * decay
            first[number] = 0.9 * first[number] + 0.1 * gradient
            second[number] = 0.999 * second[number] + 0.001 * gradient**2
            size = (second[number] / (1 - 0.999**step)).sqrt() + 1e-8
            values[number] -= rate * first[number] / (1 - 0.9**step) / size
    return values


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_the_second_matrix_learns_so_many_times_as_fast(place: Path, decay: float) -> None:
    model, ratio = _adapted(place), 16.0
    train = Train(lr=1e-3, weight_decay=decay)
    optimizer = OptimizerChoice(ratio=ratio).optimizer(model, train)
    assert [group["lr"] for group in optimizer.param_groups] == [1e-3, 1.6e-2]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [decay, decay]
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    before = [dict(model.named_parameters())[name].detach().clone() for name in names]
    gradients: list[list[Tensor]] = []
    for step in range(3):
        _gradients(model, step)
        gradients.append([dict(model.named_parameters())[name].grad.clone() for name in names])  # type: ignore[union-attr]
        optimizer.step()
    for number, name in enumerate(names):
        rate = 1e-3 * (ratio if "lora_B" in name else 1.0)
        (wanted,) = _by_hand([before[number]], [[each[number]] for each in gradients], rate, decay)
        torch.testing.assert_close(dict(model.named_parameters())[name].detach(), wanted, rtol=EXACT, atol=EXACT)


def test_a_ratio_of_one_is_plain_adamw_to_the_bit(place: Path) -> None:
    found = []
    for ratio in (None, 1.0):
        model = _adapted(place)
        optimizer = OptimizerChoice(ratio=ratio).optimizer(model, Train(lr=1e-3, weight_decay=0.1))
        for step in range(3):
            _gradients(model, step)
            optimizer.step()
        found.append([parameter.detach().clone() for parameter in model.parameters() if parameter.requires_grad])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_eight_bit_moments_take_two_rates_as_well(place: Path) -> None:
    optimizer = OptimizerChoice("adamw_8bit", ratio=4.0).optimizer(_adapted(place, double=False), Train(lr=1e-3))
    assert type(optimizer).__name__ == "AdamW8bit"
    assert [group["lr"] for group in optimizer.param_groups] == [1e-3, 4e-3]


def test_a_run_with_two_rates_and_a_schedule_goes_on_where_it_was_stopped(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one_cycle = {"one_cycle": SCHEDULES["one_cycle"]}
    more = {"lora_plus": {"ratio": 16.0}} | one_cycle
    assert execute(_plan(place, tmp_path / "plain", one_cycle)) == 0
    assert execute(_plan(place, tmp_path / "whole", more)) == 0
    stopped_and_resumed(_plan(place, tmp_path / "run", more, save_minutes=1e-9), monkeypatch, after=3)
    plain, whole, resumed = (record(tmp_path / name)["losses"] for name in ("plain", "whole", "run"))
    assert resumed == whole and whole[0] == plain[0] and whole[2:] != plain[2:]


@pytest.mark.parametrize(("rows", "factor"), [(1, 2.0), (4, 1.0), (16, 0.5)])
def test_four_times_the_rows_have_twice_the_rate(place: Path, tmp_path: Path, rows: int, factor: float) -> None:
    plan = _plan(place, tmp_path / "run", {"batch_rate": {"rows": rows}}, batch=2, accumulation=2, schedule="constant")
    assert build(plan).optimizer.param_groups[0]["lr"] == pytest.approx(factor * 1e-2, rel=EXACT)
    assert OptimizerChoice(rows=None).rate(plan.train) == 1e-2


def _scales(model: PeftModel) -> set[float]:
    return {module.scaling["default"] for module in model.modules() if isinstance(module, LoraLayer)}


def test_adapters_are_scaled_by_the_root_of_their_rank(place: Path, tmp_path: Path) -> None:
    plans = [_plan(place, tmp_path / name, more, alpha=0) for name, more in (("plain", {}), ("root", {"rslora": {}}))]
    plain, root = (build(plan).model for plan in plans)
    assert _scales(plain) == {2.0} and _scales(root) == {RSLORA_ALPHA / 2.0}
    assert alpha_of(0, 8, by_root=True) / 8**0.5 == pytest.approx(alpha_of(0, 8, by_root=False) / 8, rel=0.07)
    knobs = planned(Request(tier=1, required=("rslora",))).knobs("lora")
    assert knobs["alpha"] == RSLORA_ALPHA and planned(Request(tier=1)).knobs("lora")["alpha"] == 2 * knobs["rank"]


def test_a_saved_adapter_is_scaled_so_by_whoever_loads_it(place: Path, tmp_path: Path) -> None:
    assert execute(_plan(place, tmp_path / "run", {"rslora": {}}, alpha=3, merge=True)) == 0
    base = AutoModelForCausalLM.from_pretrained(place / "model", dtype=torch.float64)
    weights = {name: value.clone() for name, value in base.state_dict().items()}
    loaded = PeftModel.from_pretrained(base, str(tmp_path / "run" / "adapter"))
    assert loaded.peft_config["default"].use_rslora and _scales(loaded) == {1.5}
    name, layer = next((name, each) for name, each in loaded.named_modules() if name.endswith("q_proj"))
    change = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    assert change.abs().max() > 0
    merged = loaded.double().merge_and_unload().state_dict()
    key = name.removeprefix("base_model.model.") + ".weight"
    torch.testing.assert_close(merged[key] - weights[key], 1.5 * change.double(), rtol=1e-9, atol=1e-12)
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "merged", dtype=torch.float64).state_dict()
    # Written in the base's own type: the whole change, to its last bit but one.
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "merged", dtype="auto").state_dict()[key].dtype
    step = torch.finfo(written).eps
    torch.testing.assert_close(ours[key], merged[key], rtol=step, atol=0)
    for wrong in (0.0, 0.75, 1.0, 2.0):  # none, over the rank, alpha of the rank, the usual
        assert not torch.allclose(ours[key], weights[key] + wrong * change.double(), rtol=step, atol=0)


def test_tiers_tell_the_alpha_that_plans_have() -> None:
    found = {row.tier: row.knobs for row in tier_table(Request(required=("rslora",))).tiers}
    for tier in (1, 5):
        assert found[tier]["lora"]["alpha"] == planned(Request(tier=tier, required=("rslora",))).knobs("lora")["alpha"]
