"""The page on the grid: what is in its figures and what is not, seconds, and what the first running said."""

from __future__ import annotations

import json
from functools import cache

import numpy as np
import pytest
from grid_fixture import CASE, FIRST, FOLDER, LONGER, MEASURED, MEASURED_FIRST, SECOND, failed_names, frozen, pair_names

from planner.calibration import calibration
from planner.markdown import percent
from planner.measurements import Record, Spread, read_failures, read_records
from planner.units import format_bytes
from planner.validation_page import spread_cells
from reports.render import grid as grid_page
from reports.render import grid_again, grid_first, grid_records, grid_time, peers, replayed
from reports.validation import replay
from reports.validation.fit import run_of
from reports.validation.grid import EXCLUDED, FAILED, FRESH, GRID, NEW
from reports.validation.peers import by_accelerate
from reports.validation.several import is_timed

ROOT = FOLDER.parents[2]


@cache
def page() -> str:
    """The whole page, made once."""
    return grid_page.text()


def test_longer_sequences_are_in_no_figure() -> None:
    found, failures = grid_records.found()
    assert {record.name for record in found} == {*MEASURED} - LONGER - {*EXCLUDED}
    assert not failures and {failure.name for failure in read_failures(FOLDER)} <= LONGER
    assert {f"{name}-longest" for name in pair_names()} <= {record.name for record in found}
    assert "-beyond" not in page()
    assert f"({' and '.join(grid_page.FROZEN)})" in page()


def test_the_sets_of_the_page_are_told_with_what_is_new_by_itself() -> None:
    (_, _, held), (_, _, new), (_, _, fresh), (_, _, fitted) = grid_page.sets_of(grid_records.found()[0])
    assert {record.name for record in new} == {*NEW} < {record.name for record in held}
    assert {record.name for record in fresh} == {*FRESH} < {record.name for record in held}
    assert len(held) + len(fitted) == len(grid_records.found()[0])
    text = page()
    for title, of in (("Held out of every fit", held), *zip(grid_page.WITHIN, (new, fresh), strict=True)):
        models = len({record.content["model"]["id"] for record in of})
        assert f"### {title}: {len(of)} runs of {models} models" in text
        largest = max(abs(record.error) for record in of)
        (row,) = (row for row in _under(text, title) if row.startswith("| expected peak against"))
        assert f"| {100 * largest:.2f} % |" in row, "nothing is taken out of it"


def _under(text: str, title: str) -> list[str]:
    """The lines below a heading, as far as the next one."""
    return text.partition(f"### {title}: ")[2].partition("\n#")[0].splitlines()


def test_what_was_taken_with_the_whole_budget_is_told() -> None:
    taken = [
        record.before_held["reserved_bytes"] - frozen(name).memory.gpu.peak_bytes.high
        for name, record in MEASURED.items()
        if record.before_held
    ]
    more = [size for size in taken if size > 0]
    told = f"more than the bound in {len(more)} of {len(taken)} runs, by at most {format_bytes(max(more))}; held to"
    assert f"* With the whole card's budget the allocator took {told}" in page()
    assert f" and {len(taken)} in the last 2 steps, saving and evaluation" in page()


TIMED = [record for record in grid_records.found()[0] if grid_time.is_timed(record)]


def test_a_launch_as_the_constant_has_it_changes_no_estimate_and_a_slower_one_makes_none_shorter() -> None:
    assert {record.name for record in TIMED} == {
        name for name in {*MEASURED} - LONGER if is_timed(CASE[name]) and MEASURED[name].alone
    }
    record, constant = TIMED[0], calibration().launch_seconds()
    run = run_of(record)
    at = {
        factor: run.estimated(grid_time.with_values(grid_time.LAUNCH, np.array([factor * constant])))["step"]
        for factor in (0.5, 1, 2, 20)
    }
    assert at[1] == run.estimated(calibration())["step"] and at[0.5] <= at[1] <= at[2] < at[20]
    own = grid_time.launch_seconds(record)
    assert own == record.content["launches"]["seconds"] / record.content["launches"]["kernels"]
    today, by_host = grid_time.estimates(record.name)
    assert today == at[1] and (by_host <= today) is (own <= constant)


def test_the_page_tells_of_seconds_with_what_a_launch_took_each_host() -> None:
    held = [record for record in TIMED if record.content["set"] == "holdout"]
    pairs = [(grid_time.estimates(record.name)[1], record.content["step_seconds"]["median"]) for record in held]
    spread = Spread.of(pairs)
    assert spread is not None and spread.count >= 40
    cells = " | ".join(("held out of every fit", grid_time.BY_HOST, *spread_cells(spread)))
    assert f"| {cells} |" in page()
    by_what = grid_page.by_what_and_set(grid_records.found()[0])
    assert by_what[grid_time.BY_HOST]["held out of every fit"] == spread_cells(spread)
    rehearsed = next(record for record in MEASURED.values() if record.how == "rehearsed")
    assert grid_time.launch_seconds(rehearsed) is None and not grid_time.is_timed(rehearsed)


def test_steps_that_wait_for_the_host_are_told_apart_from_those_that_wait_for_the_card() -> None:
    held = [record for record in TIMED if record.content["set"] == "holdout"]
    waits = {record.name: grid_time.launch_bound(record.name) for record in held}
    assert waits["h200-8gib-gpt2-512-bf16"] and not waits["h200-24gib-qwen3-4b-32768-offload"]
    for told, launch_bound in ((grid_time.ON_CARD, False), (grid_time.ON_HOST, True)):
        pairs = [(record.step[1], record.step[0]) for record in held if waits[record.name] is launch_bound]
        spread = Spread.of([(float(estimate or 0), float(measured or 0)) for estimate, measured in pairs])
        assert spread is not None and spread.count >= 20
        cells = " | ".join(("held out of every fit", told, *spread_cells(spread)))
        assert f"| {cells} |" in page()
    assert 1 < grid_time.unsteady(TIMED) < 5


