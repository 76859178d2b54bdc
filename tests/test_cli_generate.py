"""`plan generate`: what is planned for it, what it writes, and what it says of what cannot be."""

from __future__ import annotations

import io
import json
import os
import pty
import subprocess
import sys
from bisect import bisect_left
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from trainer_tiny import make_plan, save_model, write_sources

from planner.cli import main
from planner.errors import PlanError
from planner.generating import CHUNKS, EXACT, KEEPINGS, Keeping, choose, generation, longest_prompt
from planner.optimizations.base import Situation
from planner.plan import Plan
from planner.planning import Request, read_gpu, read_model
from planner.planning import make_plan as planned
from trainer.run import execute


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run."""
    place = tmp_path_factory.mktemp("generate")
    save_model("llama", place / "model")
    write_sources(place / "data")
    options: dict[str, Any] = {"steps": 25, "lr": 5e-2, "data": str(place / "data"), "out": str(place / "run")}
    choices: dict[str, dict[str, Any]] = {"lora": {"rank": 4, "alpha": 8}, "exact_attention": {"kernel": "cpu"}}
    assert execute(make_plan(place / "model", choices=choices, **options)) == 0
    return place / "run"


def answer(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    """What `plan generate --json` says."""
    capsys.readouterr()
    assert main(["generate", *words, "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_it_writes_on(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main(["generate", str(run), "def add(", "--tokens", "9"]) == 0
    told = capsys.readouterr()
    assert told.out.startswith("def add(") and len(told.out) > len("def add(\n")
    assert "9 to write at most" in told.err and "a second" in told.err
    again = answer(capsys, str(run), "def add(", "--tokens", "9")
    assert told.out == f"def add({again['written']['text']}\n"
    assert again["cache"] == "card" and again["new_tokens"] == 9
    assert again["gpu"]["peak_bytes"] == sum(again["gpu"]["terms"].values())


def test_what_it_is_kept_in_changes_nothing(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = [answer(capsys, str(run), "class Counter", "--cache", each)["written"]["text"] for each in EXACT]
    assert texts[0] == texts[1]


def test_adapter_and_draws_matter(run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    def text(*words: str) -> str:
        return str(answer(capsys, str(run), "def add(", "--tokens", "24", *words)["written"]["text"])

    assert text() != text("--base")
    drawn = [text("--temperature", "5", "--seed", seed) for seed in ("1", "1", "2")]
    assert drawn[0] == drawn[1] != drawn[2]
    (tmp_path / "prompt.txt").write_text("def add(", encoding="utf-8")
    capsys.readouterr()
    assert main(["generate", str(run), "--file", str(tmp_path / "prompt.txt"), "--tokens", "24", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["written"]["text"] == text()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "has no prompt"),
        (["x", "--prompt-tokens", "8"], "are 2 prompts"),
        ([""], "has no tokens"),
        (["x", "--tokens", "0"], "is no number of tokens"),
        (["x", "--tokens", "ten"], "ten"),
        (["x", "--cache", "cards"], "is no way to keep keys and values. Did you mean card?"),
        (["x", "--temperature", "-1"], "is no number from 0 to 100"),
        (["x", "--temperature", "nan"], "is no number from 0 to 100"),
        (["x", "--temperature", "1", "--top-p", "0"], "is no number above 0"),
        (["x", "--temperature", "1e-40"], "is too little"),
        (["x", "--temperature", "1", "--seed", "-3"], "is no whole number"),
        (["x", "--top-p", "0.9", "--seed", "3"], "has no part in it: at temperature 0 nothing is drawn"),
        (["\udcff"], "is no text in UTF-8"),
        (["x", "--chat"], "has no chat template"),
        (["--file", "/not/here"], "cannot be read as text"),
        (["--prompt-tokens", "32M"], "The longest prompt that fits has"),
    ],
)
def test_what_cannot_be_is_told_in_a_sentence(
    words: list[str], told: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert main(["generate", str(run), *words]) == 2
    said = capsys.readouterr()
    assert said.err.startswith("error: ") and told in said.err and not said.out


def test_standard_input_is_text(run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def given(text: bytes) -> int:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text)))
        return main(["generate", str(run), "--file", "-", "--tokens", "3"])

    capsys.readouterr()
    assert given(b"def add(") == 0 and capsys.readouterr().out.startswith("def add(")
    assert given(b"\xff\xfe\x00") == 2 and "cannot be read as text" in capsys.readouterr().err


def test_an_adapter_that_is_another_is_refused(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By its names, and by what it makes of the model."""
    (tmp_path / "adapter").mkdir()
    (tmp_path / "plan.yaml").write_text((run / "plan.yaml").read_text(encoding="utf-8"), encoding="utf-8")
    own = load_file(run / "adapter" / "adapter_model.safetensors")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file({name.replace("layers.0", "layers.9"): value for name, value in own.items()}, file)
    assert main(["generate", str(tmp_path), "x", "--tokens", "2"]) == 2
    assert "does not fit the plan's model" in capsys.readouterr().err
    save_file({name: value * float("nan") for name, value in own.items()}, file)
    assert main(["generate", str(tmp_path), "x", "--tokens", "2"]) == 2
    assert "is no number; the adapter may be broken" in capsys.readouterr().err
    file.write_bytes(b"nothing")
    assert main(["generate", str(tmp_path), "x", "--tokens", "2"]) == 2
    assert "cannot be read" in capsys.readouterr().err


