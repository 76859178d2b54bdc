"""What torch's CUDA allocator reserves for a stream of requests, with segments that grow (`expandable_segments`).

It follows ``c10/cuda/CUDACachingAllocator.cpp`` step by step for one stream of a card: a pool for what is small and one
for what is large, each in one segment of addresses that is backed page by page. Nothing is allocated here, and no run
needs it: it tells why a run would fail, without a card (``reports.validation.replay``).
"""

from __future__ import annotations

import re
from bisect import bisect_left, insort
from collections.abc import Iterable
from dataclasses import dataclass, field

KIB, MIB = 1 << 10, 1 << 20
GRAIN = 512
"""Sizes are multiples of it, and a rest of as much is split off."""

SMALL = MIB
"""The largest size of the small pool."""

SMALL_PAGE = 2 * MIB
MIDDLE = 10 * MIB
"""From this size on a request asks the limit for its own size, and below it for a whole page."""

LARGE_GRAIN = 2 * MIB
ADDRESSES = 1 << 60
"""Addresses of a segment; more than any card has."""


PAGE = 20 * MIB
"""A page of segments that grow, unless it is set (``large_segment_size_mb``)."""


def rounded_up(settings: str) -> int:
    """Bytes by which the allocator can reserve more than its limit.

    Where segments grow, the limit is held against what is asked for, in steps of 2 MiB, and whole pages are added: a
    run of the grid went 3.5 MiB over its bound that way.

    Args:
        settings: as ``PYTORCH_ALLOC_CONF`` has them.
    """
    if not re.search(r"expandable_segments\s*:\s*true", settings, re.IGNORECASE):
        return 0
    page = re.search(r"large_segment_size_mb\s*:\s*(\d+)", settings)
    return (int(page[1]) * MIB if page else PAGE) - LARGE_GRAIN


class OutOfMemory(Exception):
    """The limit does not allow what was asked for."""


@dataclass(eq=False, slots=True)
class _Block:
    """A range of addresses: taken, free or not backed by pages; its neighbours are blocks, too."""

    address: int
    size: int
    mapped: bool
    taken: bool = False
    before: _Block | None = None
    after: _Block | None = None

    @property
    def could_be(self) -> int:
        """Its size if it grew into what lies behind it and is not backed."""
        return self.size + (self.after.size if self.after is not None and not self.after.mapped else 0)


