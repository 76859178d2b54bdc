"""The time of a plan: FLOPs as counted in a real step, a bound that no record is below, sums that add up."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_memory_against_counted import write_config
from test_validation_records import ON_CARDS, plan_of, planned_again
from torch.utils._python_dispatch import TorchDispatchMode

from planner.baseline_work import attention_backward_flops, attention_forward_flops, linear_forward_flops
from planner.calibration import Calibration, calibration
from planner.cli_check import same_settings
from planner.hardware import Sourced, load_profile
from planner.measured import Measured
from planner.plan import Seconds
from planner.planning import Request, make_plan
from planner.rates import rates_of
from planner.report_time import time_facts
from planner.symbols import Letters
from reports.validation.fit import request_of
from trainer.data import synthetic_batch
from trainer.session import build


def time_of_run(name: str, folder: Path) -> Seconds:
    """Seconds of a step as planned today, of as many layers as ran."""
    record = ON_CARDS[name]
    return make_plan(request_of(record, plan_of(record), folder)).time.step_seconds


@pytest.mark.parametrize("name", ON_CARDS)
def test_no_step_on_record_was_faster_than_the_bound(tmp_path: Path, name: str) -> None:
    bound = time_of_run(name, tmp_path).bound
    assert bound is not None
    assert 0 < bound <= ON_CARDS[name]["step_seconds"]["median"]
    assert bound <= min(ON_CARDS[name]["step_seconds"]["each"])


class Products(TorchDispatchMode):
    """Counts the FLOPs of matrix products, a multiply-add being two; attention has kernels of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result, name = func(*args, **(kwargs or {})), func.overloadpacket.__name__
        if name in ("mm", "addmm", "addmm_"):
            left, right = args[-2:]
            self.flops += 2 * left.shape[0] * left.shape[1] * right.shape[1]
        assert name not in ("bmm", "baddbmm", "linear"), name
        return result


@contextmanager
def counted() -> Iterator[Products]:
    with Products() as products:
        yield products


@pytest.mark.parametrize("family", ["phi", "llama", "qwen3"])
@pytest.mark.parametrize("on", [(), ("gradient_checkpointing",)], ids=["every-layer-saved", "checkpointed"])
def test_products_of_a_step_are_those_of_the_formulas(tmp_path: Path, family: str, on: tuple[str, ...]) -> None:
    tokens, target, rank = 192, 64, 4
    plan = make_plan(
        Request(
            gpu="cpu",
            model=f"random:{write_config(family, tmp_path)}",
            total_tokens=tokens,
            target=target,
            required=("lora", "chunked_loss", "exact_attention", *on),
            excluded=tuple(name for name in ("gradient_checkpointing",) if name not in on),
            knobs={"lora": {"rank": rank}, "chunked_loss": {"rows": 32}},
        )
    )
    built = build(plan)
    batch = synthetic_batch(1, tokens, target, built.base.config.vocab_size, 0)
    with counted() as products:
        built.loss(batch, torch.tensor(float(target)), lambda _: None).backward()
    config = built.base.config
    # Of the gradient of the first layer's input nobody has any use: the formula counts it, and autograd does not.
    head = config.hidden_size // config.num_attention_heads if family != "qwen3" else config.head_dim
    read = [(config.num_attention_heads + 2 * config.num_key_value_heads) * head, 3]
    if family == "phi":  # the MLP of a parallel block reads the layer's input too
        read = [read[0] + config.intermediate_size, read[1] + 1]
    spared = 2 * tokens * config.hidden_size * (read[0] + read[1] * rank)
    attention = 4 * config.num_hidden_layers * config.num_attention_heads * head * tokens * (tokens + 1) // 2
    forward = attention * (2 if on else 1)
    phases = plan.time.phases
    told = sum(phase.flops for phase in phases.values()) - forward - attention * 5 // 2
    assert told - spared == products.flops
    assert phases["loss"].flops == 4 * target * config.vocab_size * config.hidden_size


