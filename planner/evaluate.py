"""Evaluates one configuration: bytes and seconds at many runs together, with numpy.

``planner.space`` evaluates many configurations together and must give the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache, cached_property, partial
from typing import Any

import numpy as np

from planner.calibration import Calibration
from planner.compose import Configuration
from planner.ledger import WHILE_TRAINING, Basis, Device, Formula, Phase, Term, Work
from planner.optimizations.base import Situation
from planner.symbols import Letters, letters_of
from planner.timecost import StepTime, step_time

Array = np.ndarray[Any, np.dtype[np.int64]]
Kept = dict[tuple[object, ...], Any]
ENDLESS = 2**50  # bytes of a term that stand for more than any machine has


@dataclass(frozen=True)
class Candidates:
    """Runs to evaluate together: arrays of the same length."""

    total: Array
    target: Array
    rank: Array
    batch: int = 1

    @cached_property
    def key(self) -> tuple[object, ...]:
        """What two sets of equal candidates have in common."""
        return (self.total.tobytes(), self.target.tobytes(), self.rank.tobytes(), self.batch)

    def like(self, other: Candidates) -> bool:
        """Whether two sets of as many candidates differ in their lengths alone."""
        return (self.rank.tobytes(), self.batch) == (other.rank.tobytes(), other.batch)


@dataclass(frozen=True)
class Limits:
    """What must hold for a plan to fit; bytes and seconds. ``disk_bytes``: to train with, none unless asked for."""

    gpu_bytes: int
    host_bytes: int
    step_seconds: float
    accumulation: int = 1  # micro-batches in one optimiser step
    disk_bytes: int = 0


@dataclass(frozen=True)
class Outcome:
    """One configuration at all candidates. Arrays are indexed by candidate.

    ``fits`` says of each candidate whether card, host, disk and time allow it. ``composed`` gives the configuration,
    ``timed`` the time: both where they are asked for.
    """

    ids: tuple[str, ...]
    composed: Callable[[], Configuration]
    low: Array
    expected: Array
    high: Array
    host: Array
    pinned: Array
    disk: Array
    timed: Callable[[], StepTime]
    fits: Any

    @cached_property
    def time(self) -> StepTime:
        """Seconds of one step of the optimiser."""
        return self.timed()

    @cached_property
    def configuration(self) -> Configuration:
        """The configuration itself."""
        return self.composed()


class Evaluator:
    """Evaluates configurations at one set of candidates.

    A formula gives the same bytes wherever the letters that it reads are the same, and optimisations share most
    terms; so each is computed once for each value of its own letters, and kept.

    Args:
        like: at as many other lengths of a like run; what does not move with the length is taken over from it.
    """

    def __init__(
        self,
        candidates: Candidates,
        situation: Situation,
        constants: Calibration,
        limits: Limits,
        *,
        like: Evaluator | None = None,
    ) -> None:
        self.candidates, self.situation, self.constants, self.limits = candidates, situation, constants, limits
        gpu = situation.gpu
        self.workspace = constants.workspace_bytes(gpu.compute_capability if gpu.kind == "gpu" else None)
        assert like is None or like.candidates.like(candidates), "what does not move with the length is another"
        self._moving: Kept = {}
        self._still: Kept = {} if like is None else like._still

    def letters(self, configuration: Configuration) -> Letters:
        """All letters at the candidates; the rank is the candidate's own."""
        at = self.candidates
        return configuration.at(
            batch=at.batch, total=at.total, target=at.target, workspace=self.workspace, rank=at.rank
        )

    def __call__(self, configuration: Configuration) -> Outcome:
        """Bytes and seconds of one configuration at all candidates."""
        gpu, limits, letters = self.situation.gpu, self.limits, self.letters(configuration)
        if len(self.candidates.total) == 1:  # whole numbers are several times as fast as arrays of one
            letters = Letters(**{name: int(np.ravel(value)[0]) for name, value in vars(letters).items()})
        wide = Letters(**{**vars(letters), "S": letters.S * 1.0, "T": letters.T * 1.0})
        together = np.array(
            [
                self._once(configuration, (term.count, term.bits), partial(size_of, term, letters, wide))
                for term in configuration.ledger.terms.values()
            ]
        )
        peak, exact, pinned, host, disk = (
            (mask @ together).max(axis=0) for mask in masks(configuration.ledger.terms.values())
        )
        process = self.constants.host_process_bytes(gpu.kind)
        high = peak + self.constants.reserve_bytes(peak, gpu.kind)
        # With the CPU alone there is one memory: what the card would hold lies in the host too.
        host = host + process + (high if gpu.kind == "cpu" else 0)
        fits = (high <= limits.gpu_bytes) & (host <= limits.host_bytes) & (disk <= limits.disk_bytes)
        timed = cache(partial(self._time, configuration, wide))
        if limits.step_seconds < float("inf") and fits.any() and timed().estimate is not None:
            fits = fits & (timed().estimate <= limits.step_seconds)
        return Outcome(configuration.ids, lambda: configuration, exact, peak, high, host, pinned, disk, timed, fits)

    def _time(self, configuration: Configuration, wide: Letters) -> StepTime:
        shape = self.candidates.total.shape
        amounts = {
            work.name: self._once(configuration, (work.amount,), partial(amount_of, work, wide, shape))
            for work in configuration.ledger.work.values()
        }
        time = step_time(configuration, amounts, self.situation.gpu, self.constants)
        return time.times(self.limits.accumulation)

    def _once(self, configuration: Configuration, formulas: tuple[Formula, ...], compute: Callable[[], Any]) -> Any:
        """What formulas come to, computed once for each value of the letters that they read."""
        reads, moves = _reads_and_moves(formulas)
        kept, key = self._moving if moves else self._still, (formulas, *map(configuration.letters.get, reads))
        if key not in kept:
            kept[key] = compute()
        return kept[key]


