"""The command `plan`: options in, answers out, exits with 0 (fits), 1 (does not fit) or 2 (bad input)."""

from __future__ import annotations

import os
import sys
import tempfile
import traceback
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from planner import __version__
from planner.cli_check import check, planned_again
from planner.cli_generate import generate
from planner.cli_lists import explain, gpus, models, schema
from planner.cli_measure import measure
from planner.cli_merge import merge
from planner.cli_optimizations import optimizations
from planner.cli_output import check_target, console, print_json, write_plan
from planner.cli_pool import pool_heads
from planner.cli_request import (
    OPTIONS,
    Options,
    all_of,
    given,
    home_expanded,
    is_given,
    made,
    once,
    option_name,
    planning_options,
    read_request,
)
from planner.cli_tables import matrix, pareto, tiers
from planner.cli_validate import validate
from planner.errors import PlanError, raise_all

if TYPE_CHECKING:
    from planner.plan import Plan

FITS, DOES_NOT_FIT, CANNOT_TELL, INTERRUPTED, PIPE_CLOSED = 0, 1, 2, 130, 141
UNREAD = "a plan file that could not be read"
EXIT_CODES = {"fits": FITS, "does-not-fit": DOES_NOT_FIT}


class ReaderGone(Exception):
    """Whoever read standard output has stopped, as ``plan gpus | head -1`` does."""


class _Plan(click.Group):
    """A group that tells of a closed pipe; click would exit with 1: does not fit."""

    def make_context(self, *arguments: Any, **more: Any) -> click.Context:
        try:
            return super().make_context(*arguments, **more)
        except BrokenPipeError as error:
            raise ReaderGone from error

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError as error:
            raise ReaderGone from error


