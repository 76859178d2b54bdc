"""The command line: exit codes, one JSON object, every mistake at once with the nearest that works."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from cli_fixture import Capture, Patch, mistakes, planning_gives
from plan_fixture import example_plan, too_long_plan

import planner.hardware
import planner.planning
from planner.cli import cli, main
from planner.cli_request import OPTIONS, command_line
from planner.plan import Plan
from planner.planning import Request

ROOT = Path(__file__).resolve().parent.parent


def test_nothing_asked_brings_the_help(capsys: Capture) -> None:
    assert main([]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("Usage: plan ") and err == ""
    assert main(["--help"]) == 0
    assert capsys.readouterr().out == out


@pytest.mark.parametrize(
    ("plan", "code"),
    [(example_plan(), 0), (too_long_plan(), 1)],
    ids=["fits", "does not fit"],
)
@pytest.mark.parametrize("form", [(), ("--json",)], ids=["report", "json"])
def test_the_verdict_is_the_exit_code(monkeypatch: Patch, plan: Plan, code: int, form: tuple[str, ...]) -> None:
    planning_gives(monkeypatch, plan)
    assert main(["--gpu", "rtx2060s", *form]) == code


def test_a_real_plan_as_one_json_object(capsys: Capture) -> None:
    assert main(["--gpu", "rtx2060s", "--tier", "1", "--set", "train.lr=1e-4", "--set", "lora.rank=16", "--json"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    plan = Plan.model_validate_json(out)
    assert (plan.tier, plan.lora_rank, plan.train.lr) == (1, 16, 1e-4)
    assert plan.provenance.command == "plan --gpu rtx2060s --tier 1 --set train.lr=1e-4 --set lora.rank=16"
    assert out.count("\n{") == 0 and json.loads(out)["schema"] == "tierplan/1"


@pytest.mark.parametrize(
    ("arguments", "asked"),
    [
        (("--gpu", "rtx2061s"), ["rtx2061s"]),
        (("--gpu", "nope", "--model", "no/such/thing/here", "--with", "nothing"), ["nothing", "nope", "no/such"]),
        (("--gpu", "rtx2060s", "--without", "lora"), ["--without lora"]),
    ],
)
def test_where_there_is_no_plan_json_says_unknown_and_every_mistake(
    capsys: Capture, arguments: tuple[str, ...], asked: list[str]
) -> None:
    assert main([*arguments, "--json"]) == 2
    out, err = capsys.readouterr()
    document = json.loads(out)
    jsonschema.validate(document, json.loads((ROOT / "planner" / "plan.schema.json").read_text(encoding="utf-8")))
    assert document["schema"] == "tierplan/1" and document["verdict"] == "unknown"
    assert len(document["errors"]) == len(asked) == err.count("error: ")
    assert all(word in error["asked"] for word, error in zip(asked, document["errors"], strict=True))


@pytest.mark.parametrize(
    "option", ["--gpu", "--model", "--data", "--tier", "--context", "--host-ram", "--plan", "--out"]
)
def test_an_empty_value_is_a_mistake_and_no_default(capsys: Capture, option: str) -> None:
    rest = () if option in ("--gpu", "--plan") else ("--gpu", "rtx2060s")
    mistakes(capsys, *rest, option, "")


def test_without_lora_nothing_would_be_trained(capsys: Capture) -> None:
    assert (
        "nothing would be trained: lora makes the adapters" in mistakes(capsys, "--gpu", "cpu", "--without", "lora")[0]
    )


def test_what_is_lacking_is_named(capsys: Capture) -> None:
    without = ("--with", "checkpoint_offload", "--without", "gradient_checkpointing")
    told = mistakes(capsys, "--gpu", "rtx2060s", *without)[0]
    assert "nothing here makes activations/checkpoints" in told and "gradient_checkpointing does" in told


def test_a_real_plan_as_a_report(capsys: Capture) -> None:
    assert main(["--gpu", "2060s"]) == 0
    out = capsys.readouterr().out
    verdict = " ".join(out.partition("\n\n")[0].split())
    assert verdict.startswith("FITS phi-2 on NVIDIA GeForce RTX 2060 SUPER")
    for default in ("host RAM", "no disk offload", "at most 24 h"):
        assert default in verdict
    assert "is recorded" in out, "the verdict of a card never measured says so"


def test_a_real_plan_that_does_not_fit_says_what_does(capsys: Capture) -> None:
    assert main(["--gpu", "rtx2060s", "--tier", "11"]) == 1
    out = capsys.readouterr().out
    assert out.startswith("DOES NOT FIT")
    assert out.index("The nearest that works") < out.index("In short")
    suggested = re.search(r"--context (\d+) --set train.target=(\d+)", " ".join(out.split()))
    if suggested:
        again = ["--gpu", "rtx2060s", *shlex.split(suggested.group(0)), "--set", "lora.rank=2"]
        assert main(again) == 0, "what is suggested fits"


def test_options_become_the_request(monkeypatch: Patch) -> None:
    requests = planning_gives(monkeypatch, example_plan())
    words = "--gpu h200-sxm --model llama-3.1-8b --context 128K --objective speed"
    words += " --host-ram 64GiB --max-step-time 10m --with nf4_weights --with lora"
    words += " --without adamw_8bit --set lora.rank=4 --set train.target=2K"
    assert main([*words.split(), "--data", "a folder"]) == 0
    (request,) = requests
    assert request == Request(
        gpu="h200-sxm",
        model="llama-3.1-8b",
        total_tokens=131072,
        target=2048,
        objective="speed",
        host_bytes=64 * 2**30,
        max_step_seconds=600.0,
        required=("nf4_weights", "lora"),
        excluded=("adamw_8bit",),
        knobs={"lora": {"rank": 4}},
        train={"data": "a folder"},
        command=f"plan {words} --data 'a folder'",
    )


def test_the_recorded_command_gives_the_same_options_again() -> None:
    options: dict[str, Any] = {
        "gpu": "a b.yaml",
        "model": "org/x",
        "context": "1K",
        "set_": ("lora.rank=4", "train.lr=1"),
    }
    context = cli.make_context("plan", shlex.split(command_line(options))[1:], resilient_parsing=True)
    again = {name: value for name, value in context.params.items() if name in OPTIONS and value}
    assert again == options


def test_every_mistake_is_told_at_once(capsys: Capture, tmp_path: Path) -> None:
    wrong = "--gpu rtx2060x --model phi2 --tier 99 --objective contxt --host-ram 8G --max-step-time 1y"
    wrong += " --set lora.rnk=3 --set trian.lr=1 --set train.lr=fast"
    lines = mistakes(capsys, *wrong.split(), "--out", str(tmp_path / "no" / "plan.yaml"))
    assert all(line.startswith("error: ") for line in lines)
    expected = [
        "--set lora.rnk=3: lora has no knob 'rnk'. Did you mean rank?",
        "--set trian.lr=1: no optimisation is called 'trian'. Did you mean train?",
        "--set train.lr=fast: 'fast' is not a number.",
        "--tier 99: tiers are whole numbers from 1 to 11.",
        "--objective contxt: is no objective. Did you mean context?",
        "--host-ram 8G: could be 8 GB",
        "--max-step-time 1y: has the unit 'y'",
        f"--out {tmp_path / 'no' / 'plan.yaml'}: there is no folder {tmp_path / 'no'}.",
        "Did you mean rtx2060 or rtx2060s",
        "model 'phi2'",
    ]
    assert len(lines) == len(expected)
    for part in expected:
        assert any(part in line for line in lines), part


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ("--gpuu rtx2060s", "Did you mean '--gpu'?"),
        ("gpux", "Did you mean 'gpus'?"),
        ("--gpu rtx2060s --with chunkd_loss", "Did you mean chunked_loss?"),
        ("--gpu rtx2060s --without lorra", "Did you mean lora or rslora or lora_plus?"),
        ("explain chunkd_loss", "Did you mean chunked_loss"),
        ("explain", "Missing argument 'NAME'"),
        ("--gpu rtx2060s --with lora --without lora", "--with lora --without lora: asks for both. Drop one."),
        ("--gpu rtx2060s --tier 1 --context 4K", "--tier with --context"),
        ("--gpu rtx2060s --tier 1.5", "tiers are whole numbers from 1 to 11"),
        ("--gpu rtx2060s --tier ٣", "tiers are whole numbers from 1 to 11"),
        ("--gpu rtx2060s --context 12X", "ends in 'x'"),
        ("--gpu rtx2060s --context ''", "--context '': is empty."),
        ("--gpu rtx2060s --data a --set train.data=b", "name two places"),
        ("--gpu rtx2060s --gpu rtx4090", "--gpu rtx2060s --gpu rtx4090: takes one value. Keep one of them."),
        ("--gpu rtx2060s --tier 3 --tier 4", "--tier 3 --tier 4: takes one value"),
        ("--gpu rtx2060s --out a --out b", "--out a --out b: takes one value"),
        ("check a.yaml --gpu rtx2060s --gpu rtx4090", "takes one value"),
        ("matrix --host-ram 8GiB --host-ram 9GiB", "--host-ram 8GiB --host-ram 9GiB: takes one value"),
        ("--gpu rtx2060s --set lora.rank=4 --set lora.rank=8", "gives lora.rank two values"),
        ("--gpu rtx2060s --set train.lr=1 --set train.lr=2", "gives train.lr two values"),
        ("--gpu rtx2060s --set exact_attention.kernel=flsh", "is no kernel. Did you mean flash?"),
        (
            "--gpu rtx2060s --set exact_attention.kernel=flash",
            "not to be had for phi-2 on NVIDIA GeForce RTX 2060 SUPER.",
        ),
        ("--gpu rtx2060s --set lora.alpha=-1", "must be from 0 to 65,536"),
        ("--gpu rtx2060s --set train.seed=-3", "must be greater than or equal to 0"),
        ("--gpu rtx2060s --set train.lr=-1", "must be greater than 0"),
        ("--gpu rtx2060s --set lora.rank=4.5", "'4.5' is not a whole number"),
        (f"--gpu rtx2060s --set lora.rank=1{20 * '0'}", "is larger than any number may be"),
        (f"--gpu rtx2060s --set train.seed=1{5000 * '0'}", "is larger than any number may be"),
        (
            "--gpu rtx2060s --set chunked_loss.rows=9 --without chunked_loss",
            "--set chunked_loss.rows=9 --without chunked_loss: chunked_loss is switched off",
        ),
        ("--tier 3 --json", "plan --tier: names no card. Add --gpu ID"),
        ("--gpu rtx4090 gpus", "options come after it"),
        ("--plan a.yaml --gpu x --tier 2", "a plan file is complete already. Drop --tier"),
        ("--plan /nonexistent.yaml", "cannot be read"),
        ("--plan /etc/hostname", "plan file /etc/hostname"),
        ("check /nonexistent.yaml", "cannot be read"),
        ("--gpu rtx2060s --execute", "there is nothing to train on"),
        ("--gpu rtx2060s --resume", "goes on with a run, and nothing here runs one"),
        ("--gpu rtx2060s --replan", "is for a run that takes more than was planned, and nothing here runs one"),
        ("--gpu rtx2060s --execute --data /nonexistent", "there is no such file or folder"),
        ("--gpu rtx2060s --execute --json --data /tmp", "--json prints one object and nothing else"),
        ("--gpu rtx2060s --out -", "is no file name here"),
        ("--gpu rtx2060s --out /tmp", "is a folder"),
        ("--gpu rtx2060s --out /dev/null", "is not an ordinary file"),
        ("--gpu rtx2060s --out /dev/null/plan.yaml", "/dev/null is no folder"),
        ("--gpu rtx2060s --out ''", "--out '': is empty"),
        ("--gpu rtx2060s --host-ram ''", "--host-ram '': is empty"),
        ("--gpu rtx2060s --with ''", "--with '': no optimisation has that name"),
        ("measure --gpu ''", "--gpu '': is empty"),
        ("--gpu rtx2060s --with flash", "It is a kernel of exact_attention: --set exact_attention.kernel=flash."),
        ("--gpu rtx2060s --with packing", "Did you mean sequence_packing?"),
        ("--gpu rtx2060s --with gradient-checkpointing", "Did you mean gradient_checkpointing?"),
        ("--gpu rtx2060s --set train.target=99999999", "is more than the 4,718,592 tokens of tier 11"),
        ("--gpu rtx2060s --max-step-time 0", "--max-step-time 0: leaves no time"),
        ("--gpu LOCAL", "Did you mean local"),
        ("--gpu /tmp", "Name the file of one card"),
    ],
)
def test_a_mistake_is_explained(capsys: Capture, arguments: str, told: str) -> None:
    assert told in "\n".join(mistakes(capsys, *shlex.split(arguments)))


def test_a_clash_is_told_once_however_much_two_optimisations_share(capsys: Capture) -> None:
    told = mistakes(capsys, *shlex.split("--gpu rtx2060s --with streamed --with gradient_checkpointing"))
    (clash,) = [line for line in told if line.startswith("error")]
    assert "--with gradient_checkpointing --with streamed: both claim " in clash and " more. Keep one" in clash


def test_a_fact_that_a_card_of_ones_own_lacks_belongs_into_its_own_file(capsys: Capture, tmp_path: Path) -> None:
    shipped = (ROOT / "hwprofiles" / "rtx2060s.yaml").read_text(encoding="utf-8")
    card = tmp_path / "rtx2060s.yaml"
    card.write_text(shipped.replace("  value: 621 MiB\n", "  value: unknown\n  why: nobody looked\n"), encoding="utf-8")
    (told,) = mistakes(capsys, "--gpu", str(card))
    assert "unknown: cuda_context: nobody looked. Write your card's own figure into" in told and str(card) in told
    assert main(["matrix", "--gpu", str(card), "--model", "phi-2"]) == 2
    told = "".join(capsys.readouterr().out.split())  # a long path is broken anywhere
    assert f"{card}withphi-2:unknown:cuda_context:nobodylooked." in told


def test_a_disk_that_nothing_uses_is_warned_of(capsys: Capture) -> None:
    assert main(shlex.split("--gpu rtx2060s --tier 1 --disk 200GB --without streamed --json")) == 0
    warnings = json.loads(capsys.readouterr().out)["warnings"]
    assert any("--disk 186.26 GiB has no effect: checkpoint_disk" in each for each in warnings)


def test_the_same_value_given_twice_is_no_mistake_and_several_are_told_together(capsys: Capture) -> None:
    again = ["--gpu", "rtx2060s", "--gpu", "rtx2060s", "--tier", "1", "--set", "lora.rank=4", "--set", "lora.rank=4"]
    assert main([*again, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["lora_rank"] == 4
    told = mistakes(capsys, *["--gpu", "a", "--gpu", "b", "--tier", "3", "--tier", "4", "--set", "lora.rnk=3"])
    assert len([line for line in told if "takes one value" in line]) == 2
    assert any("Did you mean rank?" in line for line in told)


def test_a_knob_of_what_is_off_is_warned_of(capsys: Capture) -> None:
    words = "--gpu cpu --model smollm2-135m --context 512 --set mixed_precision.dtype=float16 --json"
    assert main(words.split()) == 0
    (line,) = [line for line in json.loads(capsys.readouterr().out)["warnings"] if line.startswith("--set")]
    assert line.startswith("--set mixed_precision.dtype=float16 has no effect: mixed_precision is off (")


def test_a_mistake_of_ours_is_no_traceback_and_no_verdict(monkeypatch: Patch, capsys: Capture) -> None:
    def fail(_: Request) -> Plan:
        raise AssertionError("two and two is five")

    monkeypatch.setattr(planner.planning, "make_plan", fail)
    lines = mistakes(capsys, "--gpu", "rtx2060s")
    assert lines[0] == "error: tierplan made a mistake: AssertionError: two and two is five"
    kept = Path(lines[1].rpartition(" ")[2].rstrip("."))
    assert "two and two is five" in kept.read_text() and "Traceback" in kept.read_text()
    kept.unlink()


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (KeyboardInterrupt(), 130),
        (PermissionError(13, "Permission denied", "/x"), 2),
        (BrokenPipeError(), 141),
    ],
)
def test_other_endings(monkeypatch: Patch, capsys: Capture, error: BaseException, code: int) -> None:
    def fail(_: Request) -> Plan:
        raise error

    monkeypatch.setattr(planner.planning, "make_plan", fail)
    assert main(["--gpu", "rtx2060s"]) == code
    assert "Traceback" not in capsys.readouterr().err


def process(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "planner", *arguments],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        encoding="utf-8",
    )


def test_python_m_planner_is_plan() -> None:
    done = process("--version")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("tierplan ")
    assert process("--gpuu").returncode == 2


def test_no_color_means_plain_even_where_colour_is_forced() -> None:
    assert "\x1b" in process("gpus", FORCE_COLOR="1", NO_COLOR="", TERM="xterm").stdout
    assert "\x1b" not in process("gpus", FORCE_COLOR="1", NO_COLOR="1", TERM="xterm").stdout


def test_a_terminal_without_utf8_gets_an_answer_and_json_stays_utf8() -> None:
    words = ("--gpu", "rtx2060s", "--tier", "1")
    done = process(*words, PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stderr) == (0, "") and "####" in done.stdout
    assert process(*words, "--json", PYTHONIOENCODING="ascii").stdout == process(*words, "--json").stdout


def test_a_closed_output_leaves_the_exit_code(monkeypatch: Patch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    assert main(["gpus"]) == 0
    sys.stdout.close()


def test_a_reader_that_stops_reading_is_no_error() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    try:
        command = [sys.executable, "-m", "planner", "gpus"]
        done = subprocess.run(command, cwd=ROOT, stdout=writing, stderr=subprocess.PIPE, text=True)
    finally:
        os.close(writing)
    assert (done.returncode, done.stderr) == (141, "")
