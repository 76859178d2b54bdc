"""A file that holds what host memory has no room for, written and read in large pieces by threads of its own.

It never has a name that would stay behind: it is made without one, or loses it at once, so whatever happens to the
process the disk gets its bytes back. All of them are taken when it is made, so that no step finds the disk full (unless
its file system writes what is written again to another place, as btrfs does). Where the file system allows it, bytes go
past the system's cache, which would else grow by as much as is written.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path

import torch
from torch import Tensor

from planner.errors import PlanError
from planner.streamed_disk import PAGE
from planner.units import format_bytes

PIECE = 2**24  # bytes of one call; some under way at once keep a disk busy
THREADS = 4
_DIRECT = getattr(os, "O_DIRECT", 0)


ELSEWHERE = "--set train.scratch=…, or train.scratch in a plan file, names a folder on another disk."

UnderWay = Sequence[Future[None]]
"""Pieces that are being written or read."""


def finish(pieces: UnderWay) -> None:
    """Return once all of them are done.

    Raises:
        PlanError: the disk did not take one, or did not give it back.
    """
    wait(pieces)
    for piece in pieces:
        piece.result()


class DiskFile:
    """So many bytes of a disk.

    Args:
        folder: one on that disk; where it is not there yet, the nearest above it is taken.

    Raises:
        PlanError: the disk has not so many, or the file cannot be made.
    """

    def __init__(self, folder: Path, size: int) -> None:
        self.size = size
        self._asked = f"{format_bytes(size)} of disk for layer inputs"
        self._place = nearest_folder(folder)
        self._descriptor, self.direct = self._made(_DIRECT)
        try:
            self._take_room()
        except OSError as error:
            os.close(self._descriptor)
            raise self._refused(error) from error
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="disk")

    def write(self, values: Tensor, offset: int, after: Callable[[], None]) -> UnderWay:
        """Begin to write a flat tensor of the host to a place that begins a page, once ``after`` returns."""
        return self._run(values, offset, after, _write_all)

    def read(self, values: Tensor, offset: int, after: Callable[[], None]) -> UnderWay:
        """Begin to fill a flat tensor of the host from a place that begins a page, once ``after`` returns."""
        return self._run(values, offset, after, _read_all)

    def close(self) -> None:
        """Give the disk its bytes back; what is under way is finished first."""
        self._pool.shutdown(wait=True)
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _run(
        self, values: Tensor, offset: int, after: Callable[[], None], move: Callable[[int, memoryview, int], None]
    ) -> UnderWay:
        view = memoryview(values.view(torch.uint8).numpy())
        assert offset % PAGE == 0 and offset + len(view) <= self.size, (offset, len(view), self.size)

        def piece(start: int) -> None:
            after()
            try:
                self._move(view[start : start + PIECE], offset + start, move)
            except OSError as error:
                raise self._refused(error) from error

        return [self._pool.submit(piece, start) for start in range(0, len(view), PIECE)]

    def _move(self, view: memoryview, offset: int, move: Callable[[int, memoryview, int], None]) -> None:
        """Whole pages go as they are; past the cache the rest has to go by a page of its own."""
        whole = len(view) // PAGE * PAGE if self.direct else len(view)
        if whole:
            move(self._descriptor, view[:whole], offset)
        if rest := len(view) - whole:
            with contextlib.closing(mmap.mmap(-1, PAGE)) as page, memoryview(page) as buffer:
                buffer[:rest] = view[whole:]
                move(self._descriptor, buffer, offset + whole)
                view[whole:] = buffer[:rest]

    def _take_room(self) -> None:
        try:
            os.posix_fallocate(self._descriptor, 0, self.size)
        except OSError as error:
            if not self.direct or error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                raise
            # A file system that takes room by writing a byte here and there alone, which past the cache it cannot.
            os.close(self._descriptor)
            self._descriptor, self.direct = self._made(0)
            os.posix_fallocate(self._descriptor, 0, self.size)

    def _made(self, directly: int) -> tuple[int, bool]:
        """A file without a name, past the cache where that can be; and whether it is."""
        for direct in dict.fromkeys((directly, 0)):
            with contextlib.suppress(OSError):
                return os.open(self._place, os.O_TMPFILE | os.O_RDWR | direct, 0o600), bool(direct)
        try:  # a file system without files that have no name
            descriptor, name = tempfile.mkstemp(prefix=".tierplan-", dir=self._place)
            os.unlink(name)
        except OSError as error:
            raise self._refused(error) from error
        return descriptor, False

    def _refused(self, error: OSError) -> PlanError:
        why = f"{self._place}: {error.strerror or error}."
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            why = f"the disk of {self._place} is full."
            with contextlib.suppress(OSError):
                why += f" {format_bytes(shutil.disk_usage(self._place).free)} are free."
        return PlanError(self._asked, why, ELSEWHERE)


def nearest_folder(folder: Path) -> Path:
    """The folder itself, or the nearest above it that is there."""
    path = folder.absolute()
    return next(each for each in (path, *path.parents) if each.is_dir())


def _write_all(descriptor: int, view: memoryview, offset: int) -> None:
    while view:
        done = os.pwrite(descriptor, view, offset)
        view, offset = view[done:], offset + done


def _read_all(descriptor: int, view: memoryview, offset: int) -> None:
    while view:
        done = os.preadv(descriptor, [view], offset)
        if not done:
            raise OSError(errno.EIO, "the file ends before what was written to it")
        view, offset = view[done:], offset + done
