"""reports/claims.md: every numeric statement has a row with a state and a source, and each value is computed."""

from __future__ import annotations

import re
import shlex
from collections import Counter
from pathlib import Path

import click
import pytest
from pydantic import ValidationError

from planner.baseline import baseline
from planner.cli import cli
from planner.hardware import load_profile
from planner.optimizations import all_optimizations
from planner.planning import Request, make_plan
from planner.symbols import BY_SYMBOL
from planner.tiers import TIERS
from planner.units import format_seconds, parse_count
from reports.quality.cases import SEEDS
from reports.render import claims, claims_memory, claims_plans, claims_source, claims_terms, claims_tiers
from reports.render.claims_data import Claim, Found, document, listed, scientific
from reports.render.documents import WHOLE
from reports.render.records import records

ROOT = Path(__file__).resolve().parent.parent
COMMITTED = ROOT / "reports" / "claims.md"
GIVEN = document()
KINDS = {
    "card",
    "command",
    "file",
    "letter",
    "line",
    "lines",
    "optimization",
    "pair",
    "record",
    "records",
    "term",
    "training",
    "work",
}


def test_the_report_is_up_to_date_and_rendered_with_the_rest() -> None:
    assert WHOLE["reports/claims.md"] is claims.page
    assert COMMITTED.read_text(encoding="utf-8") == claims.page(), "`python -m reports.render` writes it anew"


def test_rows_cover_exactly_the_lines_that_hold_a_numeric_statement() -> None:
    assert list(GIVEN.lines) == sorted(GIVEN.lines)
    assert set(GIVEN.rows()) == set(GIVEN.lines)


def test_every_number_of_a_line_is_in_its_rows_and_rows_claim_no_other() -> None:
    assert not list(claims_source.without_row(GIVEN))


def test_a_number_without_a_row_and_a_row_without_its_number_are_found() -> None:
    fewer = tuple(claim for claim in GIVEN.claims if (claim.line, claim.claimed) != (9, "512K–1M"))
    told = list(claims_source.without_row(GIVEN.model_copy(update={"claims": fewer})))
    assert told == ["line 9: 1M is in no row", "line 9: 512K is in no row"]
    other = GIVEN.model_copy(update={"numbers": {**GIVEN.numbers, 8: "3,000", 370: "1"}})
    assert list(claims_source.without_row(other)) == [
        "line 8: 3000 is in no row",
        "line 8 does not say 3100",
        "line 370 has no row",
    ]


def test_the_figure_that_is_compared_is_the_one_that_is_claimed() -> None:
    units = {"": 1, "K": 1024, "M": 1024**2}
    for claim in GIVEN.claims:
        if claim.figure is not None:
            compared = claim.figure if isinstance(claim.figure, tuple) else (claim.figure,)
            written = [claims_source.same(figure) for figure in claims_source.figures(claim.claimed)]
            there = {value * units[suffix] for value, suffix in written}
            assert set(compared) <= there, f"line {claim.line}: {claim.figure} is not in {claim.claimed}"


def test_numbers_of_a_line_without_names_and_numbers_of_items() -> None:
    assert claims_source.figures("12. **AB on an RTX 2060 with NF4** - 1,200 to 3.5M, 4-8x") == (
        "1,200",
        "3.5M",
        "4",
        "8",
    )
    assert claims_source.figures("### TIER 3 - names: FlashAttention-2, ZeRO-3 and BF16 in O(n^2)") == ()
    assert claims_source.figures("7 GB, 512K, 500ms, 15%") == ("7", "512K", "500", "15")
    assert claims_source.same("0.50") == claims_source.same("0.5") and claims_source.same("1,000K") == (1000, "K")


def test_a_copy_of_the_document_is_held_to_the_list() -> None:
    given = GIVEN.model_copy(update={"numbers": {2: "16K", 4: "infinite", 6: "1"}, "set_aside": ()})
    assert list(claims_source.differences("one\n16K tokens\nthree\nwithout an end\n2 more", given)) == [
        "line 5: 2, not none",
        "there is no line 6",
    ]
    assert list(claims_source.differences("one\n32K tokens\n\nno end\n\n1", given)) == ["line 2: 32K, not 16K"]


def test_lines_set_aside_have_no_row_and_a_reason() -> None:
    aside = [line for each in GIVEN.set_aside for line in each.lines]
    assert len(aside) == len(set(aside)) and not set(aside) & set(GIVEN.lines)
    assert all(each.why for each in GIVEN.set_aside)


def test_rows_are_in_the_order_of_the_document_and_in_a_section() -> None:
    lines = [claim.line for claim in GIVEN.claims]
    assert lines == sorted(lines)
    starts = [section.line for section in GIVEN.sections]
    assert starts == sorted(starts) and lines[0] >= starts[0]


def test_every_row_has_a_state_and_a_source() -> None:
    for claim in GIVEN.claims:
        assert claim.state in claims.STATES
        if claim.state == "not yet":
            assert claim.not_yet and not claim.sources, f"line {claim.line}"
        else:
            assert claim.sources, f"line {claim.line}"


