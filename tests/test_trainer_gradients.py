"""What is done to gradients before the optimiser is what its definition says, in its order, and runs do it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from run_folder import lines, record, stopped_and_resumed
from torch import Tensor, nn
from trainer_tiny import make_plan, save_model, write_sources

from planner.plan import Plan
from planner.planning import Request
from planner.planning import make_plan as planned
from trainer import gradients
from trainer.gradients import Noise, Shaping
from trainer.run import execute
from trainer.session import build
from trainer.step import update

EXACT = 1e-13
SLICES: dict[str, dict[str, Any]] = {
    "gradient_noise": {"kind": "relative", "variance": 1.0, "decay": 0.55},
    "gradient_centralization": {},
    "adaptive_clipping": {"ratio": 0.01, "floor": 1e-3},
}


def _trained(*shapes: tuple[int, ...]) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    made = [nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64)) for shape in shapes]
    for each in made:
        each.grad = torch.randn(each.shape, generator=generator, dtype=torch.float64)
    return made


def _copies(trained: list[nn.Parameter]) -> list[Tensor]:
    return [each.grad.clone() for each in trained if each.grad is not None]


def test_without_any_of_it_the_norm_is_clipped() -> None:
    ours, theirs = _trained((3, 40), (50, 3)), _trained((3, 40), (50, 3))
    norm = Shaping().shape(ours, ours[:1], 0, 1.5)
    assert norm == float(torch.nn.utils.clip_grad_norm_(theirs, 1.5))
    assert all(torch.equal(one, other) for one, other in zip(_copies(ours), _copies(theirs), strict=True))


@pytest.mark.parametrize(("variance", "decay"), [(0.01, 0.55), (4.0, 1.0), (1.0, 0.0)])
def test_noise_has_the_variance_of_its_step(variance: float, decay: float) -> None:
    for done in (0, 1, 100):
        trained = _trained((400, 500))
        before = _copies(trained)
        Shaping(noise=Noise(variance, decay)).shape(trained, [], done, 1e9)
        noise = trained[0].grad - before[0]  # type: ignore[operator]
        assert float(noise.var()) == pytest.approx(variance / (1 + done) ** decay, rel=0.02)
        assert abs(float(noise.mean())) < 4 * (variance / (1 + done) ** decay / noise.numel()) ** 0.5


def test_relative_noise_is_a_share_of_each_matrix_own_gradient() -> None:
    for done in (0, 100):
        trained = _trained((400, 500), (500, 400), (300, 200))
        for parameter, size in zip(trained, (1e-5, 3.0, 0.0), strict=True):
            parameter.grad.mul_(size)  # type: ignore[union-attr]
        before = _copies(trained)
        Shaping(noise=Noise(0.25, 0.55, relative=True)).shape(trained, [], done, 1e9)
        for gradient, was, size in zip(_copies(trained), before, (1e-5, 3.0, 0.0), strict=True):
            assert float((gradient - was).square().mean()) == pytest.approx(
                float(was.square().mean()) * 0.25 / (1 + done) ** 0.55, rel=0.02
            )
            assert size or torch.equal(gradient, was), "a matrix that has no gradient yet gets no noise"


def test_noise_follows_from_seed_and_step_and_is_made_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {}
    for seed, done in ((0, 0), (0, 1), (1, 0), (0, 0)):
        trained = _trained((30, 41), (17, 3))
        Shaping(noise=Noise(1.0, 0.55), seed=seed).shape(trained, [], done, 1e9)
        found.setdefault((seed, done), []).append(_copies(trained))
    first, again = found[0, 0]
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
    assert not torch.equal(first[0], found[0, 1][0][0]) and not torch.equal(first[0], found[1, 0][0][0])
    sizes: list[int] = []
    own = torch.randn

    def noted(size: Any, **given: Any) -> Tensor:
        sizes.append(size.numel())
        return own(size, **given)

    monkeypatch.setattr(gradients, "NOISE_PIECE", 100)
    monkeypatch.setattr(torch, "randn", noted)
    trained = [nn.Parameter(torch.zeros(30, 41))]
    trained[0].grad = torch.zeros(30, 41)
    Shaping(noise=Noise(1.0, 0.55)).shape(trained, [], 0, 1e9)
    assert max(sizes) == 100 and sum(sizes) == 30 * 41


def test_rows_of_first_matrices_sum_to_zero_and_second_ones_stay() -> None:
    trained = _trained((4, 40), (50, 4), (1, 30), (20, 1))
    before = _copies(trained)
    Shaping(centralized=True).shape(trained, [trained[0], trained[2]], 0, 1e9)
    for number, (each, was) in enumerate(zip(_copies(trained), before, strict=True)):
        wanted = was - was.mean(1, keepdim=True) if number in (0, 2) else was
        torch.testing.assert_close(each, wanted, rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize(("ratio", "floor"), [(0.01, 1e-3), (1.0, 1e-3), (0.1, 5.0), (1e3 / 10, 1e-9)])
def test_rows_are_clipped_by_their_own_size(ratio: float, floor: float) -> None:
    trained = _trained((6, 40), (50, 6))
    with torch.no_grad():
        trained[1][:25] = 0  # as second matrices begin
    before = _copies(trained)
    norm = Shaping(by_rows=(ratio, floor)).shape(trained, trained[:1], 0, 1e-9)
    assert norm == pytest.approx(float(torch.cat([each.flatten() for each in before]).norm()), rel=1e-12)
    for parameter, was in zip(trained, before, strict=True):
        assert parameter.grad is not None
        for row, gradient, old in zip(parameter.detach(), parameter.grad, was, strict=True):
            allowed = ratio * max(float(row.norm()), floor)
            wanted = old * min(1.0, allowed / float(old.norm()))
            torch.testing.assert_close(gradient, wanted, rtol=1e-12, atol=1e-15)
            assert float(gradient.norm()) > 0, "what begins at zero moves"


def test_noise_comes_first_then_means_then_clipping(monkeypatch: pytest.MonkeyPatch) -> None:
    trained = _trained((6, 40), (50, 6))
    shaping = Shaping(noise=Noise(1.0, 0.55), centralized=True)
    norm = shaping.shape(trained, trained[:1], 0, 2.0)
    by_hand = _trained((6, 40), (50, 6))
    Shaping(noise=Noise(1.0, 0.55)).shape(by_hand, [], 0, 1e9)
    Shaping(centralized=True).shape(by_hand, by_hand[:1], 0, 1e9)
    assert norm == Shaping().shape(by_hand, [], 0, 2.0)
    assert all(torch.equal(one, other) for one, other in zip(_copies(trained), _copies(by_hand), strict=True))
    assert float(torch.cat([each.flatten() for each in _copies(trained)]).norm()) == pytest.approx(2.0)


def test_an_overflow_under_a_loss_scale_is_skipped_whatever_is_done_to_gradients() -> None:
    (parameter,) = _trained((6, 40))
    before, optimizer = parameter.detach().clone(), torch.optim.SGD([parameter], lr=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(torch.zeros(()))
    assert parameter.grad is not None
    parameter.grad[0, 0] = float("inf")
    shaping = Shaping(noise=Noise(1.0, 0.55), centralized=True, by_rows=(0.01, 1e-3))
    assert not update(optimizer, scaler, lambda: shaping.shape([parameter], [parameter], 0, 1.0)).taken
    assert torch.equal(parameter, before)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gradients")
    save_model("llama", folder / "model")
    write_sources(folder / "data")
    return folder


def _plan(place: Path, out: Path, more: dict[str, dict[str, Any]], **given: Any) -> Plan:
    choices: dict[str, dict[str, Any]] = {"lora": {"rank": 4, "alpha": 8}, "exact_attention": {"kernel": "cpu"}}
    given = {"steps": 6, "lr": 1e-2, "validation": 0.0} | given
    return make_plan(place / "model", data=str(place / "data"), out=str(out), choices=choices | more, **given)


def test_first_matrices_are_half_of_what_is_trained(place: Path) -> None:
    built = build(_plan(place, place / "none", {}))
    assert 2 * len(built.first_matrices) == len(built.trained)
    assert all(each.shape[0] == 4 for each in built.first_matrices)


@pytest.mark.parametrize("name", SLICES)
def test_a_run_does_it_and_goes_on_with_it(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    more = {name: SLICES[name]}
    assert execute(_plan(place, tmp_path / "plain", {})) == 0
    assert execute(_plan(place, tmp_path / "whole", more)) == 0
    stopped_and_resumed(_plan(place, tmp_path / "run", more, save_minutes=1e-9), monkeypatch, after=3)
    plain, whole, resumed = (record(tmp_path / each)["losses"] for each in ("plain", "whole", "run"))
    assert resumed == whole and whole[0] == plain[0] and whole[1:] != plain[1:]
    norms = [line["gradient_norm"] for line in lines(tmp_path / "whole") if "step" in line]
    assert all(norm > 0 for norm in norms)


def test_it_takes_no_memory_and_is_on_only_where_it_is_asked_for() -> None:
    plain = planned(Request(tier=3))
    for name in SLICES:
        plan = planned(Request(tier=3, required=(name,)))
        assert plan.memory == plain.memory
        assert {choice.id for choice in plan.choices} == {choice.id for choice in plain.choices} | {name}
    asked = Request(tier=1, required=("adaptive_clipping",), train={"max_grad_norm": 0.3})
    told = "--set train.max_grad_norm=0.3 has no effect: adaptive_clipping clips the gradients."
    assert told in planned(asked).warnings
