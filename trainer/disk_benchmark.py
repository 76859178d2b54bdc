"""How fast a disk takes large pieces and gives them back, past the system's cache, as layer inputs are kept on it."""

from __future__ import annotations

import contextlib
import mmap
import time
from pathlib import Path

import torch

from planner.errors import PlanError
from planner.units import GIB
from trainer.disk_room import IN_MEMORY, file_system
from trainer.streamed.disk_file import DiskFile, finish, nearest_folder

DISK_BYTES, QUICK_DISK_BYTES = 8 * GIB, GIB
"""Much more than what disks of a laptop take into memory of their own; a fast cache of some drives is larger still."""
PART = GIB // 4
ELSEWHERE = "--scratch names a folder on another disk."


def disk_rate(folder: Path, size: int) -> float:
    """Bytes a second of writing so many and reading them again, the time of both together.

    Args:
        size: whole parts of ``PART`` bytes, or less than one.

    Raises:
        PlanError: the disk is none, has no room, or keeps what is written in the system's cache whatever one does.
    """
    place = nearest_folder(folder.expanduser())
    asked, part = f"measuring the disk of {place}", min(size, PART)
    if (kind := file_system(place)) in IN_MEMORY:
        raise PlanError(asked, f"it is no disk but memory ({kind}).", ELSEWHERE)
    try:
        with contextlib.closing(DiskFile(place, size)) as file:
            if not file.direct:
                raise PlanError(asked, "its file system puts all into memory first: a time would tell of that.")
            # Random bytes, which no drive makes smaller, in pages of their own, as direct writing wants them.
            values = torch.frombuffer(mmap.mmap(-1, part), dtype=torch.uint8).random_()
            began = time.perf_counter()
            for move in (file.write, file.read):
                for offset in range(0, size, part):
                    finish(move(values, offset, lambda: None))
            return 2 * size / (time.perf_counter() - began)
    except PlanError as error:
        raise PlanError(asked, error.why, ELSEWHERE) from error
