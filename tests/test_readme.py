"""The README: what it shows is what commands print today, and every command in it is run or listed as not run."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from planner.cli import main
from reports.render import readme
from reports.render.documents import BLOCK, Refusal, filled

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
FENCE = re.compile(r"^```(?P<kind>[^\n]*)\n(?P<body>.*?)^```$", re.DOTALL | re.MULTILINE)
COMMAND = re.compile(r"`(plan [^`\n]+)`")

# Every command of the README that is not run here, and why.
NOT_RUN = {
    "make test": "this test is part of it",
    "make demo": "trains for many minutes; its record is compared instead",
    "plan --gpu local": "needs a card",
    "plan matrix": "takes minutes; tests/test_tables_recorded.py makes some of its rows",
    "plan validate": "the command's name in a sentence",
    "plan validate plan.yaml": "trains, or counts; tests/test_validate.py does both",
    'plan generate RUN "def quicksort(items):"': "needs the folder of a run; tests/test_cli_generate.py makes one",
    "plan merge RUN": "needs the folder of a run; tests/test_trainer_merging.py makes one",
    "plan pool-heads MODEL --kv-heads N --out FOLDER": "needs a model; tests/test_pooling.py makes some",
    "plan measure": "measures for a minute; tests/test_measure.py does it with next to no effort",
    "plan --gpu local --execute --data ./repo": "needs a card, and trains",
    "plan --plan plan.yaml --execute --data ./repo": "needs that card, and trains",
    "plan --plan plan.yaml --execute --replan --data ./repo": "the same; tests/test_replanning.py trains so",
    "plan --plan run/plan.yaml --execute --resume": "needs the folder of a run; tests/test_resume.py makes one",
    "python3 -m venv .venv": "makes an environment",
    ".venv/bin/pip install torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu": "downloads",
    ".venv/bin/pip install -c constraints.txt -e .": "downloads",
    ".venv/bin/pip install -c constraints.txt -e '.[train,gpu]'": "downloads",
}


def fences() -> list[tuple[str, str]]:
    """Info string and text of every code block."""
    return [(match["kind"], match["body"]) for match in FENCE.finditer(TEXT)]


def typed(body: str) -> list[str]:
    """The commands in a block of a console."""
    return [line.removeprefix("$ ") for line in body.splitlines() if line.startswith("$ ")]


def commands() -> list[str]:
    """Every command of the README, in the order of its text."""
    inline = COMMAND.findall(FENCE.sub("", TEXT))
    return list(dict.fromkeys([command for _, body in fences() for command in typed(body)] + inline))


def all_tests_run(config: pytest.Config) -> bool:
    """Whether pytest runs every test, so that nothing need be collected a second time."""
    narrowed = config.option.keyword or config.option.markexpr
    return not narrowed and [Path(argument).resolve() for argument in config.args] == [ROOT / "tests"]


@pytest.mark.parametrize("name", readme.BLOCKS)
def test_a_block_is_what_is_true_today(
    name: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    if all_tests_run(request.config):
        monkeypatch.setattr(readme, "collected", lambda: len(request.session.items))
    shown = {match["name"]: match[0] for match in BLOCK.finditer(TEXT)}
    start, end = f"<!-- generated: {name} -->\n", f"<!-- end of {name} -->"
    told = "`python -m reports.render` writes it anew"
    assert shown[name] == f"{start}{readme.BLOCKS[name]()}{end}", told


def test_the_report_is_shown_whole_and_as_it_is_printed() -> None:
    shown = "".join(
        readme.BLOCKS[name]().split("\n", skip)[skip].removesuffix("```\n")
        for name, skip in (("plan-head", 2), ("plan-rest", 1))
    )
    printed = readme.output("--gpu", "rtx2060s")
    assert [line for line in shown.splitlines() if line] == [line for line in printed.splitlines() if line]
    assert max(map(len, printed.splitlines())) <= 80


def test_every_command_that_is_not_run_is_listed_and_marked() -> None:
    found = commands()
    assert len(found) > 15
    assert set(NOT_RUN) <= set(found), "the list names a command that the README has not"
    unmarked = [
        command for kind, body in fences() if kind == "console" for command in typed(body) if command in NOT_RUN
    ]
    assert not unmarked, "a block that is not run is marked `console no-run`"


def test_every_other_command_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "reports").symlink_to(ROOT / "reports")  # which a command of the README reads
    run = [command for command in commands() if command not in NOT_RUN and command != "make plan"]
    # Files first: a command further up may read what one further down writes.
    for command in sorted(run, key=lambda command: "--out" not in command):
        program, *arguments = shlex.split(command)
        assert program == "plan", f"{command} is neither run nor listed as not run"
        code = main(arguments)
        out, err = capsys.readouterr()
        machine = "--gpu cpu" in command  # whether it fits is a matter of this machine
        assert code in ((0, 1) if machine else (0,)), f"{command} exits with {code}: {err}"
        assert out, command


def test_make_runs_what_the_readme_says() -> None:
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    # Run by a make, this test would inherit its flags and print "Leaving directory" as the last line.
    alone = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    for target, last in (
        ("plan", ".venv/bin/plan --gpu rtx2060s"),
        ("test", ".venv/bin/python -m pytest -n 2"),
        ("demo", ".venv/bin/python -m reports.demo"),
    ):
        done = subprocess.run(["make", "-n", target], cwd=ROOT, env=alone, capture_output=True, text=True, check=True)
        assert done.stdout.splitlines()[-1] == last


def test_a_block_that_cannot_be_rendered_says_so_in_its_place() -> None:
    def impossible() -> str:
        raise ValueError("there is no record")

    refusals: list[Refusal] = []
    text = "a\n<!-- generated: demo -->\nold\n<!-- end of demo -->\nb\n"
    made = filled(text, "README.md", {"demo": impossible}, refusals)
    assert made == "a\n<!-- generated: demo -->\n_Not rendered: there is no record_\n<!-- end of demo -->\nb\n"
    assert [str(refusal) for refusal in refusals] == ["README.md, block demo: there is no record"]


def test_a_missing_record_of_the_demo_is_refused_with_the_way_to_make_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("reports.render.demo.DEMO", ROOT / "reports/validation/nowhere.json")
    with pytest.raises(ValueError, match=r"no nowhere\.json; `python -m reports\.demo --record` makes it"):
        readme.BLOCKS["demo"]()
