"""What records say of predictions: one row for each run, and of all together how far off and how often too low."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from planner.measurements import Failure, Record, Spread
from planner.units import format_bytes


def _allocated(record: Record) -> tuple[float, float] | None:
    return (record.expected, record.allocated) if record.shows_the_peak else None


def _bound(record: Record) -> tuple[float, float] | None:
    reserved = record.measured["reserved_bytes"]
    return (record.predicted["high_bytes"], reserved) if reserved and record.shows_the_peak else None


def _driver(record: Record) -> tuple[float, float] | None:
    if record.how == "rehearsed":
        return None  # the context is that of the card that stands in
    # Of several processes on one card it is not sure which is whose.
    driver = record.measured["driver_bytes"] if not record.content.get("beside") else None
    context = record.content["plan"]["gpu"]["context_bytes"]
    return (record.predicted["high_bytes"] + context, driver) if driver and record.shows_the_peak else None


def _pinned(record: Record) -> tuple[float, float] | None:
    planned, found = (record.content[side]["host"]["pinned_bytes"] for side in ("predicted", "measured"))
    return (planned, found) if found else None


def _host(record: Record) -> tuple[float, float] | None:
    if not record.content["measured"]["host"]["anonymous_bytes"]:
        return None
    return record.content["predicted"]["host"]["peak_bytes"], record.host_measured


def _host_expected(record: Record) -> tuple[float, float] | None:
    expected = record.content["predicted"]["host"].get("expected_bytes")
    if expected is None or not record.content["measured"]["host"]["anonymous_bytes"]:
        return None
    return expected, record.host_measured


def _time(record: Record) -> tuple[float, float] | None:
    if not record.alone:
        return None  # another card's seconds, or some that were shared
    measured, estimated = record.step
    return (estimated, measured) if measured and estimated else None


# What is compared: a name, what is predicted, what is measured, and the pair of one record.
COMPARED: tuple[tuple[str, str, Callable[[Record], tuple[float, float] | None]], ...] = (
    ("allocated", "expected peak against what tensors took", _allocated),
    ("reserved", "bound against what the allocator took", _bound),
    ("driver", "bound and context against what the driver counted", _driver),
    ("pinned", "pinned host memory", _pinned),
    ("host_expected", "expected host memory against what was taken", _host_expected),
    ("host", "bound of host memory against what was taken", _host),
    ("time", "estimated against measured seconds of a step", _time),
)
BOUNDS = ("reserved", "driver", "host")
"""What is to be above: how far it is, is room that was left."""


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
                "how": record.how,
                "model": record.content["model"]["id"],
                "card": record.content["card"],
                "total_tokens": record.tokens,
                "executor": record.content["executor"],
                "layers": record.content["layers"],
                "layers_run": record.content["layers_run"],
                "within_bound": record.within,
                "predicted": record.predicted,
                "measured": record.measured,
            }
            for record in records
        ],
        "failed": [{"name": failure.name, "why": failure.told} for failure in failures],
        "summary": {name: asdict(spread) for name, spread in spreads(records).items()},
    }


HEADS = ("model", "card", "tokens", "how", "took", "error", "bound left")


def row(record: Record) -> tuple[str, ...]:
    """A run under ``HEADS``."""
    _, took, error, left = figures(record)
    place = (record.content["model"]["id"], record.content["card"], f"{record.tokens:,}", record.how)
    return (*place, took, error, left)


def figures(record: Record) -> tuple[str, str, str, str]:
    """Expected peak, what tensors took, how far off that was, and what of the bound is left, less than 0 if none."""
    over = format_bytes(abs(record.over))
    return (
        format_bytes(record.expected),
        format_bytes(record.allocated),
        _signed(record.error),
        over if record.over <= 0 else f"−{over}",
    )


def sentences(records: Sequence[Record], failures: Sequence[Failure]) -> list[str]:
    """What is said of all of them together."""
    lines = []
    for name, each in spreads(records).items():
        what = next(told for known, told, _ in COMPARED if known == name)
        lines.append(
            f"{what}: {each.count} {'run' if each.count == 1 else 'runs'}, {'apart' if name in BOUNDS else 'off'} by "
            f"{_share(each.median)} in the middle, {_share(each.percentile_95)} at the 95th percentile, "
            f"{_share(each.largest)} at most; too low in {each.under}."
        )
    failed = [failure.name for failure in failures if failure.out_of_memory]
    if failed:
        lines.append(f"{_runs(len(failed))} more ran out of memory and left no record: there the bound was too low.")
    if less := [failure.name for failure in failures if failure.held_to_less]:
        lines.append(
            f"{_runs(len(less))} more ran out of memory, held to less than the bound to see whether it takes it: "
            f"{', '.join(less)}."
        )
    squeezed = sum(record.retries > 0 for record in records)
    if squeezed:
        lines.append(
            f"In {_runs(squeezed)} the allocator came to the limit, gave memory back and asked again: what it reserved "
            "then is what it was held to, and not all that it would have taken."
        )
    lines += _before_held(records)
    over_card = [*_names(records, "over"), *failed]
    for what, over in (("the card", over_card), ("the host", _names(records, "host_over"))):
        lines.append(f"More than the bound of {what}: {', '.join(over) if over else 'none'}.")
    stopped = [record for record in records if "stopped" in record.content]
    lines += [f"Stopped: {record.name}: {record.content['stopped']}" for record in stopped]
    lines += [f"No record: {failure.name}: {failure.told}" for failure in failures if not failure.held_to_less]
    if alone := [record.name for record in records if not record.shows_the_peak]:
        lines.append(
            f"Of one layer alone, which fetches nothing for a next one, so that only their host memory is compared: "
            f"{', '.join(alone)}."
        )
    if parts := sorted({(r.content["layers_run"], r.content["layers"]) for r in records if _in_part(r)}):
        ran = ", ".join(f"{some} of {layers}" for some, layers in parts)
        lines.append(f"Of layers that run one by one, each with the same buffers, the first alone were run: {ran}.")
    if any(record.how == "counted" for record in records):
        lines.append(
            "counted: bytes of one step's tensors, which held no data; what kernels and the allocator take besides is "
            "in the bound alone, and loading and time are not seen."
        )
    return lines


def _before_held(records: Sequence[Record]) -> list[str]:
    """What the allocator took of the card's whole budget, where runs had it before they were held to the bound."""
    had = [(record, over) for record in records if (over := record.over_before_held) is not None]
    if not had:
        return []
    more = [(record, over) for record, over in had if over > 0]
    told = f"With the whole card's budget the allocator took more than the bound in {len(more)} of {_runs(len(had))}"
    if more:
        ended = sum(record.over <= 0 for record, _ in more)
        most = format_bytes(max(over for _, over in more))
        told += f", by at most {most}; held to the bound afterwards, {ended} of these went on within it"
    retried = sum(bool((record.before_held or {}).get("retries")) for record, _ in had)
    return [f"{told}. It came to that budget, and gave memory back, in {_runs(retried)}."]


def _runs(count: int) -> str:
    return f"{count} {'run' if count == 1 else 'runs'}"


def _names(records: Sequence[Record], what: str) -> list[str]:
    return [record.name for record in records if getattr(record, what) > 0]


def _in_part(record: Record) -> bool:
    return bool(record.content["layers_run"] != record.content["layers"])


def _signed(error: float) -> str:
    told = f"{100 * error:+.2f} %"
    return "0.00 %" if told[1:] == "0.00 %" else told.replace("-", "−")


def _share(error: float) -> str:
    return f"{100 * error:.2f} %"
