"""What torch's CUDA allocator would reserve: small cases whose answer follows from its rules."""

from __future__ import annotations

import random

import pytest

from trainer import ALLOCATOR
from trainer.allocator import (
    ADDRESSES,
    EMPTY,
    MIB,
    Allocator,
    OutOfMemory,
    fits,
    replayed,
    rounded_up,
    smallest_limit,
)

PAGE = 16 * MIB


def test_pages_are_added_at_the_end_and_small_and_large_lie_apart() -> None:
    allocator = Allocator()
    allocator.take(1, 20 * MIB)
    assert (allocator.allocated, allocator.reserved) == (20 * MIB, 2 * PAGE)
    allocator.take(2, 12 * MIB)  # fills the second page
    assert (allocator.address(2), allocator.reserved) == ((True, 20 * MIB), 2 * PAGE)
    allocator.take(3, 100)
    assert allocator.address(3) == (False, 0) and allocator.reserved == 2 * PAGE + 2 * MIB
    assert allocator.allocated == 32 * MIB + 512


def test_the_smallest_block_that_fits_and_of_these_the_first() -> None:
    events = [(name, size * MIB) for name, size in enumerate([8, 2, 6, 2, 6, 8], 1)]
    allocator = replayed([*events, (1, -1), (3, -1), (5, -1)])
    allocator.take(9, 5 * MIB)
    assert allocator.address(9) == (True, 10 * MIB)
    allocator.take(10, 7 * MIB)
    assert allocator.address(10) == (True, 0)


def test_a_block_that_can_grow_counts_as_large_as_it_can_grow() -> None:
    events = [(1, 10 * MIB), (2, 4 * MIB), (3, 13 * MIB), (1, -1)]
    allocator = replayed(events)  # 10 MiB free at the front, 5 at the end, with addresses without pages behind
    allocator.take(4, 4 * MIB)
    assert allocator.address(4) == (True, 0)


def test_free_neighbours_are_one_block() -> None:
    allocator = replayed([(1, 4 * MIB), (2, 4 * MIB), (3, 4 * MIB), (4, 4 * MIB), (1, -1), (3, -1), (2, -1)])
    allocator.take(5, 12 * MIB)
    assert allocator.address(5) == (True, 0) and allocator.reserved == PAGE


def test_whole_pages_alone_are_given_back_and_come_again_where_they_were() -> None:
    events = [(1, 4 * MIB), (2, 40 * MIB), (3, 4 * MIB), (2, -1)]
    allocator = replayed([*events, EMPTY])
    assert allocator.reserved == 2 * PAGE  # 12 of 40 MiB lie beside the first tensor, 12 beside the last
    allocator.take(4, 30 * MIB)
    assert allocator.address(4) == (True, 4 * MIB) and allocator.reserved == 3 * PAGE


def test_at_the_limit_pages_are_given_back_and_asked_for_again() -> None:
    events = [(1, 64 * MIB), (1, -1), (2, MIB // 2), (3, 80 * MIB)]
    allocator = replayed(events, 82 * MIB)
    assert (allocator.retries, allocator.most_reserved) == (1, 82 * MIB)
    with pytest.raises(OutOfMemory):
        replayed(events, 80 * MIB)


def test_gaps_between_long_lived_tensors_are_what_the_limit_has_to_hold() -> None:
    """Of each short-lived tensor a gap of 4 MiB is left that no page lies within; beside each other they leave none."""
    apart = [event for i in range(1, 9) for event in ((2 * i, 4 * MIB), (2 * i + 1, 12 * MIB))]
    gone = [(2 * i, -1) for i in range(1, 9)]
    last = [(99, 32 * MIB)]
    together = sorted(apart, key=lambda event: event[1])
    assert replayed([*apart, *gone]).allocated == replayed([*together, *gone]).allocated == 96 * MIB
    assert smallest_limit([*apart, *gone, *last]) == (128 + 32) * MIB
    assert smallest_limit([*together, *gone, *last]) == 128 * MIB


def test_a_request_below_ten_mib_asks_the_limit_for_a_page() -> None:
    assert not fits([(1, 2 * MIB)], PAGE - 1) and fits([(1, 2 * MIB)], PAGE)
    assert fits([(1, 12 * MIB)], 12 * MIB)  # and one above for its own size, though a page is added


@pytest.mark.parametrize("seed", range(5))
def test_blocks_cover_all_addresses_once(seed: int) -> None:
    chance, live = random.Random(seed), dict[int, int]()
    allocator = Allocator(600 * MIB)
    for name in range(1, 3000):
        if live and chance.random() < 0.5:
            gone = chance.choice([*live])
            allocator.give(gone)
            del live[gone]
        elif chance.random() < 0.01:
            allocator.empty_cache()
        else:
            size = int(2 ** chance.uniform(8, 26))
            try:
                allocator.take(name, size)
            except OutOfMemory:
                continue
            live[name] = -(-size // 512) * 512
        assert allocator.allocated == sum(live.values()) <= allocator.reserved
    for pool in (allocator._small, allocator._large):
        block, address, mapped = pool.at[0], 0, 0
        free, bare = [], []
        while block is not None:
            assert block.address == address and pool.at[address] is block
            beside = block.after
            assert beside is None or block.taken or beside.taken or block.mapped != beside.mapped  # else they were one
            mapped += block.size * block.mapped
            if not block.mapped:
                bare.append(block.address)
                assert block.address % pool.page == 0
            elif not block.taken:
                free.append((block.size, block.address))
            address, block = address + block.size, beside
        assert address == ADDRESSES and mapped == pool.reserved
        assert sorted(free) == pool.free and bare == pool.bare


def test_what_is_reserved_is_more_than_the_limit_by_less_than_a_page() -> None:
    """The trainer takes as much off the limit."""
    assert rounded_up(ALLOCATOR) == 14 * MIB and rounded_up("expandable_segments:True") == 18 * MIB
    assert rounded_up("") == rounded_up("expandable_segments:False,large_segment_size_mb:16") == 0
    most = 0
    for seed in range(200):
        source, limit = random.Random(seed), 200 * MIB
        allocator, held = Allocator(limit), []
        for name in range(60):
            if held and source.random() < 0.4:
                allocator.give(held.pop(source.randrange(len(held))))
            try:
                allocator.take(name, source.choice([MIB // 2, 3 * MIB, 11 * MIB, 17 * MIB + 512, 33 * MIB]))
                held.append(name)
            except OutOfMemory:
                break
        most = max(most, allocator.most_reserved - limit)
    assert 0 < most <= rounded_up(ALLOCATOR)
