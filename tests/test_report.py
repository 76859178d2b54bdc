"""The report: complete, readable in 80 columns, plain without colours, true to the plan's numbers."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from plan_fixture import PHASES, document, example_plan, phases, too_long_plan
from rich.console import Console

from planner.plan import Plan
from planner.report import budget_bar, longest, next_commands, print_report, printable
from planner.units import GIB, MIB


def told(plan: Plan, width: int = 80, *, written: Path | None = None, colour: bool = False) -> str:
    """The report as text."""
    system = "truecolor" if colour else None
    console = Console(file=io.StringIO(), width=width, color_system=system, force_terminal=colour)
    print_report(plan, console, written=written)
    return console.file.getvalue()  # type: ignore[attr-defined]


def one_line(text: str) -> str:
    """Without line breaks and columns, to look for sentences that were wrapped."""
    return " ".join(text.split())


def with_memory(**gpu: object) -> Plan:
    made = document()
    return example_plan(memory=made["memory"] | {"gpu": made["memory"]["gpu"] | gpu})


@pytest.mark.parametrize("width", [40, 80, 100, 120, 200])
@pytest.mark.parametrize("plan", [example_plan(), too_long_plan()], ids=["fits", "does-not-fit"])
def test_no_line_is_wider_than_the_terminal(plan: Plan, width: int) -> None:
    lines = told(plan, width).splitlines()
    assert max(map(len, lines)) <= max(80, min(width, 120))
    assert all(line == line.rstrip() for line in lines)


@pytest.mark.parametrize("width", [80, 120])
def test_everything_the_plan_says_is_in_the_report(width: int) -> None:
    plan = example_plan()
    text = told(plan, width)
    assert text.startswith(f"FITS  {plan.summary}")
    flat = one_line(text)
    for sentence in [*plan.warnings, *plan.not_modelled, plan.time.basis]:
        assert sentence in flat
    for choice in plan.choices:
        assert f"{choice.id} {choice.reason}" in flat
    for rejection in plan.rejected:
        assert f"{rejection.id} {' '.join(rejection.reasons)}" in flat
    assert "rank = 24, alpha = 48" in flat
    assert "tier 3: 16,384 of context + 2,048 to train = 18,432 tokens, LoRA rank 24" in flat
    assert "19,712 tokens if 2,048 are trained, 17,152 if all are" in flat
    assert "about 31.2 s, never less than 18.4 s; limit 24 h" in flat
    assert "Host RAM 3.00 GiB of 32 GiB" in flat


def test_what_works_comes_right_after_a_verdict_of_no() -> None:
    plan = too_long_plan()
    text = told(plan)
    assert text.startswith("DOES NOT FIT  tier 3 needs 0.88 GiB more")
    places = [text.index(part) for part in ("The nearest that works", *plan.nearest, "warning", "In short")]
    assert places == sorted(places)
    assert "900 MiB too much" in text
    assert "--execute" not in text


def test_an_unknown_time_says_so() -> None:
    plan = example_plan(time=document()["time"] | {"step_seconds": {"bound": None, "estimate": None}})
    assert "Step      unknown: assumed shares" in told(plan)


def test_plain_text_has_no_escapes_and_colour_has() -> None:
    assert "\x1b" not in told(example_plan())
    assert "\x1b[" in told(example_plan(), colour=True)


def test_colour_changes_nothing_but_colour() -> None:
    from rich.text import Text

    coloured = Text.from_ansi(told(example_plan(), colour=True)).plain
    assert [line.rstrip() for line in coloured.splitlines()] == told(example_plan()).splitlines()


def test_a_plan_file_cannot_send_commands_to_the_terminal() -> None:
    plan = example_plan(summary="fits\x1b[2J\x07", warnings=["\x1b]0;title\x07 [red]markup[/red]"])
    text = told(plan)
    assert not {sign for sign in text if not sign.isprintable()} - {"\n"}
    assert "[red]markup[/red]" in text
    assert printable("a\x1bb\rc") == "a b c"


def columns(text: str, label: str) -> list[str]:
    """The cells of a row of the table."""
    line = next(line for line in text.splitlines() if line.strip().startswith(label))
    return line.strip().removeprefix(label).split()


def test_the_table_adds_up() -> None:
    text = told(example_plan())
    assert columns(text, "load") == ["forward", "loss", "backward", "optim.", "eval.", "save"]
    assert columns(text, "sum") == [f"{sum(phases()[phase].values()) / GIB:.2f}" for phase in PHASES]
    weights = sum(size for name, size in phases()["load"].items() if name.startswith("weights/"))
    assert columns(text, "weights") == [f"{weights / GIB:.2f}"] * 7
    assert columns(text, "activations") == ["–", "3.69", "2.81", "4.57", "–", "–", "–"]
    assert columns(text, "kv cache") == ["0"] * 7
    assert columns(text, "norms") == ["<0.01"] * 7


def test_groups_come_in_their_order() -> None:
    text = told(example_plan())
    names = [
        "weights",
        "adapters",
        "activations",
        "attention",
        "kv cache",
        "gradients",
        "optimizer",
        "loss",
        "sum",
    ]
    places = [text.index(f"\n  {name} ") for name in names]
    assert places == sorted(places)


def test_terms_phases_and_groups_that_are_not_known_here_are_shown_all_the_same() -> None:
    plan = with_memory(phases=phases() | {"teleport": {"oracle/delphi": 3 * GIB}})
    text = told(plan, 100)
    assert "teleport" in text
    assert columns(text, "oracle")[-1] == "3.00"


def test_small_plans_are_told_in_mib() -> None:
    small = {"load": {"weights/linear": 3 * MIB, "weights/norms": 1024}}
    plan = with_memory(
        phases=small, peak_phase="load", peak_bytes={"low": 3 * MIB, "expected": 4 * MIB, "high": 5 * MIB}
    )
    assert "memory by phase, in MiB" in told(plan)
    assert columns(told(plan), "weights") == ["3.00"]


def test_without_a_card_nothing_is_called_one() -> None:
    gpu = document()["gpu"] | {
        "id": "cpu",
        "name": "x86_64",
        "kind": "cpu",
        "compute_capability": None,
        "context_bytes": 0,
    }
    plan = example_plan(gpu=gpu, warnings=[], rejected=[])
    text = told(plan)
    assert "Machine   x86_64, no card: 7.18 GiB of memory to use" in text
    assert "GPU" not in text
    assert "train it " in text


def bar(plan: Plan, width: int, plain: bool = False) -> str:
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(budget_bar(plan, width, plain))
    return console.file.getvalue().splitlines()[0].rstrip("\n")  # type: ignore[attr-defined]


@given(
    low=st.integers(0, 2**40),
    more=st.integers(0, 2**40),
    bound=st.integers(0, 2**40),
    budget=st.integers(0, 2**40),
    width=st.integers(20, 118),
)
def test_the_bar_is_to_scale(low: int, more: int, bound: int, budget: int, width: int) -> None:
    peak = {"low": low, "expected": low + more, "high": low + more + bound}
    drawn = bar(with_memory(budget_bytes=budget, peak_bytes=peak), width, plain=True)
    cells = min(width, 96) - 1
    assert len(drawn) == cells + 1
    assert drawn.count("|") == 1
    assert drawn.replace("|", "").strip("#") == drawn.replace("|", "").lstrip("#"), "low comes first"
    scale = max(budget, peak["high"], 1) / cells
    for signs, size in (("#", low), ("#+", low + more), ("#+-", peak["high"])):
        assert abs(sum(map(drawn.count, signs)) - size / scale) <= 0.5 + 1e-9
    assert abs(drawn.index("|") - budget / scale) <= 0.5 + 1e-9


def test_output_that_is_not_utf8_gets_signs_it_can_show() -> None:
    file = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="strict")
    console = Console(file=file, width=80, color_system=None)
    print_report(example_plan(), console)
    file.flush()
    assert b"####" in file.buffer.getvalue()  # type: ignore[attr-defined]


def test_next_is_the_command_of_the_plan_or_its_file() -> None:
    plan = example_plan()
    assert next_commands(plan, None)[0] == (
        "train it, on that card",
        "plan --gpu rtx2060s --execute --data FOLDER",
    )
    written = next_commands(plan, Path("my plan.yaml"))
    assert written[0][1] == "plan --plan 'my plan.yaml' --execute --data FOLDER"
    assert written[1][1] == "plan check 'my plan.yaml'"
    assert next_commands(plan, None)[-1][1] == "plan explain activations/checkpoints"
    with_data = example_plan(train={"data": "texts"})
    assert next_commands(with_data, None)[0][1] == "plan --gpu rtx2060s --execute"


@pytest.mark.parametrize(
    ("with_target", "all_trained", "expected"),
    [
        (None, None, "no sequence fits at rank 24"),
        (1000, 1000, "1,000 tokens, all trained, at rank 24"),
        (9000, None, "9,000 tokens if 2,048 are trained, at rank 24"),
        (9000, 8000, "9,000 tokens if 2,048 are trained, 8,000 if all are, at rank 24"),
    ],
)
def test_the_longest_is_told(with_target: int | None, all_trained: int | None, expected: str) -> None:
    assert longest(example_plan(longest={"with_target": with_target, "all_trained": all_trained})) == expected