@given(tokens=st.integers(1, 64), heads=st.integers(1, 4), width=st.integers(1, 8), layers=st.integers(1, 3))
def test_attention_counts_every_pair_once(tokens: int, heads: int, width: int, layers: int) -> None:
    letters = Letters(B=2, S=tokens, L=layers, H=heads, E=width, l=0, s=1, e=0)
    pairs = sum(1 for query in range(tokens) for key in range(tokens) if key <= query)
    product = 2 * pairs * heads * width * layers * 2
    assert attention_forward_flops(letters) == 2 * product
    assert attention_backward_flops(letters) == 5 * product


@given(tokens=st.integers(1, 64), window=st.integers(1, 80), banded=st.integers(0, 3))
def test_attention_counts_the_pairs_within_a_window_once(tokens: int, window: int, banded: int) -> None:
    letters = Letters(B=1, S=tokens, L=3, H=1, E=1, l=banded, s=window, e=0)
    seen = [(query, key) for query in range(tokens) for key in range(query + 1)]
    pairs = (3 - banded) * len(seen) + banded * sum(1 for query, key in seen if query - key < window)
    assert attention_forward_flops(letters) == 2 * 2 * pairs
    assert attention_backward_flops(letters) == 5 * 2 * pairs
    letters.e = 1  # stored scores are those of every pair
    assert attention_forward_flops(letters) == 2 * 2 * 3 * len(seen)


@given(tokens=st.integers(1, 10**6), rank=st.integers(1, 256))
def test_linears_are_two_flops_for_each_weight_and_token(tokens: int, rank: int) -> None:
    letters = Letters(B=1, S=tokens, L=3, P=1000, R=rank, U=70, D=8, F=16, X=0, d=0)
    assert linear_forward_flops(letters) == 3 * 2 * tokens * (1000 + 70 * rank)
    letters.X, letters.d = 5, 2  # the scores of all experts, and the three linears of those that a token takes
    assert linear_forward_flops(letters) == 3 * 2 * tokens * (1000 + 5 * 8 + 2 * 3 * 8 * 16 + 70 * rank)


@pytest.mark.parametrize("gpu", ["rtx2060s", "h200-sxm"])
@pytest.mark.parametrize("train", [{}, {"batch": 2, "accumulation": 3}])
@pytest.mark.parametrize("asked", [(), ("streamed",)], ids=["free", "streamed"])
def test_phases_add_up_to_the_step(gpu: str, train: dict[str, Any], asked: tuple[str, ...]) -> None:
    plan = make_plan(Request(gpu=gpu, model="smollm2-135m", total_tokens=4096, train=train, required=asked))
    alone = make_plan(Request(gpu=gpu, model="smollm2-135m", total_tokens=4096, required=asked))
    time, one = plan.time, alone.time
    whole = ["forward", "loss", "backward", "optimizer"]
    passes = ["forward", "attention", "loss", "backward", "attention_backward", "optimizer"]
    assert [*time.phases] == (passes if plan.executor == "streamed" else whole)
    assert plan.executor == "streamed" or not asked
    assert time.step_seconds.estimate == pytest.approx(
        sum(phase.seconds or 0 for phase in time.phases.values()), rel=1e-5
    )
    assert time.step_seconds.bound is not None and time.step_seconds.bound < time.step_seconds.estimate
    sequences = train.get("batch", 1) * train.get("accumulation", 1)
    assert time.tokens_per_second == pytest.approx(sequences * 4096 / time.step_seconds.estimate, rel=1e-4)
    same = [choice.id for choice in plan.choices]
    if "gradient_checkpointing" in same:
        assert time.phases["backward"].flops > time.phases["forward"].flops
    assert time.phases["optimizer"].memory_bytes == one.phases["optimizer"].memory_bytes, "once a step"


def test_checkpoints_in_the_host_cross_the_link_once_each_way() -> None:
    plan = make_plan(Request(required=("checkpoint_offload",), tier=3))
    size = plan.memory.host.terms["activations/checkpoints"]
    assert plan.time.phases["forward"].to_host_bytes == plan.time.phases["backward"].to_device_bytes == size
    assert {"to_host", "to_device"} <= {*plan.time.rates}
    without = make_plan(Request(excluded=("checkpoint_offload", "streamed"), tier=3)).time
    assert all(phase.to_host_bytes == 0 for phase in without.phases.values())
    assert not {"to_host", "to_device"} & {*without.rates}