def test_the_page_tells_of_the_first_running_and_which_of_its_failures_end_now() -> None:
    failed = {failure.name for failure in read_failures(FIRST)} - LONGER
    assert failed == {
        "h200-12gib-phi-3.5-mini-16384-small",
        "h200-8gib-phi-3.5-mini-1024-small",
        "rtx2060s-phi-3.5-mini-2048-whole",
        "rtx3060-12gb-phi-2-4096-whole",
        "rtx3060-12gb-phi-3.5-mini-2048-whole",
    }
    ended = {name for name in failed if MEASURED[name].held_to_bound and MEASURED[name].over <= 0}
    section = grid_first.section()
    assert section in page() and f"and {len(ended)} end now on the card, within it" in section
    for name in failed:
        assert f"| {name} | {grid_first.GAPS} | ran, held to its bound " in section
    again = [name for name in MEASURED if name in MEASURED_FIRST and _layers(MEASURED[name]) != _first_layers(name)]
    for name in again:
        then, now = (percent(each[name].error) for each in (MEASURED_FIRST, MEASURED))
        assert f"| {name} | {_first_layers(name)} | {then} | {_layers(MEASURED[name])} | {now} |" in section
    assert any(not record.shows_the_peak for record in MEASURED_FIRST.values()) and again


def _layers(record: Record) -> str:
    return f"{record.content['layers_run']} of {record.content['layers']}"


def _first_layers(name: str) -> str:
    return _layers(MEASURED_FIRST[name])


def test_peaks_that_are_far_off_are_named_with_what_is_planned_today() -> None:
    told = grid_page.far_off()
    far = [record for record in grid_records.found()[0] if abs(record.error) > grid_page.FAR]
    for record in far:
        today = grid_records.planned_again(record.name).memory.gpu.peak_bytes.expected / record.allocated - 1
        assert f"{record.name} by {percent(record.error)}, today {percent(today)}" in told
    assert told.count(", today ") == len(far) and told in page()


def test_what_was_made_once_more_is_told_with_both_errors() -> None:
    section = grid_again.section()
    before = {record.name: record for record in read_records(SECOND)}
    for name, then in before.items():
        now = MEASURED[name]
        assert f"| {name} | {percent(then.error)} | " in section
        assert f"| {percent(now.error)} | {format_bytes(-now.over)} |" in section
    (over,) = (record for record in before.values() if record.over > 0)
    first = max(abs(before.get(name, record).error) for name, record in MEASURED.items() if name not in LONGER)
    note = grid_again.sentence()
    assert f"the largest error of an expected peak was {100 * first:.2f} %" in note and first > 0.12
    assert f"1 of {len(grid_records.found()[0])} reserved more than its bound, by {format_bytes(over.over)}" in note
    assert f"## All together\n\n{note}\n\n###" in page(), "before any figure"
    assert note.partition(" All of them")[0] in (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"reserved {format_bytes(over.over)} more" in section and "| −" in section
    assert f"made once more, {len(before) - 1} in all" in section and section in page()


def test_replays_are_of_the_first_running_and_say_what_came_of_them_since() -> None:
    runs = json.loads(replayed.FOUND.read_text(encoding="utf-8"))["runs"]
    assert {*runs} <= {*replay.names()} and FIRST == replay.FOLDER
    for name, run in runs.items():
        assert run["high"] == frozen(name, FIRST).memory.gpu.peak_bytes.high
        assert ("measured" in run) is (name in MEASURED_FIRST)
    tried = [name for name in runs if name in MEASURED or name in failed_names()]
    ended = [name for name in tried if name in MEASURED]
    assert f"{len(tried)} of them have been run on a card since, and {len(ended)} ended; " in replayed.section()


def test_the_page_names_every_run_that_is_not_in_its_figures() -> None:
    text = page()
    for name in (*EXCLUDED, *FAILED):
        assert f"| {name} | " in text, name
    missing = [case.name for case in GRID if case.name not in MEASURED and case.name not in failed_names()]
    assert all(f"| {name} | not run yet | " in text for name in missing)
    assert text.count("](validation-") == len(grid_page.drawn()) == 4


def test_what_other_estimators_say_is_of_the_same_runs() -> None:
    found = json.loads(peers.FOUND.read_text(encoding="utf-8"))["runs"]
    whole = {record.name: record for record in grid_records.found()[0] if record.content["executor"] == "resident"}
    assert {*found} == {*whole}
    for name, run in found.items():
        assert (run["measured"], run["planned"]) == (whole[name].allocated, whole[name].expected)
        assert all(
            size is None or size > 0
            for each in run["peers"].values()
            if "refused" not in each
            for size in each.values()
        )
    assert peers.section() in page()


def test_accelerate_says_of_a_model_what_its_own_table_says() -> None:
    record = MEASURED["h200-24gib-phi-3.5-mini-4096-bf16"]
    said = by_accelerate(record)
    parameters = record.content["plan"]["model"]["parameters"]
    assert said["nearest"] == pytest.approx(2 * parameters, rel=0.01)  # 16 bits
    assert said["training"] == pytest.approx(2 * 4 * parameters, rel=0.01)  # two states in float32, the largest it has