@dataclass(slots=True)
class _Pool:
    """The blocks of one segment that are free, by size and address, and those not backed by pages, by address."""

    page: int
    free: list[tuple[int, int]] = field(default_factory=list)
    bare: list[int] = field(default_factory=list)
    at: dict[int, _Block] = field(default_factory=dict)
    reserved: int = 0

    def __post_init__(self) -> None:
        self._put_bare(_Block(0, ADDRESSES, mapped=False))

    def best(self, size: int) -> _Block | None:
        """The free block for a size, its room to grow counted; no longer among the free."""
        place = bisect_left(self.free, (size, 0))
        if place == len(self.free):
            return None
        block = self.at[self.free[place][1]]
        while place + 1 < len(self.free) and self.at[self.free[place + 1][1]].could_be < block.could_be:
            place += 1
            block = self.at[self.free[place][1]]
        self._take_free(block)
        return block

    def grown(self, size: int) -> _Block:
        """A free block of at least this size, at the lowest address where pages can be added for it."""
        block = next(found for found in map(self._from_before, self.bare) if _room(found, size))
        if not block.mapped:
            block = self._map(block, min(block.size, size))
        while block.size < size:
            assert block.after is not None
            block = self._map(block.after, min(size - block.size, block.after.size))
        self._take_free(block)
        return block

    def split(self, block: _Block, size: int) -> None:
        """Keep so much of a block that is about to be taken; the rest is free."""
        if block.size - size >= GRAIN:
            self._put_free(self._cut(block, size, mapped=True))
        block.taken = True

    def give_back(self, block: _Block) -> None:
        """A taken block is free again, and one with its free neighbours."""
        block.taken = False
        self._put_free(self._merged(block))

    def unmap_unused(self) -> None:
        """Give back every page that lies within a free block."""
        for block in [self.at[address] for _, address in self.free]:
            first, end = -(-block.address // self.page), (block.address + block.size) // self.page
            if first >= end:
                continue
            self._take_free(block)
            if (kept := first * self.page - block.address) > 0:
                rest = self._cut(block, kept, mapped=True)
                self._put_free(block)
                block = rest
            size = (end - first) * self.page
            if block.size > size:
                self._put_free(self._cut(block, size, mapped=True))
            block.mapped = False
            self.reserved -= size
            self._put_bare(self._merged(block))

    def _from_before(self, address: int) -> _Block:
        block = self.at[address]
        before = block.before
        return before if before is not None and not before.taken else block

    def _map(self, block: _Block, size: int) -> _Block:
        """Back so much of a block by pages; gives the free block that it is part of then."""
        self.bare.remove(block.address)
        size = -(-size // self.page) * self.page
        if size < block.size:
            self._put_bare(self._cut(block, size, mapped=False))
        block.mapped = True
        self.reserved += size
        block = self._merged(block)
        self._put_free(block)
        return block

    def _cut(self, block: _Block, size: int, *, mapped: bool) -> _Block:
        """Shorten a block; gives what is behind."""
        rest = _Block(block.address + size, block.size - size, mapped, before=block, after=block.after)
        if block.after is not None:
            block.after.before = rest
        block.size, block.after = size, rest
        self.at[rest.address] = rest
        return rest

    def _merged(self, block: _Block) -> _Block:
        """A block and its neighbours of the same kind as one."""
        before = block.before
        if before is not None and not before.taken and before.mapped == block.mapped:
            self._forget(before)
            block = self._joined(before, block)
        after = block.after
        if after is not None and not after.taken and after.mapped == block.mapped:
            self._forget(after)
            block = self._joined(block, after)
        return block

    def _joined(self, first: _Block, second: _Block) -> _Block:
        first.size, first.after = first.size + second.size, second.after
        if second.after is not None:
            second.after.before = first
        del self.at[second.address]
        return first

    def _forget(self, block: _Block) -> None:
        if block.mapped:
            self._take_free(block)
        else:
            self.bare.remove(block.address)

    def _put_free(self, block: _Block) -> None:
        self.at[block.address] = block
        insort(self.free, (block.size, block.address))

    def _put_bare(self, block: _Block) -> None:
        self.at[block.address] = block
        insort(self.bare, block.address)

    def _take_free(self, block: _Block) -> None:
        del self.free[bisect_left(self.free, (block.size, block.address))]


def _room(block: _Block | None, size: int) -> bool:
    while size > 0 and block is not None and not block.taken:
        size -= block.size
        block = block.after
    return size <= 0


class Allocator:
    """One stream's allocator.

    Args:
        limit: bytes that may be reserved, as `torch.cuda.set_per_process_memory_fraction` sets them.
        page: of the large pool (``large_segment_size_mb``).

    Attributes:
        allocated: bytes held, rounded up; ``most_allocated`` and ``most_reserved``: the most there were of each.
        retries: how often pages were given back because the limit was reached (``num_alloc_retries``).
    """

    def __init__(self, limit: int | None = None, page: int = 16 * MIB) -> None:
        self._limit = limit
        self._small, self._large = _Pool(SMALL_PAGE), _Pool(page)
        self._held: dict[int, tuple[_Pool, _Block]] = {}
        self.allocated = self.most_allocated = self.most_reserved = self.retries = 0

    @property
    def reserved(self) -> int:
        """Bytes of all pages."""
        return self._small.reserved + self._large.reserved

    def take(self, name: int, size: int) -> None:
        """Allocate so many bytes under a name.

        Raises:
            OutOfMemory: not within the limit.
        """
        if size <= 0:
            return
        size = -(-size // GRAIN) * GRAIN
        pool = self._small if size <= SMALL else self._large
        block = pool.best(size) or self._grown(pool, size)
        pool.split(block, size)
        self._held[name] = (pool, block)
        self.allocated += block.size
        self.most_allocated = max(self.most_allocated, self.allocated)
        self.most_reserved = max(self.most_reserved, self.reserved)

    def give(self, name: int) -> None:
        """Free what was taken under a name."""
        if name in self._held:
            pool, block = self._held.pop(name)
            self.allocated -= block.size
            pool.give_back(block)

    def empty_cache(self) -> None:
        """Give back every page that nothing lies in."""
        self._large.unmap_unused()
        self._small.unmap_unused()

    def address(self, name: int) -> tuple[bool, int]:
        """Whether what was taken under a name lies in the large pool, and where."""
        pool, block = self._held[name]
        return pool is self._large, block.address

    def _grown(self, pool: _Pool, size: int) -> _Block:
        if not self._allows(pool, size):
            self.empty_cache()
            self.retries += 1
            if not self._allows(pool, size):
                raise OutOfMemory(f"{size:,} bytes more than {self.allocated:,}, with {self.reserved:,} reserved")
        return pool.grown(size)

    def _allows(self, pool: _Pool, size: int) -> bool:
        """The limit is held against a request's size, rounded: not against the pages that are added for it."""
        asked = -(-size // LARGE_GRAIN) * LARGE_GRAIN if size >= MIDDLE or pool is self._small else pool.page
        return self._limit is None or self.reserved + asked <= self._limit


EMPTY = (0, 0)
"""Among events: unused pages are given back."""


def replayed(events: Iterable[tuple[int, int]], limit: int | None = None, page: int = 16 * MIB) -> Allocator:
    """The allocator after events: ``(name, size)`` takes, ``(name, -1)`` gives, ``EMPTY`` empties the cache.

    Raises:
        OutOfMemory: the limit does not allow one of them.
    """
    allocator = Allocator(limit, page)
    for name, size in events:
        if size > 0:
            allocator.take(name, size)
        elif size < 0:
            allocator.give(name)
        else:
            allocator.empty_cache()
    return allocator


def fits(events: list[tuple[int, int]], limit: int, page: int = 16 * MIB) -> bool:
    """Whether events stay within a limit."""
    try:
        replayed(events, limit, page)
    except OutOfMemory:
        return False
    return True


def smallest_limit(events: list[tuple[int, int]], page: int = 16 * MIB, step: int = 2 * MIB) -> int:
    """The smallest limit, a multiple of ``step``, from which on no more was seen to fail; found by halving."""
    free = replayed(events, None, page)
    low, high = free.most_allocated // step, -(-free.most_reserved // step) + page // step
    while low < high:
        middle = (low + high) // 2
        if fits(events, middle * step, page):
            high = middle
        else:
            low = middle + 1
    return high * step
