"""Every card with every model: the highest tier, the longest sequence, and what it takes; none is dropped."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from itertools import product
from typing import Any

from planner.errors import PlanError, raise_all
from planner.hardware import HardwareProfile, list_profiles
from planner.machine import processors
from planner.micro_batch import rows_at_many_lengths
from planner.model import ModelShape, list_models
from planner.optimizations.base import CAPABILITIES, Situation
from planner.plan_time import seconds_at
from planner.planning import Request, Solved, contradictions, read_gpu, read_model, solved_for, space_for
from planner.space import Space
from planner.suggestions import needed
from planner.tier_table import lacking, lacks

ALONE = 60  # pairs that one process plans as quickly as several


@dataclass(frozen=True)
class MatrixRow:
    """One card with one model. What no plan gives is None, and ``why`` says why there is none.

    ``tier`` is None too where no tier fits; the row is then of the longest sequence that does, at a smaller rank.
    """

    gpu: str
    model: str
    fits: bool | None
    tier: int | None = None
    total_tokens: int | None = None
    rank: int | None = None
    longest_all_trained: int | None = None
    gpu_high_bytes: int | None = None
    gpu_budget_bytes: int | None = None
    host_bytes: int | None = None
    step_seconds: float | None = None
    why: str = ""

    def document(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)


COLUMNS = tuple(each.name for each in fields(MatrixRow))


def matrix(
    gpus: Sequence[str],
    models: Sequence[str],
    request: Request,
    *,
    done: Callable[[int], None] = lambda pairs: None,
    processes: int | None = None,
) -> list[MatrixRow]:
    """Plan every card with every model; by card, then by model, in the order given.

    Args:
        request: what else is asked; its card and its model are left out of account.
        done: told after each model for how many pairs that is.
        processes: how many to use; as many as there are threads to use, unless it is given.

    Raises:
        PlanError: a card or a model is not known, or the request is wrong for all of them.
    """
    check(gpus, models, request)
    many = processes or processors()
    rows: dict[tuple[str, str], MatrixRow] = {}
    for model, found in _planned(tuple(gpus), models, request, 1 if len(gpus) * len(models) <= ALONE else many):
        rows |= {(gpu, model): row for gpu, row in zip(gpus, found, strict=True)}
        done(len(found))
    return [rows[pair] for pair in product(gpus, models)]


def check(gpus: Sequence[str], models: Sequence[str], request: Request) -> None:
    """See whether all of it is known and fits together.

    Raises:
        PlanError: every mistake, at once.
    """
    errors = contradictions(request) + rows_at_many_lengths(request.rows)
    for read, name in [*((read_gpu, gpu) for gpu in gpus), *((read_model, model) for model in models)]:
        try:
            read(name)
        except PlanError as error:
            errors += getattr(error, "errors", [error])
    raise_all(errors)


def _planned(
    gpus: tuple[str, ...], models: Sequence[str], request: Request, processes: int
) -> Iterator[tuple[str, list[MatrixRow]]]:
    if processes == 1:
        yield from ((model, rows_of_model(model, gpus, request)) for model in models)
        return
    with ProcessPoolExecutor(min(processes, len(models)), initializer=_die_of_interrupt) as pool:
        tasks = {pool.submit(rows_of_model, model, gpus, request): model for model in models}
        try:
            for task in as_completed(tasks):
                yield tasks[task], task.result()
        finally:
            pool.shutdown(cancel_futures=True)  # who is interrupted does not wait for the models still to come


def _die_of_interrupt() -> None:
    """Ctrl-C reaches every process of a terminal; one that took it for a failed task would go on to the next."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def all_cards() -> tuple[str, ...]:
    """The ids of every card there is a file for."""
    return tuple(card.id for card in list_profiles())


def all_models() -> tuple[str, ...]:
    """The ids of every model that comes along."""
    return tuple(facts.id for facts in list_models())


def rows_of_model(model: str, gpus: Sequence[str], request: Request) -> list[MatrixRow]:
    """One model on every card; cards of one kind share what there is to choose from."""
    shape = read_model(model)
    spaces: dict[tuple[object, ...], Space] = {}

    def shared(situation: Situation, asked: Request) -> Space:
        kind = (*kind_of_card(situation.gpu), asked.required)  # last resorts require what else is left out
        if kind not in spaces:
            spaces[kind] = space_for(situation, asked)
        return spaces[kind]

    return [_row(replace(request, gpu=gpu, model=model), _card(gpu), shape, shared) for gpu in gpus]


@cache
def _card(name: str) -> HardwareProfile:
    return read_gpu(name)


def kind_of_card(gpu: HardwareProfile) -> tuple[object, ...]:
    """What optimisations may ask of a card (see ``Situation``); where it is equal, so is what is composed.

    Its gfx name is none of it but for words: whoever has one has no compute capability, and is refused by that.
    """
    capability = gpu.compute_capability
    steps = None if capability is None else sum(capability >= step for step in CAPABILITIES)
    return (gpu.kind, steps, bool(gpu.gfx), gpu.supports_bf16, gpu.supports_flash_attention_2)


def _row(
    request: Request, gpu: HardwareProfile, model: ModelShape, space: Callable[[Situation, Request], Space]
) -> MatrixRow:
    try:
        return _told(solved_for(request, gpu, model, space))
    except PlanError as error:
        errors: tuple[PlanError, ...] = getattr(error, "errors", (error,))
        return MatrixRow(request.gpu, request.model, None, why=" ".join(each.why for each in errors))


def _told(made: Solved) -> MatrixRow:
    found, index = made.found, made.found.index
    want, best, fits = found.wanted[index], found.best, bool(found.best.fits[index])
    need = needed(best, made.limits, index, shared=made.situation.gpu.kind == "cpu")
    return MatrixRow(
        gpu=made.request.gpu,
        model=made.request.model,
        fits=fits,
        tier=want.tier if fits else None,
        total_tokens=want.total if fits else None,
        rank=want.rank,
        longest_all_trained=found.longest_all_trained,
        gpu_high_bytes=int(best.high[index]),
        gpu_budget_bytes=made.limits.gpu_bytes,
        host_bytes=int(best.host[index]),
        step_seconds=seconds_at(best, index, want.rank, made.situation.gpu, found.constants),
        why="" if fits else f"no length fits; at {want.total:,} tokens {lacking(lacks(need))}",
    )