FOUND = Measured(
    source="a test",
    machine="a test",
    matmul={"fp16": 22e12},
    attention={"efficient": {"fp16": {64: 11e12, 128: 14e12}}},
    memory=3e11,
    to_host=11e9,
    to_device=12e9,
)


def test_measured_rates_come_before_shares_of_the_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    from planner import planning

    card = load_profile("rtx2060s")
    monkeypatch.setattr(planning, "load_profile", lambda _: replace(card, measured=FOUND))
    measured, shipped = make_plan(Request(tier=3)), None
    rates = measured.time.rates
    assert {kind: rate.per_second for kind, rate in rates.items()} == {
        "linear": 22e12,
        "attention": 11e12,  # Phi-2's head size is 80: the next smaller one that was measured
        "memory": 3e11,
        "launch": float(f"{1 / calibration().launch_seconds():.6g}"),  # which nobody measures
    } | ({"to_host": 11e9, "to_device": 12e9} if "to_host" in rates else {})
    assert {rate.basis for kind, rate in rates.items() if kind != "launch"} == {"measured"}
    assert "plan measure" in measured.time.basis
    monkeypatch.undo()
    shipped = make_plan(Request(tier=3))
    assert {rate.basis for rate in shipped.time.rates.values()} == {"assumed"}
    assert measured.time.step_seconds.bound == shipped.time.step_seconds.bound, "no more than the peak was measured"


@settings(max_examples=50)
@given(
    peak=st.none() | st.floats(1e9, 1e15),
    found=st.floats(1e9, 1e15),
    head=st.sampled_from([32, 64, 80, 96, 128, 256]),
)
def test_a_bound_never_goes_by_less_than_was_measured(peak: float | None, found: float, head: int) -> None:
    measured = replace(FOUND, matmul={"fp16": found})
    sheet = Sourced(peak, "a test", "unknown")
    card = replace(load_profile("rtx2060s"), rates={"fp16": sheet}, measured=measured)
    rates = rates_of("efficient", "fp16", head, card, calibration())
    assert rates.likely["linear"] == found
    assert rates.most["linear"] == (None if peak is None else max(peak, found))
    assert rates.likely["attention"] == (14e12 if head >= 128 else 11e12)
    unheard = rates_of("eager", "fp16", head, card, calibration()).likely["attention"]
    share = calibration().attention_share("eager", (7, 5), "fp16", head)["value"]
    assert unheard == pytest.approx(share * (peak or found))


def test_without_any_rate_there_is_no_time_and_the_plan_says_what_finds_it() -> None:
    time = make_plan(Request(gpu="cpu", model="smollm2-135m")).time
    assert time.step_seconds.bound is time.step_seconds.estimate is time.tokens_per_second is None
    assert time.rates == {} and all(phase.seconds is None for phase in time.phases.values())
    assert time.phases["forward"].flops > 0 and "plan measure" in time.basis


def test_short_sequences_wait_for_the_host() -> None:
    """On a card no estimate of a phase is below the launching of its kernels, and short ones take no longer."""
    once = calibration().launch_seconds()
    for total in (64, 65_536):
        plan = make_plan(Request(gpu="h200-sxm", model="qwen2.5-0.5b", total_tokens=total, required=("lora",)))
        for name, phase in plan.time.phases.items():
            floor = once * phase.kernels
            assert phase.kernels and phase.seconds is not None and phase.seconds >= floor * 0.9999, name
            if name in ("forward", "backward", "optimizer"):
                assert (phase.seconds == pytest.approx(floor, rel=0.05)) is (total == 64 or name == "optimizer"), name


