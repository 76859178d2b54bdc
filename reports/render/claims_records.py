"""What records of runs in reports/validation say about claims."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from planner.units import format_seconds
from reports.render.claims_data import Document, Found, gigabytes
from reports.render.pairs import record as pairs_record
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
    """Seconds of the first step beyond the median, of every run whose layers are not streamed.

    The first step of a streamed run is one of a short sequence, and no step to compare.
    """
    found = [one for one in on_cards(records()) if one.content["executor"] == "resident"]
    later = sorted(
        1000 * (float(one.content["step_seconds"]["probe"]) - float(one.content["step_seconds"]["median"]))
        for one in found
    )
    middle = later[len(later) // 2]
    text = (
        f"the first step took {later[0]:,.0f} to {later[-1]:,.0f} ms longer than the median in {len(later)} "
        f"resident runs, in the middle {middle:,.0f}; a warm-up pays that earlier, and saves none of it"
    )
    return Found(text, holds="in part")


def peak(document: Document, name: str) -> Found:
    """Measured peak of a run of the whole model; the value is in GB."""
    one = record(name)
    assert one.content["layers_run"] == one.content["layers"]
    text = (
        f"{gigabytes(one.allocated)} allocated{_held(one)}; the plan's objective was {one.content['plan']['objective']}"
    )
    return Found(text, one.allocated / 1e9)


def ran(document: Document, name: str, part: str) -> Found:
    """A run of the whole model at a length, and one of some layers on a card held to the reference card."""
    whole, some = record(name), record(part)
    seconds, _ = whole.step
    text = (
        f"{whole.tokens:,} tokens took {gigabytes(whole.allocated)}{_held(whole)}, {format_seconds(seconds or 0)} a "
        f"step. At {some.tokens:,} {some.content['layers_run']} of {some.content['layers']} layers took "
        f"{gigabytes(some.allocated)}{_held(some)}. Neither is a card of 8 GB, and nothing longer is recorded"
    )
    return Found(text, holds="in part")


def _held(one: Record) -> str:
    """To what a run was held, on which card, and what of the host it took."""
    card = one.content["environment"]["gpu"]["name"]
    return f" on {card} held to {gigabytes(one.content['limit_bytes'])}, and {gigabytes(one.host_measured)} of host RAM"


def loss_saved(document: Document, without: str, with_it: str) -> Found:
    """Measured peaks with the loss whole and in slices, less what adapters of another rank take; the value is in GB."""
    _differ(without, with_it, {"chunked_loss"})
    before, after = record(without).allocated, record(with_it).allocated
    (trained, rank), (trained_after, rank_after) = map(_of_rank, (without, with_it))
    more = trained_after - trained
    saved = before - after + more
    text = (
        f"the loss in slices saved {gigabytes(saved)} at {record(with_it).tokens:,} tokens: {gigabytes(before)} to "
        f"{gigabytes(after)}, in which rank {rank_after} in place of {rank} takes {gigabytes(more)} more"
    )
    return Found(text, saved / 1e9)


def _of_rank(name: str) -> tuple[int, int]:
    """Measured bytes of a run that follow from its rank, all of which stay; and the rank."""
    found = record(name).content
    terms = (found["measured"]["terms"][term] for term in ("adapters", "gradients", "optimizer"))
    return sum(terms), found["plan"]["lora_rank"]


def rows_filled(document: Document) -> Found:
    """Steps of full rows: the least time that the card's peak rates allow, over the time they took."""
    shares = []
    for one in on_cards(records()):
        bound, (took, _) = one.content["plan"]["time"]["step_seconds"]["bound"], one.step
        assert one.content["tokens_held"] == one.tokens, f"{one.name} has rows that are not full"
        if one.content["layers_run"] == one.content["layers"] and bound and took:
            shares.append(100 * bound / took)
    text = (
        f"steps of full rows used {min(shares):.0f} to {max(shares):.0f} % of the cards' peak rates in {len(shares)} "
        "runs; for how much of the time any kernel ran is not recorded"
    )
    return Found(text)


def speed_up(document: Document, pairs: list[list[str]]) -> Found:
    """Measured steps without and with one optimisation, by how many percent more of them there are in a time."""
    told, shares = [], []
    for without, with_it in pairs:
        found = [pairs_record(name) for name in (without, with_it)]
        before, after = (float(each.step[0] or 0) if each is not None else 0.0 for each in found)
        assert found[1] is not None and before and after, f"{without} and {with_it} have no seconds"
        shares.append(100 * (before / after - 1))
        told.append(f"{before:.3f} s to {after:.3f} s at {found[1].tokens:,} tokens")
    text = f"{min(shares):.0f} to {max(shares):.0f} % in pairs of recorded runs: {'; '.join(told)}"
    return Found(text, holds="in part")


COMPUTATIONS: Mapping[str, Callable[..., Any]] = {
    each.__name__: each
    for each in (
        optimizer_states,
        checkpointing,
        checkpointing_time,
        unused,
        perplexity,
        first_step,
        peak,
        ran,
        loss_saved,
        rows_filled,
        speed_up,
    )
}