TERMINAL = """
from planner.cli_generate import _reading, _say
with _reading(1000) as (read, stop):
    read(500)
    stop()
    for piece in ("def f(", "a, ", "b):"):
        _say(piece)
        import time; time.sleep(0.25)
"""


def test_nothing_that_is_written_is_wiped_off_a_terminal() -> None:
    """The bar of the prompt is redrawn ten times a second, over the line on which it stands."""
    ours, theirs = pty.openpty()
    done = subprocess.run([sys.executable, "-c", TERMINAL], stdout=theirs, stderr=theirs, check=False)
    os.close(theirs)
    shown = os.read(ours, 65536).decode()
    os.close(ours)
    assert done.returncode == 0 and "reading" in shown and shown.endswith("def f(a, b):")


def test_only_a_finished_run_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", str(tmp_path), "x"]) == 2
    assert "not the folder of a finished run" in capsys.readouterr().err


CARD, MODEL = "rtx2060s", "llama-3.2-1b"


@pytest.fixture(scope="module")
def small() -> tuple[Plan, Situation]:
    """A plan of a small card, and what it is for."""
    plan = planned(Request(CARD, MODEL))
    return plan, Situation(read_gpu(CARD), read_model(MODEL), plan.memory.host.budget_bytes)


@settings(max_examples=60, deadline=None)
@given(
    prompt=st.integers(1, 10**6),
    new=st.integers(1, 10**5),
    more=st.integers(1, 10**5),
    keeping=st.sampled_from(KEEPINGS),
)
def test_longer_takes_no_less(
    prompt: int, new: int, more: int, keeping: Keeping, small: tuple[Plan, Situation]
) -> None:
    plan, situation = small
    found = generation(plan, situation, prompt, new, keeping)
    for other in ((prompt + more, new), (prompt, new + more)):
        longer = generation(plan, situation, *other, keeping)
        assert longer.expected >= found.expected and longer.host_high >= found.host_high
    assert all(size > 0 for size in (*found.card.values(), *found.host.values()))


@pytest.mark.parametrize("keeping", KEEPINGS)
def test_the_longest_prompt_is_the_longest(keeping: Keeping, small: tuple[Plan, Situation]) -> None:
    plan, situation = small
    most = longest_prompt(plan, situation, 256, keeping)
    assert generation(plan, situation, most, 256, keeping).fits
    assert not generation(plan, situation, most + 1, 256, keeping).fits


def test_where_the_card_has_no_room_the_host_is_taken(small: tuple[Plan, Situation]) -> None:
    plan, situation = small
    on_card = longest_prompt(plan, situation, 256, "card")
    assert choose(plan, situation, on_card, 256).keeping == "card"
    found = choose(plan, situation, on_card + 1, 256)
    assert found.keeping == "host" and "attention/cache" in found.host and "attention/cache" not in found.card
    with pytest.raises(PlanError, match="The longest prompt that fits has"):
        choose(plan, situation, 2**26, 256)
    with pytest.raises(PlanError, match="with --cache host"):
        choose(plan, situation, on_card + 1, 256, "card")


