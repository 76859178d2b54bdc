"""For reports/validation.md: runs that memory was taken from on the way, and how they ended."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

from planner.markdown import gib, table
from reports.validation.taken import AT, CASES, FOLDER, STEPS

WHEN = {"step": f"in step {AT}", "probe": "in the probe step", "evaluation": "in the evaluation before training"}
WHO = {"process": "another process", "limit": "a limit"}


@cache
def found() -> dict[str, dict[str, Any]]:
    """The records, by case."""
    places = {case.name: FOLDER / f"{case.name}.json" for case in CASES}
    return {name: json.loads(place.read_text(encoding="utf-8")) for name, place in places.items() if place.exists()}


def apart(record: dict[str, Any]) -> float:
    """The largest difference of a loss from that of the run that nothing was taken from, as a share."""
    return largest_difference(record["taken"], record["undisturbed"])


def largest_difference(one: dict[str, Any], other: dict[str, Any]) -> float:
    """Of the losses of all steps and of the held-out rows after training."""
    pairs = [*zip(one["losses"], other["losses"], strict=True)]
    pairs.append((one["evaluation"]["after"]["loss"], other["evaluation"]["after"]["loss"]))
    return max(abs(this / that - 1) for this, that in pairs)


def between_equal_runs() -> float:
    """The same between two runs of a case that nothing was taken from, of those that were made twice."""
    before = json.loads((FOLDER / "others" / "undisturbed.json").read_text(encoding="utf-8"))["runs"]
    return max(largest_difference(run, found()[name]["undisturbed"]) for name, run in before.items())


def as_long(record: dict[str, Any]) -> bool:
    """Whether it trained on sequences of the length that was asked for."""
    return bool(record["taken"]["total_tokens"] == record["undisturbed"]["total_tokens"])


def sentence() -> str:
    """How many ended and how, and how far their losses are from those of runs that nothing was taken from."""
    ended = [record for record in found().values() if len(record["taken"]["losses"]) == STEPS]
    resumed = [record for record in ended if record["stopped"] is not None]
    shorter = [record for record in ended if not as_long(record)]
    lifted = [record for record in ended if record["by"] == "limit"]
    at_once = len(ended) - len(resumed) - len(shorter)
    most = max(apart(record) for record in ended if as_long(record))
    return (
        f"{at_once} went on by a smaller plan at full length, {len(lifted)} of these once the limit had been lifted, "
        f"{len(shorter)} with a shorter sequence, and {len(resumed)} found no smaller plan, was stored, and went on "
        f"when the memory was back. At full length no loss was off by more than {100 * most:.3f} % from that of a run "
        f"that nothing was taken from; two such runs by the same plan differ by up to {100 * between_equal_runs():.3f} "
        "%."
    )


def section() -> str:
    """What was taken when, what answered, and both runs' ends."""
    left = max(record["left_on_card_bytes"] for record in found().values())
    within = sum(record["taken"]["reserved_bytes"] <= record["taken"]["high_bytes"] for record in found().values())
    told = (
        "Training that cannot have what it was planned for is gone on with by the next smaller plan, or stored. Here a "
        "second process took all else of the card, or the allocator alone got a limit, which the next plan lifts "
        "(`python -m reports.validation.taken run OUT`; records in `reports/validation/taken/`, each with its plan). "
        f"Of {len(CASES)} runs {sentence()} When planning began again, tensors had no more than {left:,} bytes of "
        f"the card. By the plan that each ended with, {within} reserved no more than its bound. In the probe step and "
        "in the evaluation before training `--replan` was given, which may shorten the sequence; in training nothing "
        "has to be."
    )
    rows = [_row(name, record) for name, record in found().items()]
    heads = (
        "run",
        "who took it, and when",
        "bound then, GiB>",
        "it kept>",
        "answer",
        "bound now>",
        "reserved>",
        "losses apart>",
    )
    return f"## Memory that is taken away\n\n{told}\n\n{table(heads, rows)}"


def _row(name: str, record: dict[str, Any]) -> tuple[str, ...]:
    before, after = record["undisturbed"], record["taken"]
    return (
        name,
        f"{WHO[record['by']]} {WHEN[record['when']]}",
        gib(before["high_bytes"]),
        gib(record["kept_bytes"]),
        _answer(record),
        gib(after["high_bytes"]),
        gib(after["reserved_bytes"]),
        f"{100 * apart(record):.4f} %" if as_long(record) else "another length",
    )


def _answer(record: dict[str, Any]) -> str:
    if record["stopped"] is not None:
        resumed = record["taken"]["resumed"][0]["steps"]
        return f"nothing smaller; stored, and with the memory back resumed after step {resumed}"
    before, after = record["undisturbed"]["choices"], record["taken"]["choices"]
    told = [f"with {name}" for name in after if name not in before]
    told += [f"without {name}" for name in before if name not in after]
    told += [
        f"{name}.{knob} {value}"
        for name in after
        if name in before
        for knob, value in after[name].items()
        if value != before[name].get(knob)
    ]
    if not as_long(record):
        told.append(f"{record['taken']['total_tokens']:,} tokens")
    return ", ".join(told) or "by the same settings"
