"""What records say of predictions: one row for each run, and of all together how far off and how often too low."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from planner.measurements import Failure, Record
from planner.units import format_bytes


@dataclass(frozen=True)
class Spread:
    """How far predictions were off, as shares of what was measured.

    Attributes:
        count: of how many runs; ``under``: in how many of them more was measured than predicted.
        median, percentile_95, largest: of the errors without their sign; the 95th by nearest rank.
    """

    count: int
    under: int
    median: float
    percentile_95: float
    largest: float

    @classmethod
    def of(cls, pairs: Sequence[tuple[float, float]]) -> Spread | None:
        """Of pairs of what was predicted and what was measured; None of no pair."""
        if not pairs:
            return None
        errors = sorted(abs(predicted / measured - 1) for predicted, measured in pairs)
        return cls(
            count=len(errors),
            under=sum(predicted < measured for predicted, measured in pairs),
            median=statistics.median(errors),
            percentile_95=errors[math.ceil(0.95 * len(errors)) - 1],
            largest=errors[-1],
        )


def _allocated(record: Record) -> tuple[float, float] | None:
    return record.predicted["expected_bytes"], record.allocated


def _bound(record: Record) -> tuple[float, float] | None:
    reserved = record.measured["reserved_bytes"]
    return (record.predicted["high_bytes"], reserved) if reserved else None


def _driver(record: Record) -> tuple[float, float] | None:
    driver = record.measured["driver_bytes"]
    context = record.content["plan"]["gpu"]["context_bytes"]
    return (record.predicted["high_bytes"] + context, driver) if driver else None


def _pinned(record: Record) -> tuple[float, float] | None:
    planned, found = (record.content[side]["host"]["pinned_bytes"] for side in ("predicted", "measured"))
    return (planned, found) if found else None


def _host(record: Record) -> tuple[float, float] | None:
    if not record.content["measured"]["host"]["anonymous_bytes"]:
        return None
    return record.content["predicted"]["host"]["peak_bytes"], record.host_measured


def _time(record: Record) -> tuple[float, float] | None:
    measured, estimated = record.step
    return (estimated, measured) if measured and estimated else None


# What is compared: a name, what is predicted, what is measured, and the pair of one record.
COMPARED: tuple[tuple[str, str, Callable[[Record], tuple[float, float] | None]], ...] = (
    ("allocated", "expected peak against what tensors took", _allocated),
    ("reserved", "bound against what the allocator took", _bound),
    ("driver", "bound and context against what the driver counted", _driver),
    ("pinned", "pinned host memory", _pinned),
    ("host", "host memory, as a bound", _host),
    ("time", "estimated against measured seconds of a step", _time),
)


def spreads(records: Sequence[Record]) -> dict[str, Spread]:
    """By what is compared, what can be said of the records that tell it."""
    found = {
        name: Spread.of([pair for record in records if (pair := of(record)) is not None]) for name, _, of in COMPARED
    }
    return {name: spread for name, spread in found.items() if spread is not None}


def document(records: Sequence[Record], failures: Sequence[Failure]) -> dict[str, Any]:
    """All of it as plain data."""
    return {
        "runs": [
            {
                "name": record.name,
                "how": how_of(record),
                "model": record.content["model"]["id"],
                "card": record.content["card"],
                "total_tokens": record.tokens,
                "executor": record.content["executor"],
                "layers": record.content["layers"],
                "layers_run": record.content["layers_run"],
                "within_bound": within(record),
                "predicted": record.predicted,
                "measured": record.measured,
            }
            for record in records
        ],
        "failed": [{"name": failure.name, "why": failure.told} for failure in failures],
        "summary": {name: asdict(spread) for name, spread in spreads(records).items()},
    }


def how_of(record: Record) -> str:
    """Whether it was run, rehearsed on another card, or counted; records from before this was told were run."""
    return str(record.content.get("how", "run"))


def within(record: Record) -> bool:
    """Whether the run stayed within the plan's bound."""
    return record.over <= 0


HEADS = ("model", "card", "tokens", "how", "took", "error", "bound left")


def row(record: Record) -> tuple[str, ...]:
    """A run under ``HEADS``."""
    _, took, error, left = figures(record)
    place = (record.content["model"]["id"], record.content["card"], f"{record.tokens:,}", how_of(record))
    return (*place, took, error, left)


def figures(record: Record) -> tuple[str, str, str, str]:
    """Expected peak, what tensors took, how far off that was, and what of the bound is left, less than 0 if none."""
    over = format_bytes(abs(record.over))
    return (
        format_bytes(record.predicted["expected_bytes"]),
        format_bytes(record.allocated),
        _signed(record.error),
        over if within(record) else f"−{over}",
    )


def sentences(records: Sequence[Record], failures: Sequence[Failure]) -> list[str]:
    """What is said of all of them together."""
    told = dict((name, what) for name, what, _ in COMPARED)
    lines = [
        f"{told[name]}: {each.count} {'run' if each.count == 1 else 'runs'}, off by {_share(each.median)} in the "
        f"middle, {_share(each.percentile_95)} at the 95th percentile, {_share(each.largest)} at most; too low in "
        f"{each.under}."
        for name, each in spreads(records).items()
    ]
    over = [record.name for record in records if not within(record)]
    lines.append(f"More than the bound: {', '.join(over) if over else 'none'}.")
    lines += [f"No record: {failure.name}: {failure.told}" for failure in failures]
    if parts := sorted({(r.content["layers_run"], r.content["layers"]) for r in records if _in_part(r)}):
        ran = ", ".join(f"{some} of {layers}" for some, layers in parts)
        lines.append(f"Of layers that run one by one, all alike, the first alone were run: {ran}.")
    if any(how_of(record) == "counted" for record in records):
        lines.append(
            "counted: bytes of one step's tensors, which held no data; what kernels and the allocator take besides is "
            "in the bound alone, and loading and time are not seen."
        )
    return lines


def _in_part(record: Record) -> bool:
    return bool(record.content["layers_run"] != record.content["layers"])


def _signed(error: float) -> str:
    told = f"{100 * error:+.2f} %"
    return "0.00 %" if told[1:] == "0.00 %" else told.replace("-", "−")


def _share(error: float) -> str:
    return f"{100 * error:.2f} %"
