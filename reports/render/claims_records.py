"""What records of runs in reports/validation say about claims."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from reports.render.claims_data import Document, Found, gigabytes
from reports.render.records import Record, on_cards, records

STATIC = ("weights", "adapters", "gradients", "optimizer")


def record(name: str) -> Record:
    """One record by name."""
    found = next((one for one in records() if one.name == name), None)
    assert found is not None, f"there is no record {name}"
    return found


def chosen(name: str) -> set[str]:
    """The optimisations that were on."""
    return {choice["id"] for choice in record(name).content["plan"]["choices"]}


def passing(name: str) -> int:
    """Measured peak less weights, adapters, gradients and optimiser: what activations and loss took."""
    one = record(name)
    return one.allocated - sum(int(one.content["measured"]["terms"][group]) for group in STATIC)


def _differ(without: str, with_it: str, names: set[str]) -> None:
    assert chosen(with_it) - chosen(without) == names and not chosen(without) - chosen(with_it)
    assert record(without).tokens == record(with_it).tokens


def optimizer_states(document: Document, plain: str, eight: str) -> Found:
    """Measured optimiser states; the value is in percent."""
    _differ(plain, eight, {"adamw_8bit"})
    before, after = (int(record(name).content["measured"]["terms"]["optimizer"]) for name in (plain, eight))
    share = 100 * (1 - after / before)
    return Found(f"{share:.1f} %: {gigabytes(before)} to {gigabytes(after)} at the rank of that run", share)


def checkpointing(document: Document, without: str, with_it: str) -> Found:
    """Measured peak above the resident tensors; the value is in percent."""
    _differ(without, with_it, {"gradient_checkpointing"})
    before, after = passing(without), passing(with_it)
    share = 100 * (1 - after / before)
    text = (
        f"{share:.1f} %, more than said: {gigabytes(before)} to {gigabytes(after)} at {record(with_it).tokens:,} tokens"
    )
    return Found(text, share, holds="in part" if share > 60 else None)


def checkpointing_time(document: Document, without: str, with_it: str) -> Found:
    """Measured step time with one checkpoint a layer."""
    _differ(without, with_it, {"gradient_checkpointing"})
    before, after = (float(record(name).step[0] or 0) for name in (without, with_it))
    share = 100 * (after / before - 1)
    text = (
        f"{share:.0f} % slower with a checkpoint at every layer; √L segments recompute every layer once as "
        "well, so they "
        "gain nothing"
    )
    return Found(text, holds="in part")


def unused(document: Document) -> Found:
    """Reserved over allocated at the peak, in every run on a card."""
    found = on_cards(records())
    shares = sorted(100 * (one.reserved / one.allocated - 1) for one in found)
    text = (
        f"without it, reserved was {shares[0]:.1f} to {shares[-1]:.1f} % above allocated in {len(found)} runs with "
        "expandable segments: no more than that could be won"
    )
    return Found(text)


def perplexity(document: Document, name: str) -> Found:
    """Held-out perplexity before and after training; 1 would be known by heart."""
    before, after = (float(record(name).content["evaluation"][when]["perplexity"]) for when in ("before", "after"))
    text = f"held-out perplexity of code fell from {before:.2f} to {after:.2f} in the recorded run; 1 would be perfect"
    return Found(text, holds="no" if after > 1.05 else "yes")


def first_step(document: Document) -> Found:
    """Seconds of the first step of every run on a card beyond its median; the value is the middle one, in ms."""
    found = on_cards(records())
    later = sorted(
        1000 * (float(one.content["step_seconds"]["probe"]) - float(one.content["step_seconds"]["median"]))
        for one in found
    )
    middle = later[len(later) // 2]
    text = (
        f"the first step took {later[0]:,.0f} to {later[-1]:,.0f} ms longer than the median in {len(later)} "
        "runs, in the "
        f"middle {middle:,.0f}; a warm-up pays that earlier, and saves none of it"
    )
    return Found(text, holds="in part")


COMPUTATIONS: Mapping[str, Callable[..., Any]] = {
    each.__name__: each
    for each in (optimizer_states, checkpointing, checkpointing_time, unused, perplexity, first_step)
}
