"""Measures cases on several cards of one machine: those with seconds to compare alone on a card, others three at once.

    python -m reports.validation.several OUT [NAME…] [--pairs|--largest|--tiers] [--cards N] [--seconds N] [--missing]

Every run is `measure run OUT NAME --grid`, or another list's, in a process of its own. Of the grid, first go the
longest sequences and those beyond, then timed runs that are held out of fits, with models that are new before all, then
what is not timed, then the other timed ones; with --missing only those that have neither record nor failure in the
repository. No run begins before the host has the memory that its plan names. When the seconds are over nothing more is
begun; what has a record, or failed, in OUT is not run again.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from planner.machine import free_host_bytes
from planner.plan_file import load_plan
from reports.validation.cases import Case
from reports.validation.grid import HELD, NEW
from reports.validation.measure import HERE, LISTS, add_lists
from reports.validation.pairs import TIMED
from reports.validation.sets import CALIBRATED_UP_TO

SHARE_OF_HOST = 0.9
"""Of what is free of the host, so much is given to runs."""
SHARED = 3
"""So many runs share a card where nothing is timed: most of what they take is the start of a process."""


def is_timed(case: Case) -> bool:
    """Whether its seconds are compared: all layers on a card of this kind, more than the steps that are held."""
    if case.name in TIMED:
        return True
    longest = case.beyond is not None or case.name.endswith("-longest")
    return case.name.startswith(tuple(HELD)) and case.layers is None and not longest


def has_ended(case: Case, folder: Path) -> bool:
    """Whether a folder has its record, or says that it failed."""
    return any((folder / f"{case.name}{end}").exists() for end in (".json", ".failed.txt"))


def in_turn(cases: Iterable[Case]) -> list[tuple[list[Case], int]]:
    """What is run at a time, and how many of it share a card."""

    ordered = sorted(cases, key=lambda case: case.name not in NEW)
    pairs = [case for case in ordered if case.name.endswith(("-longest", "-beyond"))]
    timed = [case for case in ordered if is_timed(case)]
    fitted = [case for case in timed if any(f"-{model}-" in case.name for model in CALIBRATED_UP_TO)]
    rest = [case for case in ordered if case not in pairs and case not in timed]
    return [(pairs, SHARED), ([case for case in timed if case not in fitted], 1), (rest, SHARED), (fitted, 1)]


class HostRoom:
    """The host's memory, for runs that each take what their plan says."""

    def __init__(self, free: int) -> None:
        self._whole = self._free = free
        self._changed = threading.Condition()

    @contextmanager
    def taken(self, size: int) -> Iterator[None]:
        """Wait until so many bytes are free, and have them meanwhile; what is more than all there is waits for all."""
        size = min(size, self._whole)
        with self._changed:
            self._changed.wait_for(lambda: self._free >= size)
            self._free -= size
        try:
            yield
        finally:
            with self._changed:
                self._free += size
                self._changed.notify_all()


def host_bytes(case: Case, of: str) -> int:
    """What a frozen plan takes of the host at most; where the host is the limit, also of what is beyond it."""
    return load_plan(HERE / of / "plans" / f"{case.name}.yaml").memory.host.peak_bytes


def run_all(cases: Sequence[Case], of: str, out: Path, cards: int, slots: int, until: float, room: HostRoom) -> None:
    """Run cases of a list, so many at a time on each card; nothing begins after ``until``."""
    waiting, lock = deque(cases), threading.Lock()

    def work(card: int) -> None:
        while time.monotonic() < until:
            with lock:
                if not waiting:
                    return
                case = waiting.popleft()
            if has_ended(case, out):
                continue
            words = ["run", str(out), case.name, f"--{of}", "--beside", str(slots - 1)]
            command = [sys.executable, "-m", "reports.validation.measure", *words]
            environment = {**os.environ, "CUDA_VISIBLE_DEVICES": str(card)}
            with room.taken(host_bytes(case, of)):
                done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
            print((done.stdout + done.stderr[-400:]).strip(), flush=True)

    workers = [threading.Thread(target=work, args=(card,)) for card in range(cards) for _ in range(slots)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()


def main(arguments: Sequence[str] | None = None) -> int:
    """See the module's docstring."""
    summary = str(__doc__).splitlines()[0]
    parser = argparse.ArgumentParser(prog="python -m reports.validation.several", description=summary)
    parser.add_argument("out", type=Path)
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--cards", type=int, default=1)
    parser.add_argument("--missing", action="store_true", help="only what no record in the repository is of")
    parser.add_argument("--seconds", type=float, default=3600.0)
    add_lists(parser)
    given = parser.parse_args(arguments)
    of = given.of or "grid"
    if unknown := {*given.names} - {case.name for case in LISTS[of]}:
        parser.error(f"no case is called {min(unknown)}")
    given.out.mkdir(parents=True, exist_ok=True)
    until, room = time.monotonic() + given.seconds, HostRoom(int(SHARE_OF_HOST * free_host_bytes()))
    asked = [case for case in LISTS[of] if not given.names or case.name in given.names]
    if given.missing:
        asked = [case for case in asked if not has_ended(case, HERE / of)]
    for cases, slots in in_turn(asked):
        run_all(cases, of, given.out, given.cards, slots, until, room)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
