"""The documentation: generated files are up to date, what they cite exists, and nothing of the command is left out."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import pytest

from planner.baseline import baseline
from planner.cli import cli
from planner.cli_check import same_settings
from planner.compose import compose
from planner.explain_formulas import smallest_run_with
from planner.longest import FINEST
from planner.optimizations import all_optimizations
from planner.planning import make_plan
from reports.render import decisions, optimizations, records
from reports.render.documents import BLOCK, PAGES, WHOLE, leftovers, outdated
from reports.render.optimizations import _planned
from reports.render.records import Record, over_bound, summary

ROOT = Path(__file__).resolve().parent.parent
BY_HAND = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/decisions.md", "docs/validation.md")
AGAIN = "`python -m reports.render` writes it anew"
# A path of this repository in a sentence; with a comma and the words of a heading behind it for a decision.
CITED = re.compile(r"(?:docs|hwprofiles|planner|reports|tests|trainer)/[\w./-]+\.(?:md|py|yaml|json)")
DECISION = re.compile(r"docs/decisions\.md, ([a-z][\w ,-]*)")


def written() -> str:
    """The README and every page, as one text."""
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
    return "\n".join(page.read_text(encoding="utf-8") for page in pages)


@pytest.mark.parametrize("name", WHOLE)
def test_a_generated_file_is_up_to_date(name: str) -> None:
    assert (ROOT / name).read_text(encoding="utf-8") == WHOLE[name](), AGAIN


def test_every_optimisation_has_its_page_and_it_is_up_to_date() -> None:
    pages = optimizations.pages()
    assert set(pages) == {"README", *all_optimizations()}
    stale = [name for name, page in pages.items() if (ROOT / PAGES / f"{name}.md").read_text(encoding="utf-8") != page]
    assert not stale, AGAIN


def test_the_computed_block_of_the_decisions_is_up_to_date() -> None:
    text = (ROOT / "docs/decisions.md").read_text(encoding="utf-8")
    shown = {match["name"]: match[0] for match in BLOCK.finditer(text)}
    assert set(shown) == set(decisions.BLOCKS)
    for name, block in decisions.BLOCKS.items():
        assert shown[name] == f"<!-- generated: {name} -->\n{block()}<!-- end of {name} -->", AGAIN


def test_no_page_or_picture_is_left_over() -> None:
    expected = [ROOT / name for name in WHOLE] + [ROOT / PAGES / f"{name}.md" for name in optimizations.pages()]
    assert not leftovers(expected)


def test_the_comparison_can_fail() -> None:
    path = ROOT / "docs/notation.md"
    text = path.read_text(encoding="utf-8")
    assert path not in outdated({path: text})
    assert path in outdated({path: text + "x"})
    assert path.parent / "nowhere.md" in outdated({path.parent / "nowhere.md": ""})


def options(command: click.Command, words: str) -> Iterator[tuple[str, str]]:
    """Every command with every long option that it takes."""
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            yield words, max(parameter.opts, key=len)
    if isinstance(command, click.Group):
        for name, each in command.commands.items():
            yield from options(each, f"{words} {name}")


def test_every_command_and_option_is_documented() -> None:
    text = written()
    missing = {f"{words} {option}" for words, option in options(cli, "plan") if option not in text}
    missing |= {name for name in cli.commands if f"plan {name}" not in text}
    assert not missing


def test_every_knob_and_letter_of_an_optimisation_is_documented() -> None:
    text = written()
    knobs = [f"{name}.{knob.name}" for name, each in all_optimizations().items() for knob in each.knobs]
    assert knobs and not [knob for knob in knobs if knob not in text]


def test_a_relative_link_leads_somewhere() -> None:
    broken = []
    pages = [ROOT / name for name in BY_HAND] + sorted((ROOT / "docs").rglob("*.md"))
    for page in pages:
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8")):
            if "://" not in target and not (page.parent / target).exists():
                broken.append(f"{page.relative_to(ROOT)}: {target}")
    assert not broken


def sources() -> Iterator[str]:
    """Every sentence of code that cites a source: evidence, and sources of terms."""
    for each in all_optimizations().values():
        for one in each.evidence:
            yield f"{one.statement}: {one.source}"
        run = smallest_run_with(each.id, _planned())
        if run is not None:
            yield from (term.source for term in run.configuration.ledger.terms.values())
    yield from (term.source for term in baseline().terms.values())


def test_what_code_cites_of_this_repository_exists() -> None:
    cited = {path for source in sources() for path in CITED.findall(source)}
    assert {"tests/test_trainer_loss.py", "docs/decisions.md"} <= cited
    assert not sorted(path for path in cited if not (ROOT / path).exists())


def test_a_cited_decision_has_its_section() -> None:
    text = (ROOT / "docs/decisions.md").read_text(encoding="utf-8")
    titles = {title.lower() for title in re.findall(r"^## (.+)$", text, re.MULTILINE)}
    cited = {title for source in sources() for title in DECISION.findall(source)}
    assert {"spacing of checkpoints", "pinned memory"} <= cited
    assert cited <= titles


def test_what_pages_cite_of_this_repository_exists() -> None:
    cited = {path for name in BY_HAND for path in CITED.findall((ROOT / name).read_text(encoding="utf-8"))}
    assert not sorted(path for path in cited if not (ROOT / path).exists())


def test_the_figure_taken_from_a_record_is_that_of_the_record() -> None:
    text = (ROOT / "docs/decisions.md").read_text(encoding="utf-8")
    said = re.search(r"reserved less allocated is (\d+) MiB \(`([\w.-]+)`\)", " ".join(text.split()))
    assert said is not None
    record = json.loads((records.FOLDER / f"{said[2]}.json").read_text(encoding="utf-8"))
    peaks = record["measured"]["gpu"]
    assert int(said[1]) == round((peaks["reserved_bytes"] - peaks["allocated_bytes"]) / 2**20)


def test_the_spacing_with_one_layer_is_the_planners_own_sum() -> None:
    run = _planned()
    configuration = compose(decisions.PLAIN, {}, run.situation)
    length, rank = decisions.TOKENS, decisions.RANK
    letters = configuration.at(batch=1, total=length, target=length, workspace=0, rank=rank)
    alive = [
        term
        for term in configuration.ledger.terms.values()
        if "backward" in term.phases and term.name.partition("/")[0] in ("activations", "attention")
    ]
    assert decisions.backward_bytes(1, decisions.PLAIN) == sum(int(term.bytes(letters)) for term in alive)


def made_up(name: str, expected: int, allocated: int, reserved: int, high: int) -> Record:
    gpu: dict[str, Any] = {"allocated_bytes": allocated, "reserved_bytes": reserved, "driver_bytes": None}
    content = {"measured": {"gpu": gpu}, "predicted": {"gpu": {"expected_bytes": expected, "high_bytes": high}}}
    return Record(name, content)


def test_the_summary_counts_what_was_wrong() -> None:
    right = [made_up(f"right {n}", 1001, 1000, 1050, 1100) for n in range(18)]
    wrong = [made_up("under", 990, 1000, 1050, 1100), made_up("over", 1020, 1000, 1101, 1100)]
    found = summary([*right, *wrong])
    assert (found.count, found.under, over_bound([*right, *wrong])) == (20, 1, 1)
    assert found.median == pytest.approx(0.001)
    assert found.percentile_95 == pytest.approx(0.01), "the nineteenth of twenty"
    assert found.largest == pytest.approx(0.02)


def test_a_run_without_a_record_is_told(tmp_path: Path) -> None:
    (tmp_path / "h200-case.failed.txt").write_text("reading\nerror: ran out of memory\n", encoding="utf-8")
    assert [(one.name, one.told) for one in records.failures(tmp_path)] == [("h200-case", "ran out of memory")]


@pytest.mark.parametrize("name", [name for name in WHOLE if name.endswith(".svg")])
def test_a_picture_is_well_formed_and_says_what_it_shows(name: str) -> None:
    root = ET.fromstring((ROOT / name).read_text(encoding="utf-8"))
    space = "{http://www.w3.org/2000/svg}"
    assert root.tag == f"{space}svg" and root.find(f"{space}title") is not None
    width, height = (float(root.attrib[side]) for side in ("width", "height"))
    for text in root.iter(f"{space}text"):
        assert 0 <= float(text.attrib["x"]) <= width and 0 <= float(text.attrib["y"]) <= height
        assert (text.text or "").strip()


def test_no_run_lies_outside_its_panel() -> None:
    from reports.render.figures import SHARES, predicted_measured

    circles = [each for each in ET.fromstring(predicted_measured()).iter() if each.tag.endswith("circle")]
    places = [float(each.attrib["cx"]) for each in circles]
    assert len(places) > 2 and SHARES[0] <= min(places) and max(places) <= SHARES[1]


def test_the_card_is_full_where_the_picture_says_so() -> None:
    """With the plan's own settings, and host memory and time without end."""
    from reports.render.figures import longest_on_card, reference_plan

    plan = reference_plan()
    longest = longest_on_card(plan)
    same = replace(same_settings(plan, plan.gpu.id), tier=None, host_bytes=2**50, max_step_seconds=1e12)
    verdicts = [make_plan(replace(same, total_tokens=total)).verdict for total in (longest, longest + FINEST)]
    assert longest > plan.total_tokens and verdicts == ["fits", "does-not-fit"]
