"""For reports/validation.md: text written on a card, what was planned for it beside what it took."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from planner.markdown import percent, table
from planner.units import MIB
from reports.validation.generated import CASES, FOLDER, NEW

SETS = ("by-512", "by-4096", "by-4096-kernels", "by-4096-before")
"""Folders of records, by tokens of the prompt that were read at once; in the third windows went to kernels, and in the
last the memory of keys and values was taken before the prompt besides."""
HELD = SETS[2:]
"""Whose runs were held to their bounds; the others had the card's whole budget."""
STANDS_IN = "rtx2060s"
"""A card whose rates are not those of the card that ran: its seconds are compared with nothing."""


def records(name: str) -> list[dict[str, Any]]:
    """Of a set, by the name of the case."""
    return [json.loads(place.read_text(encoding="utf-8")) for place in sorted((FOLDER / name).glob("*.json"))]


def section() -> str:
    """Bytes and seconds of each case, as they were planned and as they were."""
    found = [(name, record) for name in SETS for record in records(name)]
    if not found:
        return ""
    one = found[-1][1]["environment"]
    failed = {name: [place.name.removesuffix(".failed.txt") for place in _failed(name)] for name in HELD}
    over = [(name, record) for name, record in found if record["reserved_bytes"] > record["planned"]["high_bytes"]]
    short = [record for _, record in found if record["allocated_bytes"] > record["planned"]["expected_bytes"]]
    # What is told below of the one that failed is of one, which is the one that had taken more, and ended since.
    assert len(over) == 1 and over[0][0] not in HELD, "one took more than its bound, before runs were held to it"
    case = over[0][1]["case"]["name"]
    assert [*failed.values()] == [[case], []], "the same ran out of memory when it was held to it, and no more"
    most = max(record["allocated_bytes"] / record["planned"]["expected_bytes"] - 1 for record in short)
    beyond = (over[0][1]["reserved_bytes"] - over[0][1]["planned"]["high_bytes"]) / MIB
    last = records(HELD[-1])
    before = {record["case"]["name"]: record for name in SETS[1:3] for record in records(name)}
    gaps = {name: (_gap(before[name]), _gap(record)) for record in last for name in [record["case"]["name"]]}
    grown = [now - then for then, now in gaps.values() if now > then]
    longer = [
        record["prompt_seconds"] - before[record["case"]["name"]]["prompt_seconds"]
        for record in last
        if record["case"]["name"] != case  # which did not end in the running before
    ]
    least = min(record["planned"]["high_bytes"] - record["reserved_bytes"] for record in last) / MIB
    revisions = {name: sorted({record["revision"][:7] for record in records(name)}) for name in SETS}
    told = (
        f"`plan generate` writes text by a cache of keys and values that is planned like all else. {len(CASES)} cases "
        f"of random weights, prompts of random tokens and {NEW} tokens after them were planned and frozen, run, and "
        "planned and run again: after their prompts were read by larger pieces and estimates of seconds had more in "
        "them, after windows went to kernels, and after the memory of keys and values was taken before the prompt "
        "(`python -m reports.validation.generated run OUT`; "
        f"records in `reports/validation/generated/`, of revisions "
        f"{'; '.join(', '.join(revisions[name]) for name in SETS)}, on one {one['gpu']['name']}, "
        f"torch {one['packages']['torch']}, transformers "
        f"{one['packages']['transformers']}). Tensors took no more than was expected in {len(found) - len(short)} of "
        f"{len(found)}, and {percent(most, 2)} more at most, on the card that stands in for an {STANDS_IN}: its own "
        f"workspace of cuBLAS is larger. The allocator reserved no more than the bound in {len(found) - len(over)}, "
        f"and {beyond:,.0f} MiB more in one, {case}, which its card had room for. Held to the bound in the third "
        "running, the same ran out of memory, and the others ended. What it had taken more was in gaps: "
        f"{gaps[case][0]:,.0f} MiB were reserved beyond what tensors took, each at its most. Every layer took the "
        "memory of its keys and values, which stays, between tensors of a piece's size, which go. In the last running "
        "it was taken before the prompt: held to the bound again, "
        f"all {len(last)} ended, {least:,.0f} MiB or more below it. Gaps of that case went down to "
        f"{gaps[case][1]:,.0f} MiB; of the {len(gaps)} cases they grew in {len(grown)}, by up to "
        f"{max(grown):,.0f} MiB. Prompts took {_seconds(min(longer))} to {_seconds(max(longer))} s beside the running "
        "before, of which no one knows what was the host's. The table has the last running. "
        "Seconds of a prompt and of a token are estimates by rates of "
        "training; where a card stands in for another, they are those of the other. Soft-capped scores are written "
        "out, which no estimate has."
    )
    heads = (
        "case",
        "allocated, of expected>",
        "bound left, MiB>",
        "prompt, planned>",
        "prompt, s>",
        "token, planned>",
        "token, ms>",
    )
    return f"## Text that was written\n\n{told}\n\n{table(heads, [_row(record) for record in last])}"


def _failed(name: str) -> list[Path]:
    return sorted((FOLDER / name).glob("*.failed.txt"))


def _gap(record: dict[str, Any]) -> float:
    """MiB that were reserved beyond what tensors took, each at its most."""
    return float(record["reserved_bytes"] - record["allocated_bytes"]) / MIB


def _seconds(difference: float) -> str:
    return f"{difference:+.2f}".replace("-", "−")


def _row(record: dict[str, Any]) -> tuple[str, ...]:
    planned, own = record["planned"], record["case"]["card"] != STANDS_IN
    return (
        record["case"]["name"],
        percent(record["allocated_bytes"] / planned["expected_bytes"] - 1, 2),
        f"{(planned['high_bytes'] - record['reserved_bytes']) / MIB:,.0f}".replace("-", "−"),
        f"{planned['prompt_seconds']:.2f}" if own else "",
        f"{record['prompt_seconds']:.2f}",
        f"{1000 * planned['token_seconds']:.0f}" if own else "",
        f"{1000 * record['token_seconds']:.0f}",
    )