def test_a_row_without_a_state_or_a_source_is_refused() -> None:
    plain = {"line": 1, "claim": "something", "claimed": "1"}
    for more in ({}, {"computed": "items"}, {"computed": "items", "not_yet": "more", "from": ("lines 1",)}):
        with pytest.raises(ValidationError):
            Claim.model_validate(plain | more)


def test_every_computation_exists_and_is_used() -> None:
    assert not claims.unused(GIVEN)
    assert not claims.COMPUTED.keys() & claims.MEASURED.keys()
    asked = set(claims.names_used(GIVEN))
    assert {name for state, name in asked if state == "computed"} == set(claims.COMPUTED)
    assert {name for state, name in asked if state == "measured"} == set(claims.MEASURED)


def test_what_is_measured_names_its_records() -> None:
    names = {record.name for record in records()}
    for claim in GIVEN.claims:
        if claim.state == "measured":
            of_pairs = [source.partition(" ")[2] for source in claim.sources if source.startswith("pair ")]
            cited = [source.partition(" ")[2] for source in claim.sources if source.startswith("record ")]
            trained = [source.partition(" ")[2] for source in claim.sources if source.startswith("training ")]
            of_all = "records h?00-*.json" in claim.sources
            assert set(cited) <= names and (cited or of_pairs or trained or of_all)
            arguments = claim.computation[1] if claim.computation else {}
            read = {one for pair in arguments.get("pairs", []) for one in pair} | {*arguments.get("names", [])}
            assert (read or {*arguments.values()}) == {*cited, *of_pairs, *trained}, (
                f"line {claim.line} reads other records than it names"
            )


def test_every_source_exists() -> None:
    known, plain = all_optimizations(), baseline()
    terms = {*plain.terms, *(name for each in known.values() for name in each.makes)}
    used: Counter[str] = Counter()
    for claim in GIVEN.claims:
        for source in claim.sources:
            kind, _, name = source.partition(" ")
            used[kind] += 1
            told = f"line {claim.line}: {source}"
            if kind == "term":
                assert name in terms, told
            elif kind == "optimization":
                assert name in known, told
            elif kind == "work":
                assert name in plain.work, told
            elif kind == "letter":
                assert name in BY_SYMBOL, told
            elif kind == "card":
                assert load_profile(name).id == name, told
            elif kind == "file":
                assert (ROOT / name).exists(), told
            elif kind == "record":
                assert (ROOT / "reports" / "validation" / f"{name}.json").is_file(), told
            elif kind == "pair":
                assert (ROOT / "reports" / "validation" / "pairs" / f"{name}.json").is_file(), told
            elif kind == "training":
                assert all((ROOT / "reports/quality/records" / f"{name}-{seed}.json").is_file() for seed in SEEDS), told
            elif kind == "records":
                assert list((ROOT / "reports" / "validation").glob(name)), told
            elif kind == "command":
                assert_a_command(name)
            else:
                assert kind in ("line", "lines"), told
                aside = {line for each in GIVEN.set_aside for line in each.lines}
                cited = [int(number) for number in re.findall(r"\d+", name.partition(":")[0])]
                assert cited and set(cited) <= {*GIVEN.lines, *aside}, told
    assert set(used) <= KINDS


def assert_a_command(text: str) -> None:
    """Whether `plan` has the command, and its options."""
    first, *words = shlex.split(text)
    assert first == "plan", text
    options = {name for option in cli.params if isinstance(option, click.Option) for name in option.opts}
    if words and not words[0].startswith("-"):
        assert words[0] in cli.commands, text
        return
    given = dict(zip(words[::2], words[1::2], strict=True))
    assert set(given) <= options, text
    assert load_profile(given["--gpu"]).id == given["--gpu"]
    assert 1 <= int(given.get("--tier", 1)) <= len(TIERS) and parse_count(given.get("--context", "1K")) > 0


@pytest.mark.parametrize(("card", "number"), [("rtx2060s", 1), ("rtx2060s", 5), ("rtx2060s", 9), ("rtx4090", 8)])
def test_a_tier_fits_where_the_plan_says_so_and_takes_as_long(card: str, number: int) -> None:
    plan = make_plan(Request(gpu=card, tier=number))
    told, seconds = claims_plans.verdict(card, number), plan.time.step_seconds.estimate
    if plan.verdict == "fits":
        assert seconds is not None and told == f"fits, about {format_seconds(seconds)} a step"
    else:
        assert told.startswith("does not fit")


def test_what_a_card_reaches_is_what_is_planned() -> None:
    plan = make_plan(Request(gpu="rtx2060s"))
    assert claims_plans.tier_of("rtx2060s") == plan.tier
    assert claims_plans.longest("rtx2060s") == plan.longest.all_trained
    assert claims_plans.best_run("rtx2060s").peak() == plan.memory.gpu.peak_bytes.expected


def test_the_least_memory_is_that_of_a_plan_for_least_memory() -> None:
    plan = make_plan(Request(gpu="rtx2060s", total_tokens=16384, objective="memory"))
    least = claims_plans.least_memory("rtx2060s", 16384, 16384, plan.lora_rank)
    assert int(least.high[0]) == plan.memory.gpu.peak_bytes.high