def size_of(term: Term, letters: Letters, wide: Letters) -> Array:
    """Bytes of a term at every candidate; ``wide`` are the letters with the sequence in float64.

    Score-sized terms can pass 64 bits; beyond ``ENDLESS`` nothing fits, however much it is.
    """
    if isinstance(letters.S, int):
        return np.array([min(int(term.bytes(letters)), ENDLESS)])
    size = np.empty(letters.S.shape, dtype=np.int64)
    size[...] = term.bytes(letters)
    size[np.greater_equal(term.bytes(wide), ENDLESS, out=np.empty(size.shape, dtype=bool))] = ENDLESS
    return size


def amount_of(work: Work, wide: Letters, shape: tuple[int, ...]) -> Any:
    """An amount of work at every candidate."""
    amount = work.amount(wide)
    return amount if np.ndim(amount) else np.full(shape, amount)


@cache
def _reads_and_moves(formulas: tuple[Formula, ...]) -> tuple[tuple[str, ...], bool]:
    """The letters of a configuration that formulas read, and whether they move with the length of the sequence."""
    moves = any(not {"S", "T"}.isdisjoint(letters_of(formula)) for formula in formulas)
    return letters_read(*formulas), moves


@cache
def letters_read(*formulas: Formula) -> tuple[str, ...]:
    """The letters that any of the formulas reads, save the rank and what follows, which are the candidate's own."""
    return tuple(sorted({name for formula in formulas for name in letters_of(formula)} - {"R", "M_s", "M_b"}))


def masks(terms: Iterable[Term]) -> tuple[Array, ...]:
    """For each phase the terms on the card, exactly known there, pinned, in the host at all, on disk to train with."""
    return _masks_of(tuple((t.phases, t.device, t.basis) for t in terms))


@cache
def _masks_of(terms: tuple[tuple[frozenset[Phase], Device, Basis], ...]) -> tuple[Array, ...]:
    alive = np.array([[phase in phases for phases, _, _ in terms] for phase in Phase], dtype=np.int64)
    on_card = np.array([device is Device.GPU for _, device, _ in terms], dtype=np.int64)
    exact = np.array([basis is Basis.EXACT for _, _, basis in terms], dtype=np.int64)
    pinned = np.array([device is Device.PINNED for _, device, _ in terms], dtype=np.int64)
    host = np.array([device in (Device.PINNED, Device.HOST) for _, device, _ in terms], dtype=np.int64)
    training = np.array([phase is WHILE_TRAINING for phase in Phase], dtype=np.int64)[:, None]
    disk = np.array([device is Device.DISK for _, device, _ in terms], dtype=np.int64)
    return alive * on_card, alive * on_card * exact, alive * pinned, alive * host, training * alive * disk
