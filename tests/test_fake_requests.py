"""The requests of a run on tensors that hold no data, and what the allocator's rules make of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from planner.generating import Generation, choose
from planner.optimizations.base import Situation
from planner.plan import Plan
from planner.planning import Request, make_plan, read_gpu, read_model
from planner.units import MIB
from reports.validation.measure import card_file
from trainer.allocator import EMPTY, OutOfMemory, fits, replayed, smallest_limit
from trainer.counting import TensorBytes
from trainer.fake_requests import Requests, reading, requests
from trainer.fake_step import counted

CASES: dict[str, dict[str, Any]] = {
    "whole": {"excluded": ("streamed",), "total_tokens": 4096},
    "streamed": {"required": ("streamed",), "total_tokens": 8192},
    "kept": {"excluded": ("streamed", "gradient_checkpointing"), "required": ("nf4_weights",), "total_tokens": 2048},
}


@pytest.fixture(scope="module", params=CASES)
def made(request: pytest.FixtureRequest) -> tuple[Plan, list[tuple[int, int]]]:
    """A plan for the card of the grid's runs, and all that its run asks for."""
    plan = make_plan(Request("h200-sxm", "random:llama-3.2-1b", **CASES[request.param]))
    return plan, requests(plan)


def test_what_is_asked_for_is_what_is_counted_and_kernels_take(made: tuple[Plan, list[tuple[int, int]]]) -> None:
    """Allocated: the counted step, workspaces, and what rounds up to 512 bytes; within 1 %."""
    plan, events = made
    allocated = replayed(events).most_allocated
    assert allocated == pytest.approx(plan.memory.gpu.peak_bytes.expected, rel=0.01)
    assert allocated >= max(counted(plan, 2).phases.values())


def test_the_bound_suffices_and_less_than_was_allocated_does_not(made: tuple[Plan, list[tuple[int, int]]]) -> None:
    plan, events = made
    free, high = replayed(events), plan.memory.gpu.peak_bytes.high
    assert fits(events, high) and free.most_allocated <= smallest_limit(events) <= high
    with pytest.raises(OutOfMemory):
        replayed(events, free.most_allocated - MIB)


def test_every_name_is_taken_once_and_given_back_once_at_most(made: tuple[Plan, list[tuple[int, int]]]) -> None:
    _, events = made
    taken = [name for name, size in events if size > 0]
    given = [name for name, size in events if size < 0]
    assert len({*taken}) == len(taken) and len({*given}) == len(given) and {*given} <= {*taken}
    assert EMPTY in events[: len(events) // 2]  # after loading, before the first step
    live: set[int] = set()
    for name, size in events:
        if size > 0:
            live.add(name)
        elif size < 0:
            live.remove(name)  # nothing is given back before it was taken
    assert live  # weights, adapters and the optimiser's state stay


def test_nothing_is_left_of_the_stand_ins() -> None:
    assert torch.empty(2).untyped_storage().nbytes() == 8 and type(torch.empty(1)) is torch.Tensor


class _Made(TensorBytes):
    """The bytes of all that was made."""

    made = 0

    def _made(self, size: int) -> int:
        self.made += size
        return super()._made(size)


def test_gradients_are_added_in_place_as_autograd_adds_them() -> None:
    """What is noted besides changes nothing in what is counted."""

    def step(mode: TensorBytes) -> None:
        leaf = torch.ones(4096, requires_grad=True)
        with mode:
            half = leaf * 2
            parts = [half.sin(), half.cos(), half.exp()]
            torch.stack([part.sum() for part in parts]).sum().backward()

    asked, counting = Requests(0, 0), _Made()
    step(asked)
    step(counting)
    assert sum(size for _, size in asked.events if size > 0) == counting.made
    assert asked.peak == counting.peak


@pytest.fixture(scope="module")
def written() -> tuple[Plan, Generation]:
    """What is planned to write after 8,192 tokens, with four-bit weights, on the card of the grid's runs."""
    plan = make_plan(
        Request(str(card_file("h200-8gib")), "random:llama-3.2-1b", total_tokens=1024, required=("nf4_weights",))
    )
    situation = Situation(
        read_gpu(str(card_file("h200-8gib"))), read_model("random:llama-3.2-1b"), plan.memory.host.budget_bytes
    )
    return plan, choose(plan, situation, 8192, 64, "card")


def test_a_prompt_takes_what_is_planned_and_its_bound_suffices(written: tuple[Plan, Generation]) -> None:
    """Allocated within 3 % and never more."""
    plan, found = written
    events = reading(plan, found)
    most = replayed(events).most_allocated
    assert 0.97 * found.expected <= most <= found.expected
    assert found.chunk == 4096 and fits(events, found.high)


def test_keys_and_values_are_taken_before_the_prompt(written: tuple[Plan, Generation]) -> None:
    """All of them one after the other, before anything of its layers, and for good: so no gaps come between them."""
    plan, found = written
    events = reading(plan, found)
    after = events[len(events) - events[::-1].index(EMPTY) :]
    kept = after[1 : 1 + 2 * plan.model.layers]  # the first are the prompt's tokens
    assert sum(size for _, size in kept) == found.card["attention/cache"] and len({size for _, size in kept}) == 1
    names = {name for name, _ in kept}
    assert not any(name in names for name, size in after if size < 0)