def test_prompts_are_read_by_the_largest_pieces_that_fit(small: tuple[Plan, Situation]) -> None:
    plan, situation = small
    assert choose(plan, situation, 20_000, 256).chunk == CHUNKS[0] > CHUNKS[-1]
    assert choose(plan, situation, 100, 256).chunk == 100
    most = {chunk: _longest_by(plan, situation, chunk) for chunk in CHUNKS}
    assert [*most.values()] == sorted(most.values()) and len({*most.values()}) == len(CHUNKS)
    for chunk, less in pairwise(CHUNKS):
        assert choose(plan, situation, most[chunk], 256, "card").chunk == chunk
        assert choose(plan, situation, most[chunk] + 1, 256, "card").chunk == less
    on_cpu = planned(Request("cpu", "smollm2-135m", total_tokens=512))
    there = Situation(read_gpu("cpu"), read_model("smollm2-135m"), on_cpu.memory.host.budget_bytes)
    assert choose(on_cpu, there, 20_000, 256).chunk == CHUNKS[-1], "there are no launches, and no link"


def _longest_by(plan: Plan, situation: Situation, chunk: int) -> int:
    fits = range(2**24)
    return bisect_left(fits, True, key=lambda size: not generation(plan, situation, size, 256, "card", chunk).fits) - 1


def test_a_prompt_of_windows_takes_less_time() -> None:
    """A layer with a window sees so many tokens, and no more."""
    seconds = []
    for model in ("mistral-7b-v0.1", "mistral-7b-v0.3"):
        plan = planned(Request("h200-sxm", model, total_tokens=8192))
        situation = Situation(read_gpu("h200-sxm"), read_model(model), plan.memory.host.budget_bytes)
        seconds.append(generation(plan, situation, 131_072, 1, "card", 4096).prompt_seconds or 0.0)
    assert 0 < seconds[0] < 0.6 * seconds[1]


def test_eight_bits_take_half(small: tuple[Plan, Situation]) -> None:
    """A byte for two, and four for each head of a token."""
    plan, situation = small
    whole, half = (generation(plan, situation, 10_000, 1, each) for each in ("card", "int8"))  # type: ignore[arg-type]
    size = situation.model.head_size
    kept = half.card["attention/cache"] + half.card["attention/cache_scales"]
    assert kept == whole.card["attention/cache"] * (size + 4) // (2 * size)


def test_a_window_is_all_that_is_kept() -> None:
    plan = planned(Request("rtx3090", "mistral-7b-v0.1", total_tokens=8192))
    situation = Situation(read_gpu("rtx3090"), read_model("mistral-7b-v0.1"), plan.memory.host.budget_bytes)
    kept = [generation(plan, situation, tokens, 1, "card").card["attention/windows"] for tokens in (8_000, 200_000)]
    assert kept[0] == kept[1] > 0


def test_learned_positions_are_no_more_than_there_are() -> None:
    plan = planned(Request("rtx3090", "gpt2", total_tokens=512))
    situation = Situation(read_gpu("rtx3090"), read_model("gpt2"), plan.memory.host.budget_bytes)
    with pytest.raises(PlanError, match="1,024 positions that gpt2 has learned"):
        choose(plan, situation, 1000, 25)


def test_a_model_all_windows_keeps_nothing_elsewhere() -> None:
    plan = planned(Request("rtx3090", "mistral-7b-v0.1", total_tokens=8192))
    situation = Situation(read_gpu("rtx3090"), read_model("mistral-7b-v0.1"), plan.memory.host.budget_bytes)
    for keeping in ("host", "int8"):
        with pytest.raises(PlanError, match="has a window, and keeps that as it is"):
            choose(plan, situation, 8_000, 10, keeping)  # type: ignore[arg-type]
    assert choose(plan, situation, 2**25, 10).keeping == "card", "nothing of it grows with the prompt"


def test_a_card_without_bfloat16_generates_with_phi() -> None:
    """Whose scores float16 would not reach, were they stored as in training without a kernel."""
    plan = planned(Request("rtx2060s", "phi-2"))
    situation = Situation(read_gpu("rtx2060s"), read_model("phi-2"), plan.memory.host.budget_bytes)
    found = generation(plan, situation, 1024, 64, "card")
    assert found.fits and {choice.id for choice in plan.choices} >= {"mixed_precision", "streamed"}
