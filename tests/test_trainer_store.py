"""Layer inputs kept in host memory: the same tensors come back, from buffers as large as planned, exactly."""

from __future__ import annotations

import pytest
import torch

from planner.errors import PlanError
from trainer.host_store import HostStore

DEVICES = [torch.device("cpu"), *([torch.device("cuda", 0)] if torch.cuda.is_available() else [])]


@pytest.mark.parametrize("device", DEVICES, ids=str)
def test_what_is_kept_comes_back_in_reverse_and_step_after_step(device: torch.device) -> None:
    store = HostStore(4, (2, 16, 8), torch.float32, device)
    assert store.pinned_bytes == 4 * 2 * 16 * 8 * 4
    for shape in [(2, 16, 8), (1, 5, 8), (2, 16, 8)]:
        given = [torch.randn(shape, device=device) for _ in range(4)]
        tickets = [store.keep(hidden.clone()) for hidden in given]
        for hidden, ticket in zip(reversed(given), reversed(tickets), strict=True):
            assert torch.equal(store.fetch(ticket), hidden)
    store.close()
    assert store.pinned_bytes == 0


def test_a_kept_tensor_is_let_go_at_the_next_one() -> None:
    store = HostStore(2, (1, 4, 4), torch.float32, torch.device("cpu"))
    first = torch.ones(1, 4, 4)
    store.keep(first)
    first.zero_()  # its memory may serve something else
    ticket = store.keep(torch.full((1, 4, 4), 2.0))
    assert torch.equal(store.fetch(ticket), torch.full((1, 4, 4), 2.0))
    assert torch.equal(store.fetch(ticket - 1), torch.ones(1, 4, 4))


def test_buffers_have_the_size_of_what_they_hold() -> None:
    """Five times 3 × 1,000 × 10 half floats: a power of two nowhere near."""
    store = HostStore(5, (3, 1000, 10), torch.float16, torch.device("cpu"))
    assert store.pinned_bytes == 5 * 60_000
    store.close()


def test_order_and_number_are_held_to() -> None:
    store = HostStore(2, (1, 2, 2), torch.float32, torch.device("cpu"))
    first, second = store.keep(torch.ones(1, 2, 2)), store.keep(torch.ones(1, 2, 2))
    with pytest.raises(AssertionError, match="out of turn"):
        store.fetch(first)
    with pytest.raises(AssertionError, match="more than 2"):
        store.keep(torch.ones(1, 2, 2))
    store.fetch(second)


def test_memory_that_cannot_be_had_is_named() -> None:
    with pytest.raises(PlanError, match=r"131,072\.00 GiB of pinned host memory \(140,737,488,355,328 bytes\)"):
        HostStore(2, (1, 2**25, 2**20), torch.float16, torch.device("cpu"))
