"""The numbered items: each has something that stands for it, and what that says agrees with reports/claims.md."""

from __future__ import annotations

import inspect
import re

import pytest
from cli_fixture import Capture, answered, mistakes
from test_optimizations import check_source, situations

from planner.cli import main
from planner.hardware import load_profile
from planner.model import load_model
from planner.optimizations import all_items, all_optimizations, given_items
from planner.optimizations.base import Situation
from planner.optimizations.item import GIVEN, NOT_CLAIMED, NUMBERED, Given, Item
from planner.planning import Request, make_plan
from planner.units import GIB
from reports.render import claims
from reports.render.claims_data import document

DOCUMENT = document()
NUMBERS = range(1, NUMBERED + 1)
VERDICTS = {"yes": "holds", "in part": "in part", "no": "does not hold", None: "not shown"}
FIGURE = re.compile(r"\d[\d,.–]*\d|\d")


def of(number: int) -> list[Item]:
    """What stands for an item."""
    return [each for each in all_items().values() if number in each.numbers]


def lines_of(number: int) -> range:
    """The lines of the claims document that tell of an item: to the next one, or to the heading of the next tier."""
    starts, last = [*DOCUMENT.item_lines, 135], {last for _, last in DOCUMENT.items.values()} - {NUMBERED}
    first = starts[number - 1]
    return range(first, first + 1 if number in last else starts[number])


def told_of(number: int) -> list[tuple[str | None, str]]:
    """Verdict and true text of each row that the page has for an item."""
    found = [(claim, claims.find(claim, DOCUMENT)) for claim in DOCUMENT.claims if claim.line in lines_of(number)]
    return [(claim.holds(one), one.text) for claim, one in found]


def figures(text: str) -> set[str]:
    """Numbers as they are written, without names such as ZeRO-2, RTX 2060 or BF16, and without items."""
    text = re.sub(r"RTX \d+|[A-Za-z]+-\d+|BF16|\bitem \d+|\b(4|8|16|32) bits?\b|\b(4|16)-bit\b", "", text)
    return {figure.strip(",.").replace(",", "") for found in FIGURE.findall(text) for figure in found.split("–")}


def test_each_item_has_its_line() -> None:
    assert len(DOCUMENT.item_lines) == NUMBERED == sum(last - first + 1 for first, last in DOCUMENT.items.values())
    assert list(DOCUMENT.item_lines) == sorted({*DOCUMENT.item_lines})


@pytest.mark.parametrize("number", NUMBERS)
def test_something_stands_for_each_item_and_speaks_with_one_voice(number: int) -> None:
    said = [one for each in of(number) for one in each.claimed if one.number == number]
    assert said, f"nothing stands for item {number}"
    assert len({one.words for one in said}) == 1, "what is claimed is quoted alike"
    assert all(one.true.endswith(".") and one.words and not one.words.endswith(".") for one in said)


@pytest.mark.parametrize("number", NUMBERS)
def test_verdicts_are_those_of_the_page(number: int) -> None:
    on_page = {VERDICTS[verdict] for verdict, _ in told_of(number)}
    for each in of(number):
        for one in each.claimed:
            if one.number == number and on_page:
                assert one.verdict in on_page, f"{each.id}: the page says {sorted(on_page)}"


@pytest.mark.parametrize("number", NUMBERS)
def test_figures_are_those_of_the_page(number: int) -> None:
    there = figures(" ".join(text for _, text in told_of(number)))
    for each in of(number):
        for one in each.claimed:
            if one.number == number:
                assert figures(one.true) <= there, f"{each.id}: {sorted(figures(one.true) - there)} is in no row"


@pytest.mark.parametrize("name", sorted(given_items()))
def test_what_no_plan_chooses_introduces_itself(name: str) -> None:
    each = given_items()[name]
    module = inspect.getmodule(type(each))
    assert module and module.__name__.rpartition(".")[2] == name and inspect.getdoc(module)
    assert [kind for kind in GIVEN.values() if kind.__module__ == module.__name__] == [type(each)]
    assert each.title and not each.title.endswith(".") and name not in all_optimizations()
    assert not each.again or each.again in all_optimizations()
    for one in each.evidence:
        check_source(one.source)
    for situation in situations():
        state, why = each.state(situation)
        assert state in ("always", "never") and why and not why.endswith(".")


def test_a_class_without_a_claim_or_evidence_is_no_item() -> None:
    with pytest.raises(AssertionError):
        type("Empty", (Given,), {"__doc__": "x", "id": "empty", "evidence": ()})


def test_rows_of_the_list(capsys: Capture) -> None:
    rows = answered(capsys, "optimizations", "--tier", "1", "--json")
    assert isinstance(rows, list)
    assert {number for row in rows for number in row["numbers"]} == {*NUMBERS}
    assert {row["id"] for row in rows} == {*all_items()}
    plan = make_plan(Request(tier=1))
    on = {choice.id for choice in plan.choices}
    here = Situation(load_profile("rtx2060s"), load_model("phi-2"), 32 * GIB)
    for row in rows:
        each = all_items()[row["id"]]
        chosen = "on" if row["id"] in on else "off"
        assert row["state"] == (each.state(here)[0] if isinstance(each, Given) else chosen) and row["reasons"]
        assert row["verdict"] == each.verdict and ((row["claimed"] and row["true"]) or row["verdict"] == NOT_CLAIMED)
    order = [row["numbers"][0] if row["numbers"] else NUMBERED + 1 for row in rows]
    assert order == sorted(order)


def test_several_claims_are_told_apart() -> None:
    averages = all_items()["weight_averaging"]
    assert averages.numbers == (15, 22) and averages.words.startswith("15: ") and "; 22: " in averages.words
    assert averages.verdict == "in part", "the same verdict is told once"
    assert all_items()["lora"].verdict == NOT_CLAIMED and not all_items()["lora"].words


def test_what_no_plan_chooses_is_explained_and_cannot_be_asked_for(capsys: Capture) -> None:
    assert main(["explain", "zero2"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "never: a plan is for one card" in out and "item 3:" in out and "does not hold" in out
    assert mistakes(capsys, "--gpu", "rtx2060s", "--with", "zero2") == [
        "error: --with zero2: no plan switches it on or off. `plan explain zero2` says why."
    ]