@pytest.mark.parametrize("given", GIVEN.memory, ids=lambda given: given.title.partition(":")[0])
def test_a_table_of_memory_leaves_no_term_out(given: claims_memory.MemoryTable) -> None:
    found = claims_memory.compute(given)
    groups = [group for part in given.parts for group in part.groups]
    assert len(groups) == len(set(groups)), "a group is counted twice"
    shown = sum(sum(found.of(part.groups).values()) for part in given.parts)
    others = {name.partition("/")[0] for name in found.terms} - set(groups)
    assert shown + sum(sum(found.of((group,)).values()) for group in others) == found.total
    assert found.bound > found.total


def test_the_tables_with_the_documents_items_leave_the_weights_on_the_card_and_are_leanest_so() -> None:
    for given in GIVEN.memory:
        if given.required:
            one = claims_memory.compute(given).one
            assert set(given.required) <= set(one.configuration.ids) and one.size("weights/linear") > 10**9
            least = claims_plans.least_memory("rtx2060s", given.tokens, given.target, given.rank)
            assert int(least.expected[0]) < one.peak()


def test_savings_are_those_of_the_tables_of_memory() -> None:
    before, after = (claims_memory.compute(given).total for given in GIVEN.memory[:2])
    assert claims_memory.less(GIVEN, 217, 229).value == (before - after) / 1e9
    with pytest.raises(AssertionError, match="line 1 is in no table"):
        claims_memory.less(GIVEN, 1, 229)


def test_a_tier_that_lacks_host_memory_alone_fits_with_so_much() -> None:
    enough = claims_plans.host_needed("rtx2060s", 8)
    assert enough is not None
    size = -(-int(enough.host[0]) // 2**30)
    assert f"tier 8 with {size} GiB of host RAM" in claims_plans.reach(GIVEN, "rtx2060s").text
    more, few = (make_plan(Request(gpu="rtx2060s", tier=8, host_bytes=each * 2**30)) for each in (size, size - 1))
    assert more.verdict == "fits" and few.verdict != "fits"


def test_the_root_of_all_layers_is_the_best_spacing_of_streamed_layers_alone() -> None:
    sizes = {layers: claims_terms.spaced(layers, 4096, 6) for layers in (1, 2, 6, 16)}
    assert min(sizes, key=lambda layers: sizes[layers]) == 6
    assert claims_terms.best_spacing(GIVEN, 4096, 6).holds == "in part"


def test_the_tiers_are_those_of_the_planner() -> None:
    assert [line.tier for line in GIVEN.tiers] == [tier.number for tier in TIERS]
    assert [line.rank for line in GIVEN.tiers] == [tier.rank for tier in TIERS]
    assert [f"{line.improvement}x" for line in GIVEN.tiers] == [tier.claimed_improvement for tier in TIERS]


def test_units_of_a_written_length() -> None:
    assert claims_tiers.unit("57K", 57_344) == "1000"
    assert claims_tiers.unit("32K", 32_768) == "1024"
    assert claims_tiers.unit("4K", 4_096) == "either"
    assert claims_tiers.unit("577K", 589_824) == "neither"
    assert claims_tiers.unit("512", 512) == "plain"


def test_written_lengths_add_up_or_not() -> None:
    assert claims_tiers.adds_up("4K", "512", "4.5K") == "yes"
    assert claims_tiers.adds_up("1M", "131K", "1.1M") == "yes"
    assert claims_tiers.adds_up("32K", "4K", "37K") == "no: 36K"


def claim(figure: object) -> Claim:
    given = {"line": 1, "claim": "c", "claimed": "f", "figure": figure, "computed": "items", "from": ("lines 1",)}
    return Claim.model_validate(given)


def test_whole_numbers_hold_exactly_and_others_within_five_percent() -> None:
    assert claim(43).holds(Found("", 44)) == "no" and claim(44).holds(Found("", 44)) == "yes"
    assert claim([8, 9]).holds(Found("", 9)) == "yes" and claim([8, 9]).holds(Found("", 4)) == "no"
    assert claim(1.26).holds(Found("", 1.218)) == "yes" and claim(2.1).holds(Found("", 0.0)) == "no"
    assert claim(12.31).holds(Found("", 12.31, arithmetic=True)) == "in part"
    assert claim(1.0).holds(Found("", 9.0, "yes")) == "yes", "what is found decides before figures do"
    assert claim(None).holds(Found("", 9.0)) is None


def test_numbers_in_sentences() -> None:
    assert listed([1, 4, 5, 6, 41]) == "1, 4–6, 41"
    assert scientific(1.76e17) == "1.8 × 10¹⁷"


def test_a_link_of_the_report_leads_somewhere() -> None:
    links = re.findall(r"\]\(([^)]+)\)", COMMITTED.read_text(encoding="utf-8"))
    assert links and not [link for link in links if not (COMMITTED.parent / link).exists()]


def test_no_row_of_the_report_is_empty() -> None:
    for line in COMMITTED.read_text(encoding="utf-8").splitlines():
        if line.startswith("| "):
            assert all(cell.strip() for cell in line.strip("|").split("|")), line
