"""Slow adapters follow as the definition says, and they are what a run goes on from, saves and plans for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from run_folder import record, stopped_and_resumed
from safetensors.torch import load_file
from torch import Tensor
from trainer_tiny import make_plan, save_model, write_sources

from planner.compose import problems
from planner.errors import PlanError
from planner.hardware import load_profile
from planner.model import load_model
from planner.optimizations.base import Situation
from planner.plan import Plan
from planner.planning import Request
from planner.planning import make_plan as planned
from trainer.lookahead import Lookahead
from trainer.run import execute

STEPS = 8
EXACT = 1e-13


def _moves(count: int = STEPS) -> list[list[Tensor]]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, 5), (7, 2)]
    return [[torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes] for _ in range(count)]


def _by_hand(start: list[Tensor], moves: list[list[Tensor]], every: int, share: float) -> tuple[list[Tensor], ...]:
    """Slow and fast values after the moves, as the paper's algorithm 1 has them."""
    slow, fast = [value.clone() for value in start], [value.clone() for value in start]
    for step, each in enumerate(moves, start=1):
        fast = [value + move for value, move in zip(fast, each, strict=True)]
        if step % every == 0:
            slow = [old + share * (new - old) for old, new in zip(slow, fast, strict=True)]
            fast = [value.clone() for value in slow]
    return slow, fast


@pytest.mark.parametrize("place", ["gpu", "host"])
@pytest.mark.parametrize(("every", "share"), [(1, 0.5), (3, 0.5), (5, 0.8), (4, 1.0)])
def test_slow_and_fast_are_those_of_the_definition(every: int, share: float, place: str) -> None:
    start, moves = _moves(1)[0], _moves()
    trained = [value.clone() for value in start]
    ahead = Lookahead(trained, every=every, share=share, place=place)
    for step, each in enumerate(moves, start=1):
        for value, move in zip(trained, each, strict=True):
            value.add_(move)
        ahead.update(step, STEPS)
        slow, fast = _by_hand(start, moves[:step], every, share)
        torch.testing.assert_close(ahead.tensors, slow, rtol=EXACT, atol=EXACT)
        torch.testing.assert_close(trained, fast, rtol=EXACT, atol=EXACT)
    rest = [old + share * (new - old) for old, new in zip(slow, fast, strict=True)] if STEPS % every else slow
    ahead.put()
    torch.testing.assert_close(trained, rest, rtol=EXACT, atol=EXACT)
    ahead.put()
    torch.testing.assert_close(trained, rest, rtol=EXACT, atol=EXACT)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lookahead")
    save_model("llama", folder / "model")
    write_sources(folder / "data")
    return folder


def _plan(place: Path, out: Path, knobs: dict[str, Any] | None, **given: Any) -> Plan:
    choices: dict[str, dict[str, Any]] = {"lora": {"rank": 4, "alpha": 8}, "exact_attention": {"kernel": "cpu"}}
    if knobs is not None:
        choices["lookahead"] = {"every": 3, "share": 0.5, "place": "gpu"} | knobs
    given = {"steps": STEPS, "lr": 1e-2, "evaluation_rows": 5, "validation": 0.25} | given
    return make_plan(place / "model", data=str(place / "data"), out=str(out), choices=choices, **given)


def _saved(out: Path) -> dict[str, Tensor]:
    return load_file(out / "adapter" / "adapter_model.safetensors")


def test_a_run_begins_again_from_the_slow_adapters_and_saves_them(place: Path, tmp_path: Path) -> None:
    """After three steps losses are others than without; with the whole way followed they are the same."""
    for name, knobs in (("plain", None), ("half", {}), ("host", {"place": "host"}), ("whole", {"share": 1.0})):
        assert execute(_plan(place, tmp_path / name, knobs)) == 0
    plain, half, host, whole = (record(tmp_path / name)["losses"] for name in ("plain", "half", "host", "whole"))
    assert half[:3] == plain[:3] and half[3:] != plain[3:] and half == host and whole == plain
    one, other = _saved(tmp_path / "plain"), _saved(tmp_path / "whole")
    assert all(torch.equal(one[name], other[name]) for name in one)
    short = _plan(place, tmp_path / "short", {"every": 100})
    assert execute(short) == 0
    assert record(tmp_path / "short")["losses"] == plain
    for name, value in _saved(tmp_path / "short").items():  # half of the way from where it began
        if "lora_B" in name:
            torch.testing.assert_close(value, one[name] / 2)
    terms = [record(tmp_path / name)["measured"]["terms"] for name in ("half", "host", "plain")]
    assert [each.get("averages") for each in terms] == [terms[0]["adapters"], 0, 0]


def test_a_run_goes_on_between_two_times(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert execute(_plan(place, tmp_path / "whole", {})) == 0
    stopped_and_resumed(_plan(place, tmp_path / "run", {}, save_minutes=1e-9), monkeypatch, after=4)
    assert record(tmp_path / "run")["losses"] == record(tmp_path / "whole")["losses"]
    one, other = _saved(tmp_path / "run"), _saved(tmp_path / "whole")
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_it_costs_what_it_copies_and_no_average_is_on_beside_it() -> None:
    plain, asked = (planned(Request(tier=3, required=names)) for names in ((), ("lookahead",)))
    size = 4 * 24 * 32 * 46_080  # rank 24: 46,080 inputs and outputs in each of 32 layers
    assert asked.memory.gpu.peak_bytes.expected - plain.memory.gpu.peak_bytes.expected == size
    host = planned(Request(tier=3, required=("lookahead",), knobs={"lookahead": {"place": "host"}}))
    assert host.memory.host.terms["averages/adapters"] == size
    assert host.memory.gpu.peak_bytes == plain.memory.gpu.peak_bytes
    situation = Situation(load_profile("rtx3090"), load_model("phi-2"), 2**35)
    found = problems({"lora", "lookahead", "weight_averaging"}, situation)
    assert found["lookahead"] == ("averages/adapters is already made by weight_averaging",)
    with pytest.raises(PlanError, match=r"lookahead.*weight_averaging"):
        planned(Request(tier=3, required=("lookahead", "weight_averaging")))
