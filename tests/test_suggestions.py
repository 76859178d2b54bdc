"""What a refused plan suggests: each change is planned again, and comes to what was said."""

from __future__ import annotations

import re

import pytest
from cli_fixture import pairs_of, planned

from planner.hardware import HardwareProfile
from planner.units import format_bytes, parse_bytes

PINNED = "--gpu rtx2060s --context 48K --without streamed --without chunked_loss --with adamw_8bit"
REFUSED = (
    "--gpu rtx2060s --context 4M",
    "--gpu rtx2060s --tier 11",
    "--gpu h200-sxm --model qwen3-1.7b --tier 10",
    "--gpu rtx4090 --model llama-3.1-8b --context 1M",
    "--gpu rtx2060s --context 24K --host-ram 2GiB",
    "--gpu rtx3060-12gb --tier 6 --host-ram 3GiB",
    "--gpu rtx2060s --context 8K --max-step-time 1s",
    "--gpu rtx4090 --model llama-3.2-1b --tier 3 --max-step-time 2s --set train.accumulation=16",
    "--gpu rtx4090 --model llama-3.2-1b --context 64K --max-step-time 5s --host-ram 2GiB",
    "--gpu rtx2060s --context 16K --without gradient_checkpointing --without streamed",
    "--gpu rtx2060s --model llama-3.2-1b --context 4M --set train.target=3M --objective memory",
    "--gpu rtx2060s --model llama-3.1-8b --max-step-time 0.1s",
    "--gpu rtx2060s --context 1K --set lora.rank=1024",
    "--gpu rtx3060-12gb --model llama-3.1-8b --tier 1 --set lora.rank=700",
    "--gpu rtx2060s --context 8K --set train.batch=16 --without streamed",
    PINNED,
    "--gpu rtx2060s --model llama-3.2-1b --context 512K --with weight_averaging --set weight_averaging.kind=ema "
    "--without streamed",
    "--gpu rtx2060s --context 40K --set chunked_loss.rows=1048576",
    "--gpu cpu --model smollm2-135m --context 512K --host-ram 2GiB",
    "--gpu cpu --model llama-3.2-1b --tier 11 --host-ram 8GiB",
)


@pytest.mark.parametrize("words", REFUSED)
def test_what_a_refused_plan_suggests_fits_as_it_is_written(words: str) -> None:
    plan = planned(words)
    assert plan.verdict == "does-not-fit" and plan.nearest
    for line in plan.nearest:
        suggested, told, effect = line.partition(" fits: ")
        assert bool(told) is line.startswith(("--", "leaving out "))
        if line.startswith("leaving out "):
            left_out = re.findall(r"--\w+ \S+", suggested)
            pairs = [f"{option} {value}" for option, value in pairs_of(words)]
            assert {*left_out} <= {*pairs}
            again = planned(" ".join(pair for pair in pairs if pair not in left_out))
        else:
            # A length stands in the place of a tier, and says itself how much of it is trained.
            kept = re.sub(r"--tier \S+|--set train.target=\S+", "", words) if "--context" in suggested else words
            again = planned(f"{kept} {suggested}") if told else plan
        assert again.verdict == "fits" or not told, line
        if " on the card, " in effect:
            high = format_bytes(again.memory.gpu.peak_bytes.high)
            assert re.search(rf"(^|; ){re.escape(high)} of ", effect), "what it comes to is planned"


@pytest.mark.parametrize("words", [words for words in REFUSED if "lora.rank" in words or "train.batch" in words])
def test_no_larger_rank_and_no_larger_batch_fits_than_is_suggested(words: str) -> None:
    (line,) = [line for line in planned(words).nearest if line.startswith(("--set lora.rank=", "--set train.batch="))]
    option, value = line.partition(" fits: ")[0].split("=")
    assert planned(f"{words} {option}={int(value) + 1}").verdict == "does-not-fit"


def test_what_is_left_out_is_no_more_than_it_takes() -> None:
    (line,) = [line for line in planned(PINNED).nearest if line.startswith("leaving out ")]
    assert line.startswith("leaving out --without chunked_loss fits: ")
    others = [f"{option} {value}" for option, value in pairs_of(PINNED) if value != "chunked_loss"]
    assert len(others) > 3
    for pair in others:
        if not pair.startswith(("--gpu", "--tier", "--context")):
            assert planned(PINNED.replace(pair, "")).verdict == "does-not-fit", pair


def test_all_kinds_of_suggestion_are_among_the_refused() -> None:
    lines = [line.split()[0] for words in REFUSED for line in planned(words).nearest]
    assert {"--context", "--host-ram", "--max-step-time", "--set", "leaving"} <= {*lines}


@pytest.mark.parametrize("words", [words for words in REFUSED if "--gpu cpu" not in words])
def test_what_more_memory_is_said_to_do_it_does(words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (line,) = [line for line in planned(words).nearest if "more memory" in line] or [""]
    if "would fit" in line:
        more = int(1.01 * parse_bytes(line.partition(" more memory")[0].replace(",", "")))  # it is rounded for people
        own = HardwareProfile.budget_bytes
        monkeypatch.setattr(HardwareProfile, "budget_bytes", lambda card: (own(card) or 0) + more)
        with_it = planned.__wrapped__(f"{words} {line.partition(', with ')[2]}")
        assert with_it.verdict == "fits", f"{line}; with it: {with_it.nearest}"


def test_the_target_that_is_asked_for_is_kept_where_no_tier_fits() -> None:
    plan = planned("--gpu rtx2060s --model llama-3.1-8b --max-step-time 1s --set train.target=100")
    assert plan.verdict == "fits" and plan.tier is None
    assert plan.target == 100


@pytest.mark.parametrize("knob", ["exact_attention.kernel=efficient", "checkpoint_spacing.every=2"])
def test_a_disk_is_offered_whatever_knob_is_pinned(knob: str) -> None:
    """Also where the knob is one of an optimisation that no set with a disk holds."""
    plan = planned(f"--gpu rtx2060s --tier 8 --set {knob}")
    assert plan.verdict == "does-not-fit"
    (told,) = [line for line in plan.nearest if line.startswith("--disk ")]
    size = told.split()[1]
    assert planned(f"--gpu rtx2060s --tier 8 --set {knob} --disk {size}").verdict == "fits"
