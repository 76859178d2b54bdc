"""What the tests of the command line share: a plan in place of planning, a trainer, mistakes as told."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable, Iterator
from functools import cache
from types import ModuleType
from typing import Any

import pytest

import planner.planning
from planner.cli import cli, main
from planner.cli_request import plan_for
from planner.plan import Plan
from planner.planning import Request

Capture = pytest.CaptureFixture[str]
Patch = pytest.MonkeyPatch


def planning_gives(monkeypatch: Patch, plan: Plan) -> list[Request]:
    """Put this plan in place of planning; the list takes every request that planning is asked for."""
    requests: list[Request] = []

    def make_plan(request: Request) -> Plan:
        requests.append(request)
        return plan

    monkeypatch.setattr(planner.planning, "make_plan", make_plan)
    return requests


def trainer_that(monkeypatch: Patch, act: Callable[[Plan], int]) -> list[dict[str, bool]]:
    """Put a trainer in place that does this; the list takes what it was asked for beside the plan in each run."""
    module, asked = ModuleType("trainer.run"), []

    def execute(plan: Plan, **given: bool) -> int:
        asked.append(given)
        return act(plan)

    module.execute = execute  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "trainer.run", module)
    return asked


def mistakes(capsys: Capture, *arguments: str) -> list[str]:
    """What a command that is given wrongly says, line by line; it exits with 2 and prints no more than JSON."""
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert json.loads(out)["verdict"] == "unknown" if "--json" in arguments else out == ""
    assert err.startswith("error: ") and "Traceback" not in err
    return err.splitlines()


def answered(capsys: Capture, *arguments: str) -> Any:
    """The JSON that a command prints."""
    assert main(arguments) == 0
    return json.loads(capsys.readouterr().out)


@cache
def planned(words: str) -> Plan:
    """The plan of a command line; of an option or a knob given twice the last counts."""
    last: dict[str, tuple[str, str]] = {}
    for option, value in pairs_of(words):
        several = {"--set": value.partition("=")[0], "--with": value, "--without": value}
        last[f"{option} {several.get(option, '')}"] = (option, value)
    arguments = [word for pair in last.values() for word in pair]
    return plan_for(cli.make_context("plan", arguments, resilient_parsing=True).params)


def pairs_of(words: str) -> Iterator[tuple[str, str]]:
    """Options with their values."""
    split = shlex.split(words)
    return zip(split[::2], split[1::2], strict=True)
