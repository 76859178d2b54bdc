"""`plan validate`: does what plans promise hold on this machine?"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from planner.cli_lists import as_json
from planner.cli_output import console, plain_table, print_object
from planner.cli_request import DEFAULT_MODEL, all_of, given, made, once, planning_options, read_request
from planner.errors import PlanError, raise_all
from planner.units import format_seconds

if TYPE_CHECKING:
    from planner.measurements import Failure, Record
    from planner.plan import Plan
    from planner.validating import Job

HOLDS, DOES_NOT_HOLD = 0, 1
FOLDER = "validation"
OWN = ("rehearse", "model", "context", "count", "layers", "out", "again")
ASKED = ("gpu", "tier", "host_ram", "disk", "max_step_time", "with_", "without", "set_")
# Few steps, an evaluation and a save: every phase is met, and what comes after takes no more.
SHORT = {"steps": 2, "validation": 0.5, "evaluation_rows": 1}
STAGED = 3
"""Steps of each stage, where rows grow: in the last one more than are held to the bound."""


@click.command(short_help="Put plans to the test on this machine.")
@click.argument("files", nargs=-1, metavar="[PLAN]...")
@once("--rehearse", metavar="CARD", help="Plan for this card, and let the card that is here stand in for it.")
@planning_options(*ASKED[:1])
@click.option("--model", multiple=True, metavar="ID", help=f"Model; repeatable. [{DEFAULT_MODEL}]")
@click.option("--context", multiple=True, metavar="TOKENS", help="Length of a sequence; repeatable. [best tier]")
@planning_options(*ASKED[1:])
@click.option("--count", is_flag=True, help="Run nothing: count the bytes of a step's tensors that hold no data.")
@once("--layers", metavar="N", help="Of models whose layers run one by one the first N alone. [all; counted, 2]")
@once("--out", metavar="FOLDER", help=f"Where plans and records go, and what is done already is found. [{FOLDER}]")
@click.option("--again", is_flag=True, help="Run those that have a record, too.")
@once("--report", metavar="FOLDER", help="Run nothing, and tell what records say; --out FILE.md makes a page of it.")
@as_json
def validate(files: Sequence[str], report: str | None, json_: bool, **options: Any) -> int:
    """Put plans to the test: what they take on this machine, beside what they said before.

    Each is trained for two steps on made-up text, in a process of its own, and gets no more memory than its bound; an
    evaluation and a save are part of it. Models that come along get random weights, which take as much. Where there is
    no card the bytes of a step are counted instead, tensor by tensor, with the libraries that are installed.

    \b
    plan validate plan.yaml
    plan validate --gpu local --model llama-3.2-1b --model qwen3-1.7b --context 4K --context 16K
    plan validate --rehearse rtx2060s --context 16K
    plan validate --report validation
    plan validate --report validation --out validation.md

    --rehearse gives the card that is here the number type, kernels and workspace of another, and no more memory than
    the bound of that one's plan. Memory is then that of the planned card; seconds and the context are not.

    --json prints one object: runs, failed (name and why; what does not fit is among them), and summary, which has for
    allocated, reserved, driver, pinned, host_expected, host and time the count of runs, under (how many took more than
    was said), and median, percentile_95 and largest error, as shares of what was measured.

    Exit codes: 0 all within their bounds of card and host, 1 not all, 2 bad input.
    """
    from planner.measurements import read_failures, read_records

    if report is not None:
        folder = _folder(report, files, options)
        records, failures = list(read_records(folder)), list(read_failures(folder))
        if not records and not failures:
            raise PlanError(f"--report {report}", "holds no record of a run.", "`plan validate` writes some.")
        if options["out"] is not None:
            from planner.validation_page import write_page

            for written in write_page(Path(options["out"]), records, failures):
                click.echo(f"Written: {written}", err=True)
    else:
        records, failures = _put_to_the_test(files, options, tell=not json_)
    if json_:
        from planner.validation_report import document

        print_object(document(records, failures))
    else:
        _print(records, failures, rows=report is not None)
    return HOLDS if not failures and all(record.within for record in records) else DOES_NOT_HOLD


def _folder(report: str, files: Sequence[str], options: dict[str, Any]) -> Path:
    others = [*given(options), *(f"--{name}" for name in OWN if options[name] and name != "out"), *files]
    if others:
        raise PlanError(f"--report with {others[0]}", "runs nothing.", "Drop one of them.")
    if options["out"] is not None:
        from planner.validation_page import check_page

        check_page(Path(options["out"]))
    if not Path(report).is_dir():
        raise PlanError(f"--report {report}", "is no folder.", f"`plan validate` writes to {FOLDER} unless told.")
    return Path(report)


def _put_to_the_test(
    files: Sequence[str], options: dict[str, Any], *, tell: bool
) -> tuple[list[Record], list[Failure]]:
    from planner.measurements import Failure, Record
    from planner.validating import card_here
    from planner.validating import validate as validated

    layers = _layers(options["layers"])
    plans, refused = (_from_files(files, options), {}) if files else _from_options(options)
    jobs = _jobs(plans, card_here(), options)
    if not options["count"] and any(job.how == "count" for job in jobs):
        click.echo("No card here: bytes are counted, on tensors that hold no data.", err=True)
    records: list[Record] = []
    failures = [Failure(name, f"left out: {summary}") for name, summary in refused.items()]
    folder = Path(options["out"] or FOLDER)
    found = validated(jobs, folder, layers=layers, again=options["again"])
    for number, job in enumerate(jobs, 1):
        with _waiting(f"{number} of {len(jobs)}: {job.plan.model.id}, {job.plan.total_tokens:,} tokens"):
            _, told, seconds = next(found)
        if isinstance(told, Record):
            records.append(told)
        else:
            failures.append(told)
        if tell:
            _tell_one(told, seconds, folder)
    return records, failures


def _layers(text: str | None) -> int | None:
    if text is None:
        return None
    if not text.isdecimal() or int(text) < 1:
        raise PlanError(f"--layers {text}", "is no number of layers.", "Try --layers 2.")
    return int(text)


def _jobs(plans: Sequence[tuple[str | None, Plan]], here: str, options: dict[str, Any]) -> list[Job]:
    """What is done with each plan, every mistake at once."""
    from planner.validating import how_for, job_of

    errors: list[PlanError] = []
    jobs: dict[str, Job] = {}
    for name, plan in plans:
        try:
            how = how_for(plan, here, rehearse=options["rehearse"] is not None, count=bool(options["count"]))
            job = job_of(plan, how, name)
        except PlanError as error:
            errors += [each for each in all_of(error) if str(each) not in map(str, errors)]
            continue
        if job.name in jobs:
            why = f"would have the record of another: {job.name}."
            errors.append(PlanError(name or plan.model.source, why, "Run one of them with another --out."))
        jobs[job.name] = job
    raise_all(errors)
    return list(jobs.values())


def _from_files(files: Sequence[str], options: dict[str, Any]) -> list[tuple[str | None, Plan]]:
    from planner.plan_file import load_plan
    from planner.planning import read_gpu

    complete = "a plan file is complete already."
    typed = [*given(options), *(f"--{name}" for name in ("model", "context") if options[name])]
    errors = [PlanError(f"{files[0]} with {name}", complete, f"Drop {name}.") for name in dict.fromkeys(typed)]
    plans: list[tuple[str | None, Plan]] = []
    card = options["rehearse"]
    for file in files:
        try:
            plan = load_plan(Path(file))
            if card is not None and read_gpu(card).id != plan.gpu.id:
                raise PlanError(f"--rehearse {card} with {file}", f"that plan is for {plan.gpu.id}.")
            if plan.verdict == "does-not-fit":
                raise PlanError(file, f"says of itself that it does not fit: {plan.summary}")
        except PlanError as error:
            errors += [each for each in all_of(error) if str(each) not in map(str, errors)]
            continue
        plans.append((Path(file).stem, _shortened(plan, SHORT)))
    raise_all(errors)
    return plans


def _shortened(plan: Plan, settings: Mapping[str, Any]) -> Plan:
    """The plan with these settings of training, and with as many steps as its stages need."""
    stages = int(plan.knobs("context_stages").get("stages") or 0)
    steps = {"steps": STAGED * stages} if stages else {}
    return plan.model_copy(update={"train": plan.train.model_copy(update={**settings, **steps})})


def _from_options(options: dict[str, Any]) -> tuple[list[tuple[str | None, Plan]], dict[str, str]]:
    """A plan for every model at every length, all mistakes at once; and what does not fit, with the reason."""
    asked, card = options["gpu"], options["rehearse"]
    if asked is not None and card is not None:
        raise PlanError(f"--gpu {asked} with --rehearse {card}", "each names the card to plan for.", "Drop one.")
    if asked is None and card is None:
        nearest = "--gpu local plans for the card that is here, --rehearse rtx2060s for another."
        raise PlanError("plan validate", "names neither a plan nor a card.", nearest)
    errors: list[PlanError] = []
    refused: dict[str, str] = {}
    plans: list[tuple[str | None, Plan]] = []
    for model in dict.fromkeys(options["model"] or (DEFAULT_MODEL,)):
        for context in dict.fromkeys(options["context"] or (None,)):
            one = {**options, "gpu": asked or card, "model": model, "context": context}
            wrong: list[PlanError] = []
            request = read_request(one, wrong)
            try:
                plan = made(replace(request, train={**SHORT, **request.train}), wrong)
            except PlanError as error:
                errors += [each for each in all_of(error) if str(each) not in map(str, errors)]
                continue
            if plan.verdict == "does-not-fit":
                refused[f"{plan.gpu.id}-{plan.model.id}-{plan.total_tokens}"] = plan.summary
            else:
                plans.append((None, plan if "steps" in request.train else _shortened(plan, {})))
    if not plans and not errors:
        errors += [PlanError("plan validate", f"there is nothing to run. {summary}") for summary in refused.values()]
    raise_all(errors)
    return plans, refused


@contextmanager
def _waiting(what: str) -> Iterator[None]:
    """A line on standard error while something runs, where that is a terminal."""
    if not sys.stderr.isatty():
        yield
        return
    from rich.console import Console

    with Console(stderr=True).status(what):
        yield


def _tell_one(told: Record | Failure, seconds: float | None, folder: Path) -> None:
    from planner.measurements import Record
    from planner.validation_report import figures

    if isinstance(told, Record):
        took = f"{told.how} before" if seconds is None else f"{told.how} in {format_seconds(seconds)}"
        expected, measured, error, left = figures(told)
        click.echo(f"{told.name}: {took}. Expected {expected}, took {measured} ({error}); left of the bound: {left}.")
    else:
        click.echo(f"{told.name}: no record. {told.told} All it said: {folder / told.name}.failed.txt")


def _print(records: Sequence[Record], failures: Sequence[Failure], *, rows: bool) -> None:
    from planner.report import print_parts
    from planner.validation_report import HEADS, row, sentences

    parts: list[Any] = []
    if rows:
        table = plain_table(*HEADS, right=(HEADS[2], *HEADS[4:]))
        for column in table.columns[:2]:
            column.overflow = "fold"  # an id that is cut short names nothing
        for record in records:
            table.add_row(*row(record))
        parts += [table, ""]
    print_parts(console(), [*parts, *sentences(records, failures)])