@pytest.mark.parametrize(("total", "launch_bound"), [(64, True), (2048, True), (65_536, False)])
@pytest.mark.parametrize("accumulation", [1, 3])
def test_a_step_is_launch_bound_where_the_card_alone_would_take_much_less(
    monkeypatch: pytest.MonkeyPatch, total: int, launch_bound: bool, accumulation: int
) -> None:
    request = Request(gpu="h200-sxm", model="qwen2.5-0.5b", total_tokens=total, train={"accumulation": accumulation})
    found = make_plan(request)
    time = found.time.step_seconds
    assert time.bound is not None and time.estimate is not None and time.on_card is not None
    assert time.bound <= time.on_card <= time.estimate and time.launch_bound is launch_bound
    assert ("Waits for" in {name for name, _ in time_facts(found)}) is launch_bound
    # As the same settings are estimated for a host that launches in no time.
    monkeypatch.setattr(Calibration, "launch_seconds", lambda _: 1e-15)
    without = make_plan(same_settings(found, "h200-sxm")).time.step_seconds
    assert without.estimate == pytest.approx(time.on_card, rel=1e-5) == without.on_card


FURTHER_OFF = {
    "h100-8gib-llama-3.1-70b-16384-streamed": 1.52,  # 381 retries of the allocator in four steps, each some ms long
    # On a machine where phi-2 at 32,768 tokens took 5.91 s, not the 4.87 s on record (others/h100-control-…).
    "h100-8gib-phi-2-32768-blocks": 1.29,
    "h100-8gib-qwen3-1.7b-32768-streamed": 1.31,
    "h100-8gib-mistral-7b-v0.1-32768-streamed": 1.34,
    "h100-8gib-phi-2-131072-disk": 0.53,  # the disk is assumed to be far slower than the one of that machine
}
"""Seconds that were measured over those that are estimated."""
PHASES_OFF = {
    # Waits for the host, which is taken to be a slower one.
    ("h100-8gib-gemma-3-1b-65536-streamed", "forward"): 0.73,
    ("h100-8gib-gemma-3-1b-65536-streamed", "backward"): 0.78,
    ("h100-8gib-llama-3.2-3b-49152-streamed", "forward"): 1.36,  # on the slower machine above
    ("h100-8gib-llama-3.2-3b-49152-streamed", "attention"): 1.22,
    ("h100-8gib-llama-3.1-8b-131072-streamed", "backward"): 1.16,  # why is not known; attention makes up for it
    # At its bound the allocator gives pages back 218 times; windows are faster on an H200 than on an H100.
    ("h200-8gib-mistral-7b-v0.1-32768-streamed", "backward"): 1.17,
    ("h200-8gib-mistral-7b-v0.1-32768-streamed", "attention"): 0.79,
}
OPTIMIZER = "optimizer"  # hundredths of a step, in which the host waits for the norm of the gradients


def test_estimates_of_today_are_near_what_was_measured(tmp_path: Path) -> None:
    """Within 15 hundredths, five runs aside; in the middle within 3; 34 within a tenth."""
    found = {
        name: record["step_seconds"]["median"] / (time_of_run(name, tmp_path).estimate or 0)
        for name, record in ON_CARDS.items()
    }
    off = {name: ratio for name, ratio in found.items() if not 0.85 <= ratio <= 1.15}
    assert off == pytest.approx(FURTHER_OFF, rel=0.03)
    ratios = sorted(found.values())
    assert 0.97 <= ratios[len(ratios) // 2] <= 1.03
    assert sum(0.9 <= ratio <= 1.1 for ratio in ratios) >= 34


def test_estimates_by_phase_are_near_what_was_measured() -> None:
    """Of runs not further off as a whole each phase within 15 hundredths, seven aside; the least is left out."""
    timed = {name: record["step_seconds"].get("phases") for name, record in ON_CARDS.items()}
    found = {
        (name, phase): seconds / (planned_again(name).time.phases[phase].seconds or 0)
        for name, phases in timed.items()
        for phase, seconds in (phases or {}).items()
        if name not in FURTHER_OFF and phase != OPTIMIZER
    }
    assert len(found) >= 25
    off = {place: ratio for place, ratio in found.items() if not 0.85 <= ratio <= 1.15}
    assert off == pytest.approx(PHASES_OFF, rel=0.03)
