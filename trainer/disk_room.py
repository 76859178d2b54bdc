"""The disk that a run trains with: in which folder it is, and whether it has room, asked before the model is loaded."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from planner.errors import PlanError
from planner.plan import Plan
from planner.units import format_bytes
from trainer.streamed.disk_file import ELSEWHERE, nearest_folder

IN_MEMORY = frozenset({"tmpfs", "ramfs", "devtmpfs"})


def scratch_folder(plan: Plan) -> Path:
    """Where a plan keeps on disk what it needs while it trains."""
    return Path(plan.train.scratch or plan.train.out).expanduser()


def check_disk(plan: Plan) -> None:
    """Refuse a plan that takes more of the disk while it trains than can be had, or a disk that is none.

    Raises:
        PlanError: how much is missing.
    """
    size = plan.memory.disk.training_bytes
    if not size:  # so few inputs that all have places in the host
        return
    place = nearest_folder(scratch_folder(plan))
    asked = f"{format_bytes(size)} of disk while it trains"
    if (kind := file_system(place)) in IN_MEMORY:
        raise PlanError(asked, f"{place} is no disk but memory ({kind}).", ELSEWHERE)
    if not os.access(place, os.W_OK):
        raise PlanError(asked, f"{place} is not writable.", ELSEWHERE)
    # What a run leaves behind may lie on the same disk, and is there before the run has ended.
    same = place.stat().st_dev == nearest_folder(Path(plan.train.out).expanduser()).stat().st_dev
    left = sum(plan.memory.disk.terms.values()) - size if same else 0
    free = shutil.disk_usage(place).free
    if free < size + left:
        beside = f" and {format_bytes(left)} that the run leaves there" if left else ""
        gib = (free - left) // 2**30
        less = f" --disk {gib}GiB plans for what there is." if gib > 0 else ""
        raise PlanError(asked + beside, f"the disk of {place} has {format_bytes(free)} free.", ELSEWHERE + less)


def file_system(place: Path) -> str:
    """The kind of file system a folder is on, as the system calls it; empty where it does not tell."""
    found = (0, "")
    path = place.resolve()
    try:
        with open("/proc/self/mounts", encoding="utf-8", errors="surrogateescape") as mounts:
            for line in mounts:
                _, at, kind, *_ = line.split(" ")
                mount = Path(at.replace("\\040", " "))
                if path == mount or mount in path.parents:
                    found = max(found, (len(mount.parts), kind))
    except (OSError, ValueError):
        return ""  # another system than Linux
    return found[1]
