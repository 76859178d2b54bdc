"""The command line: exit codes, one JSON object, every mistake at once with the nearest thing that works."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from plan_fixture import document, example_plan, too_long_plan

import planner.hardware
import planner.planning
from planner.cli import cli, main
from planner.cli_output import write_plan
from planner.cli_request import OPTIONS, command_line
from planner.errors import PlanError
from planner.plan import Plan, json_schema, load_plan
from planner.planning import Request, make_plan

ROOT = Path(__file__).resolve().parent.parent
Capture = pytest.CaptureFixture[str]
Patch = pytest.MonkeyPatch


@pytest.fixture
def planned(monkeypatch: Patch) -> Callable[[Plan], list[Request]]:
    """Let planning give this plan; gives the requests it was asked for."""

    def give(plan: Plan) -> list[Request]:
        requests: list[Request] = []
        monkeypatch.setattr(
            planner.planning, "make_plan", lambda request: (requests.append(request), plan)[1]
        )
        return requests

    return give


def trainer_that(monkeypatch: Patch, act: Callable[[Plan], int]) -> None:
    """Put a trainer in place that does this."""
    module = ModuleType("trainer.run")
    module.execute = act  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "trainer.run", module)


def mistakes(capsys: Capture, *arguments: str) -> list[str]:
    """What a command that is given wrongly says, line by line; it exits with 2 and prints nothing else."""
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ") and "Traceback" not in err
    return err.splitlines()


# --- Answers ------------------------------------------------------------


def test_nothing_asked_brings_the_help(capsys: Capture) -> None:
    assert main([]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("Usage: plan ") and err == ""
    assert main(["--help"]) == 0
    assert capsys.readouterr().out == out


@pytest.mark.parametrize(
    ("plan", "code"),
    [(example_plan(), 0), (too_long_plan(), 1), (example_plan(verdict="unknown"), 2)],
    ids=["fits", "does not fit", "unknown"],
)
@pytest.mark.parametrize("form", [(), ("--json",)], ids=["report", "json"])
def test_the_verdict_is_the_exit_code(planned: Any, plan: Plan, code: int, form: tuple[str, ...]) -> None:
    planned(plan)
    assert main(["--gpu", "rtx2060s", *form]) == code


def test_a_real_plan_as_one_json_object(capsys: Capture) -> None:
    assert (
        main(
            ["--gpu", "rtx2060s", "--tier", "1", "--set", "train.lr=1e-4", "--set", "lora.rank=16", "--json"]
        )
        == 0
    )
    out, err = capsys.readouterr()
    assert err == ""
    plan = Plan.model_validate_json(out)
    assert (plan.tier, plan.lora_rank, plan.train.lr) == (1, 16, 1e-4)
    assert plan.provenance.command == "plan --gpu rtx2060s --tier 1 --set train.lr=1e-4 --set lora.rank=16"
    assert out.count("\n{") == 0 and json.loads(out)["schema"] == "tierplan/1"


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


def test_options_become_the_request(planned: Any) -> None:
    requests = planned(example_plan())
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


# --- Mistakes ------------------------------------------------------------


def test_every_mistake_is_told_at_once(capsys: Capture, tmp_path: Path) -> None:
    wrong = "--gpu rtx2060 --model phi2 --tier 99 --objective contxt --host-ram 8G --max-step-time 1y"
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
        "Did you mean rtx2060s",
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
        ("--gpu rtx2060s --without lorra", "Did you mean lora?"),
        ("explain chunkd_loss", "Did you mean chunked_loss"),
        ("explain", "Missing argument 'NAME'"),
        ("--gpu rtx2060s --with lora --without lora", "--with lora --without lora: asks for both. Drop one."),
        ("--gpu rtx2060s --tier 1 --context 4K", "--tier with --context"),
        ("--gpu rtx2060s --tier 1.5", "tiers are whole numbers from 1 to 11"),
        ("--gpu rtx2060s --tier ٣", "tiers are whole numbers from 1 to 11"),
        ("--gpu rtx2060s --context 12X", "ends in 'x'"),
        ("--gpu rtx2060s --context ''", "--context : is empty."),
        ("--gpu rtx2060s --data a --set train.data=b", "name two places"),
        ("--tier 3 --json", "plan --tier: names no card. Add --gpu ID"),
        ("--gpu rtx4090 gpus", "options come after it"),
        ("--plan a.yaml --gpu x --tier 2", "a plan file is complete already. Drop --tier"),
        ("--plan /nonexistent.yaml", "cannot be read"),
        ("--plan /etc/hostname", "plan file /etc/hostname"),
        ("check /nonexistent.yaml", "cannot be read"),
        ("--gpu rtx2060s --execute", "there is nothing to train on"),
        ("--gpu rtx2060s --execute --data /nonexistent", "there is no such file or folder"),
        ("--gpu rtx2060s --execute --json --data /tmp", "--json prints one object and nothing else"),
        ("--gpu rtx2060s --out -", "is no file name here"),
        ("--gpu rtx2060s --out /tmp", "is a folder"),
        ("--gpu rtx2060s --out /dev/null", "is not an ordinary file"),
    ],
)
def test_a_mistake_is_explained(capsys: Capture, arguments: str, told: str) -> None:
    assert told in "\n".join(mistakes(capsys, *shlex.split(arguments)))


def test_a_mistake_of_ours_is_no_traceback_and_no_verdict(
    planned: Any, monkeypatch: Patch, capsys: Capture
) -> None:
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


# --- Files ------------------------------------------------------------


def test_out_writes_the_plan_and_equal_plans_give_equal_bytes(
    planned: Any, tmp_path: Path, capsys: Capture
) -> None:
    planned(example_plan())
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    assert main(["--gpu", "rtx2060s", "--out", str(first)]) == 0
    assert str(first) in "".join(capsys.readouterr().out.split())
    assert main(["--gpu", "rtx2060s", "--json", "--out", str(second)]) == 0
    json.loads(capsys.readouterr().out)
    assert first.read_bytes() == second.read_bytes()
    assert load_plan(first) == example_plan()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first.yaml", "second.yaml"]


def test_out_replaces_a_plan_but_nothing_else(planned: Any, tmp_path: Path, capsys: Capture) -> None:
    planned(example_plan())
    place = tmp_path / "plan.yaml"
    write_plan(too_long_plan(), place)
    assert main(["--gpu", "rtx2060s", "--out", str(place)]) == 0
    assert load_plan(place).verdict == "fits"
    capsys.readouterr()
    for text in ("my notes\n", "schema: tierplan/0\n", "a: b\n", ""):
        place.write_text(text)
        assert "is not overwritten" in mistakes(capsys, "--gpu", "rtx2060s", "--out", str(place))[0]
        assert place.read_text() == text


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    place, link = tmp_path / "plan.yaml", tmp_path / "link.yaml"
    write_plan(example_plan(), place)
    link.symlink_to(place)
    write_plan(too_long_plan(), link)
    assert link.is_symlink() and load_plan(place).verdict == "does-not-fit"


def test_a_full_disk_leaves_the_old_plan_whole(
    planned: Any, tmp_path: Path, monkeypatch: Patch, capsys: Capture
) -> None:
    planned(too_long_plan())
    place = tmp_path / "plan.yaml"
    write_plan(example_plan(), place)

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    told = mistakes(capsys, "--gpu", "rtx2060s", "--out", str(place))
    assert told == [f"error: --out {place}: cannot be written: No space left on device."]
    assert [path.name for path in tmp_path.iterdir()] == ["plan.yaml"]
    assert load_plan(place) == example_plan()


def test_a_folder_that_takes_no_file_is_an_error_and_no_traceback(planned: Any, capsys: Capture) -> None:
    planned(example_plan())
    assert "cannot be written" in mistakes(capsys, "--gpu", "rtx2060s", "--out", "/proc/plan.yaml")[0]


def test_a_plan_file_is_reported_as_it_is(tmp_path: Path, capsys: Capture) -> None:
    place = tmp_path / "plan.yaml"
    write_plan(too_long_plan(), place)
    assert main(["--plan", str(place)]) == 1
    assert capsys.readouterr().out.startswith("DOES NOT FIT")
    assert main(["--plan", str(place), "--json"]) == 1
    assert Plan.model_validate_json(capsys.readouterr().out) == too_long_plan()


# --- Training ------------------------------------------------------------


def test_a_plan_file_is_run_unchanged(tmp_path: Path, monkeypatch: Patch) -> None:
    run: list[Plan] = []
    trainer_that(monkeypatch, lambda plan: run.append(plan) or 130)
    place, plan = tmp_path / "plan.yaml", example_plan(train={"data": str(tmp_path)})
    write_plan(plan, place)
    assert main(["--plan", str(place), "--execute"]) == 130
    assert run == [plan]


def test_data_fills_a_plan_that_names_none_and_changes_no_other(
    tmp_path: Path, monkeypatch: Patch, capsys: Capture
) -> None:
    run: list[Plan] = []
    trainer_that(monkeypatch, lambda plan: run.append(plan) or 0)
    place = tmp_path / "plan.yaml"
    write_plan(example_plan(), place)
    assert "there is nothing to train on" in mistakes(capsys, "--plan", str(place), "--execute")[0]
    assert main(["--plan", str(place), "--execute", "--data", str(tmp_path)]) == 0
    assert run == [example_plan(train={"data": str(tmp_path)})]
    capsys.readouterr()
    write_plan(example_plan(train={"data": "elsewhere"}), place)
    told = mistakes(capsys, "--plan", str(place), "--execute", "--data", str(tmp_path))
    assert "a plan file is run unchanged" in told[0]


def test_what_does_not_fit_is_not_trained(
    planned: Any, tmp_path: Path, monkeypatch: Patch, capsys: Capture
) -> None:
    planned(too_long_plan())
    trainer_that(monkeypatch, lambda plan: pytest.fail("trained"))
    assert main(["--gpu", "rtx2060s", "--execute", "--data", str(tmp_path)]) == 1
    told = capsys.readouterr().err
    assert told == f"error: --execute: nothing was trained. {too_long_plan().summary}\n"


def test_without_the_train_extra_training_says_how_to_get_it(
    planned: Any, tmp_path: Path, monkeypatch: Patch, capsys: Capture
) -> None:
    planned(example_plan())
    monkeypatch.setitem(sys.modules, "trainer.run", None)
    assert main(["--gpu", "rtx2060s", "--execute", "--data", str(tmp_path)]) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: --execute: training needs the train extra")
    assert told.endswith("pip install 'tierplan[train]' brings it.\n")


def test_a_mistake_found_while_training_is_told(
    planned: Any, tmp_path: Path, monkeypatch: Patch, capsys: Capture
) -> None:
    def fail(plan: Plan) -> int:
        raise PlanError("the tokenizer", "is missing.")

    planned(example_plan())
    trainer_that(monkeypatch, fail)
    assert main(["--gpu", "rtx2060s", "--execute", "--data", str(tmp_path)]) == 2
    assert capsys.readouterr().err == "error: the tokenizer: is missing.\n"


def test_execute_without_a_card_named_plans_for_this_machine(
    planned: Any, tmp_path: Path, monkeypatch: Patch, capsys: Capture
) -> None:
    requests = planned(example_plan())
    trainer_that(monkeypatch, lambda plan: 0)
    monkeypatch.setattr(planner.hardware, "detect_local", lambda: object())
    assert main(["--execute", "--data", str(tmp_path)]) == 0

    def none_here() -> None:
        raise PlanError("--gpu local", "no driver answers here.")

    monkeypatch.setattr(planner.hardware, "detect_local", none_here)
    assert main(["--execute", "--data", str(tmp_path)]) == 0
    assert [request.gpu for request in requests] == ["local", "cpu"]
    told = capsys.readouterr().err
    assert told == "No card to train on: no driver answers here. Planning for the CPU.\n"


# --- Subcommands ------------------------------------------------------------


def answered(capsys: Capture, *arguments: str) -> Any:
    """The JSON that a command prints."""
    assert main(arguments) == 0
    return json.loads(capsys.readouterr().out)


def test_the_lists_as_json(capsys: Capture) -> None:
    cards = {card["id"]: card for card in answered(capsys, "gpus", "--json")["gpus"]}
    assert cards["rtx2060s"]["budget_bytes"] == (7974 - 621) * 2**20
    assert all(fact["source"] or fact["why"] for card in cards.values() for fact in card["facts"].values())
    models = {model["id"]: model for model in answered(capsys, "models", "--json")["models"]}
    assert models["phi-2"]["counted"] == 2_779_683_840


def test_the_lists_as_tables_fit_80_columns(capsys: Capture) -> None:
    for command in ("gpus", "models", "optimizations"):
        assert main([command]) == 0
        out = capsys.readouterr().out
        assert max(map(len, out.splitlines())) <= 80
        assert {"gpus": "rtx2060s", "models": "phi-2", "optimizations": "chunked_loss"}[command] in out


def test_optimisations_have_the_state_they_have_in_the_plan(capsys: Capture) -> None:
    listed = answered(
        capsys, "optimizations", "--gpu", "cpu", "--model", "smollm2-135m", "--context", "1K", "--json"
    )
    states = {each["id"]: each["state"] for each in listed["optimizations"]}
    plan = make_plan(Request(gpu="cpu", model="smollm2-135m", total_tokens=1024))
    assert {name for name, state in states.items() if state == "on"} == {choice.id for choice in plan.choices}
    assert states["nf4_weights"] == "off"
    nf4 = next(each for each in listed["optimizations"] if each["id"] == "nf4_weights")
    assert any("needs a graphics card" in reason for reason in nf4["reasons"])


def test_explain_as_json_and_as_text(capsys: Capture) -> None:
    found = answered(capsys, "explain", "activations/mlp", "--tier", "1", "--json")
    assert found["formulas"][0]["result"] == 471_859_200
    assert main(["explain", "activations/mlp", "--tier", "1"]) == 0
    assert "471,859,200 bytes" in capsys.readouterr().out


def test_the_schema_is_that_of_the_plan(capsys: Capture) -> None:
    schema = answered(capsys, "schema")
    assert schema == json_schema()
    jsonschema = pytest.importorskip("jsonschema")
    jsonschema.validate(json.loads(example_plan().to_json()), schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(document(surplus=1), schema)


@pytest.mark.parametrize(
    ("gpu", "settings"),
    [("rtx2060s", {"tier": 1}), ("cpu", {"model": "smollm2-135m", "total_tokens": 1000, "target": 10})],
)
def test_a_fresh_plan_still_fits_and_nothing_differs(
    gpu: str, settings: dict[str, Any], tmp_path: Path, capsys: Capture
) -> None:
    place = tmp_path / "plan.yaml"
    write_plan(make_plan(Request(gpu=gpu, **settings)), place)
    assert main(["check", str(place)]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "is a valid plan." in out and "It still fits" in out and "nothing differs" in out


def test_a_plan_that_was_changed_by_hand_is_found_out(tmp_path: Path, capsys: Capture) -> None:
    place, plan = tmp_path / "plan.yaml", make_plan(Request(tier=1))
    high = plan.memory.gpu.peak_bytes.high
    place.write_text(plan.to_yaml().replace(f"high: {high}", f"high: {high - 2**30}"))
    assert main(["check", str(place)]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "the file itself was changed" in out and "memory.gpu.peak_bytes.high" in out
    assert main(["check", str(place), "--json"]) == 0
    differences = json.loads(capsys.readouterr().out)["differences"]
    assert differences == [{"place": "memory.gpu.peak_bytes.high", "file": high - 2**30, "now": high}]


def test_a_changed_calibration_is_named(tmp_path: Path, capsys: Capture) -> None:
    place, plan = tmp_path / "plan.yaml", make_plan(Request(tier=1))
    place.write_text(plan.to_yaml().replace(plan.provenance.calibration_sha256, "f" * 64))
    assert main(["check", str(place)]) == 0
    assert "Since it was made, the calibration changed." in capsys.readouterr().out


def test_a_plan_for_a_large_card_does_not_fit_a_small_one(tmp_path: Path, capsys: Capture) -> None:
    place = tmp_path / "plan.yaml"
    plan = make_plan(Request(gpu="rtx4090", total_tokens=40_000, excluded=("checkpoint_offload",)))
    assert plan.verdict == "fits"
    write_plan(plan, place)
    assert main(["check", str(place)]) == 0
    assert main(["check", str(place), "--gpu", "rtx3060-12gb"]) == 1
    assert "does not fit" in capsys.readouterr().out


def test_a_plan_for_a_card_that_is_gone_says_how_to_go_on(tmp_path: Path, capsys: Capture) -> None:
    place = tmp_path / "plan.yaml"
    write_plan(example_plan(gpu=document()["gpu"] | {"id": "rtx1"}), place)
    told = mistakes(capsys, "check", str(place))
    assert told[0].startswith("error: card rtx1: ") and "--gpu names the file of its profile" in told[0]


# --- As a process ------------------------------------------------------------


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


def test_a_reader_that_stops_reading_is_no_error() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    try:
        command = [sys.executable, "-m", "planner", "gpus"]
        done = subprocess.run(command, cwd=ROOT, stdout=writing, stderr=subprocess.PIPE, text=True)
    finally:
        os.close(writing)
    assert (done.returncode, done.stderr) == (141, "")