@click.group(
    cls=_Plan,
    invoke_without_command=True,
    no_args_is_help=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@planning_options(*OPTIONS)
@once("--out", metavar="FILE", help="Write the plan to this file (YAML).")
@click.option("--json", "json_", is_flag=True, help="Print the plan as one JSON object, and no report.")
@click.option("--execute", is_flag=True, help="Train what was planned; without --gpu, plan for this machine first.")
@click.option("--resume", is_flag=True, help="Go on with a run that was stopped, in the plan's folder.")
@click.option("--replan", is_flag=True, help="Where the probe step takes too much, plan again with less and train.")
@once("--plan", "plan_", metavar="FILE", help="Take the plan from this file instead of making one.")
@click.version_option(__version__, "--version", prog_name="tierplan", message="%(prog)s %(version)s")
@click.pass_context
def cli(context: click.Context, /, **options: Any) -> int:
    """Plan the longest context that a graphics card can fine-tune a language model on, and train it.

    \b
    plan --gpu rtx2060s                             what can an RTX 2060 SUPER train of Phi-2?
    plan --gpu rtx4090 --model llama-3.1-8b         and an RTX 4090 of Llama 3.1 8B?
    plan --gpu rtx4090 --context 64K                do 65,536 tokens fit?
    plan --gpu local --out plan.yaml                plan for the card of this machine
    plan --plan plan.yaml --execute --data ./repo   train exactly that

    Exit codes: 0 fits, 1 does not fit, 2 bad input or cannot tell.
    """
    if context.invoked_subcommand is not None:
        _refuse_misplaced(context, options)
        return FITS
    if not any(map(is_given, options.values())):
        click.echo(context.get_help())
        return FITS
    if options["plan_"] is not None:
        plan = _from_file(options)
        if options["execute"] and (now := planned_again(plan)).verdict != "fits":
            _tell(f"--execute: nothing was trained. Planned again today, the plan does not fit. {now.summary}")
            return EXIT_CODES[now.verdict]
        return _use(plan, options)
    if options["gpu"] is None and not options["execute"]:
        nearest = "Add --gpu ID (`plan gpus` lists them), --gpu local or --gpu cpu."
        raise PlanError(" ".join(["plan", *given(options)]), "names no card.", nearest)
    return _use(_planned(options), options)


cli.add_command(gpus)
cli.add_command(models)
cli.add_command(optimizations)
cli.add_command(explain)
cli.add_command(check)
cli.add_command(measure)
cli.add_command(merge)
cli.add_command(generate)
cli.add_command(pool_heads)
cli.add_command(schema)
cli.add_command(tiers)
cli.add_command(matrix)
cli.add_command(pareto)
cli.add_command(validate)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and give its exit code; a user never sees a traceback."""
    if sys.stdout is None:  # closed before we began, as by >&-: nobody reads, and the exit code still tells
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal that cannot show "≥" is no reason to stop
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        code = cli.main(args=words, prog_name="plan", standalone_mode=False)
        sys.stdout.flush()
        return int(code or 0)
    except PlanError as error:
        _tell(*map(str, all_of(error)))
        if "--json" in words:
            print_json(_unknown(all_of(error)))
    except click.ClickException as error:
        _tell(error.format_message(), hint=_hint(error))
    except (click.Abort, KeyboardInterrupt):
        _tell("interrupted.")
        return INTERRUPTED
    except (ReaderGone, BrokenPipeError):
        return _pipe_closed()
    except OSError as error:
        _tell(f"{error.filename or 'the system'}: {error.strerror or error}.")
    except Exception as error:  # a traceback exits with 1, and a mistake of ours must not say "does not fit"
        _tell(f"tierplan made a mistake: {type(error).__name__}: {error}", hint=_keep_traceback())
    return CANNOT_TELL


def _unknown(errors: Sequence[PlanError]) -> str:
    """The JSON object that stands in a plan's place, for a reader who asked for one."""
    from planner.plan import Mistake, Unknown

    return Unknown(errors=[Mistake(asked=each.asked, why=each.why, nearest=each.nearest) for each in errors]).to_json()


def _planned(options: Options) -> Plan:
    """The plan that the options ask for, with every mistake in them reported together."""
    errors: list[PlanError] = []
    if options["gpu"] is None:
        options = {**options, "gpu": _this_machine()}
    request = read_request(options, errors)
    errors += _output_mistakes(options, request.train.get("data"))
    return made(request, errors)


def _from_file(options: Options) -> Plan:
    """The plan in a file, unchanged but for data where the file names none."""
    from planner.plan_file import load_plan

    complete = "a plan file is complete already."
    errors = [
        PlanError(f"--plan with {name}", complete, f"Drop {name}, or --plan to plan anew.")
        for name in given(options)
        if name != "--data"
    ]
    plan = None
    try:
        plan = load_plan(Path(options["plan_"]))
    except PlanError as error:
        errors += all_of(error)
    data = home_expanded(options["data"])
    if plan is not None and data and plan.train.data not in (None, data):
        why = f"the plan trains on {plan.train.data}, and a plan file is run unchanged."
        errors.append(PlanError(f"--data {data}", why, "Drop --data, or change train.data in the file."))
    # Of a file that cannot be read it is not known whether it names data: nothing is said of that.
    errors += _output_mistakes(options, data or (plan.train.data if plan is not None else UNREAD))
    raise_all(errors)
    assert plan is not None
    return plan.model_copy(update={"train": plan.train.model_copy(update={"data": data})}) if data else plan


def _output_mistakes(options: Options, data: object) -> list[PlanError]:
    errors = []
    if options["out"] is not None:
        try:
            check_target(Path(options["out"]).expanduser())
        except PlanError as error:
            errors.append(error)
    if not options["execute"]:
        if options["resume"]:
            nearest = "`plan --plan FILE --execute --resume` does."
            errors.append(PlanError("--resume", "goes on with a run, and nothing here runs one.", nearest))
        if options["replan"]:
            why = "is for a run that takes more than was planned, and nothing here runs one."
            errors.append(PlanError("--replan", why, "Add --execute."))
        return errors
    if options["json_"]:
        why = "--json prints one object and nothing else, and training prints its progress."
        errors.append(PlanError("--execute with --json", why, "The run's folder holds measurement.json."))
    if not data:
        nearest = "--data PATH names a folder or a file."
        errors.append(PlanError("--execute", "there is nothing to train on.", nearest))
    elif data != UNREAD and not Path(str(data)).expanduser().exists():
        errors.append(PlanError(f"--data {data}", "there is no such file or folder."))
    return errors


def _use(plan: Plan, options: Options) -> int:
    """Write, print and run a plan, as far as the options ask for it."""
    written = Path(options["out"]).expanduser() if options["out"] is not None else None
    if written is not None:
        write_plan(plan, written)
    if options["json_"]:
        print_json(plan.to_json())
    else:
        from planner.report import print_report

        print_report(plan, console(), written=written, closing=not options["execute"])
    return _execute(plan, options) if options["execute"] else EXIT_CODES[plan.verdict]


def _execute(plan: Plan, options: Options) -> int:
    if plan.verdict != "fits":
        _tell(f"--execute: nothing was trained. {plan.summary}")
        return EXIT_CODES[plan.verdict]
    sys.stdout.flush()
    try:
        from trainer.run import execute
    except ImportError as error:
        nearest = "pip install 'tierplan[train]' brings it."
        raise PlanError("--execute", f"training needs the train extra ({error}).", nearest) from error
    # A plan in a file is run as it stands.
    choose, replan = options["plan_"] is None, "always" if options["replan"] else "late"
    return int(execute(plan, resume=options["resume"], choose=choose, replan=replan))


def _this_machine() -> str:
    """``local``, or ``cpu`` with a word about why."""
    from planner.machine import detect_local

    try:
        detect_local()
    except PlanError as error:
        click.echo(f"No card to train on: {error.why} Planning for the CPU.", err=True)
        return "cpu"
    return "local"


def _refuse_misplaced(context: click.Context, options: Options) -> None:
    """An option before a subcommand would be lost without a word."""
    misplaced = [option_name(name) for name, value in options.items() if is_given(value)]
    if misplaced:
        command = f"plan {context.invoked_subcommand}"
        nearest = f"`{command} --help` lists those it takes."
        raise PlanError(f"plan {misplaced[0]} … {context.invoked_subcommand}", "options come after it.", nearest)


def _tell(*messages: str, hint: str = "") -> None:
    for message in messages:
        click.echo(f"error: {message}", err=True)
    if hint:
        click.echo(hint, err=True)


def _hint(error: click.ClickException) -> str:
    context = getattr(error, "ctx", None)
    return f"`{context.command_path if context else 'plan'} --help` lists what there is."


def _keep_traceback() -> str:
    """Put the traceback where a report of the mistake can quote it; call while the exception is handled."""
    try:
        handle, name = tempfile.mkstemp(prefix="tierplan-", suffix=".txt")
        with open(handle, "w", encoding="utf-8") as file:
            traceback.print_exc(file=file)
    except OSError as error:
        return f"Its details could not be kept: {error}."
    return f"Please report it; the details are in {name}."


def _pipe_closed() -> int:
    """Whoever read the output has stopped: no error of anybody's."""
    with suppress(OSError, ValueError):  # of a stream without a file beneath; that one is not flushed at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return PIPE_CLOSED
