"""`plan generate`: text written with the adapter of a finished run, in memory that is planned first."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from planner.cli_check import card_of
from planner.cli_output import print_object
from planner.cli_request import once
from planner.errors import PlanError, did_you_mean
from planner.finished import plan_of_run
from planner.units import format_bytes, format_seconds, parse_count

if TYPE_CHECKING:
    from planner.generating import Generation, Keeping
    from planner.optimizations.base import Situation
    from planner.plan import Plan
    from trainer.generating import Written

KEPT = {"card": "on the card", "host": "in host memory", "int8": "on the card, in eight bits"}
MOST_TOKENS = 2**26


@click.command(short_help="Write text with the adapter of a run.")
@click.argument("run", type=click.Path(path_type=Path))
@click.argument("prompt", required=False)
@once("--file", metavar="FILE", help="Read the prompt from a file; - is standard input.")
@once("--prompt-tokens", metavar="N", help="Only tell what a prompt of N tokens would take, 32K say.")
@once("--tokens", metavar="N", help="Write N tokens at most [256].")
@once("--cache", metavar="card|host|int8", help="How keys and values are kept [card; host where that has no room].")
@once("--temperature", metavar="T", help="How freely tokens are drawn; 0 takes the likeliest each time [0].")
@once("--top-p", metavar="P", help="Draw among the likeliest, which together have this probability [1].")
@once("--seed", metavar="N", help="Of what is drawn [0].")
@click.option("--base", is_flag=True, help="Write with the plan's model, without the adapter.")
@click.option("--chat", is_flag=True, help="Put the prompt as a user's message, by the model's chat template.")
@click.option("--json", "json_", is_flag=True, help="Print one JSON object in the end, and nothing before.")
def generate(run: Path, prompt: str | None, json_: bool, **options: Any) -> int:
    """Write on from PROMPT with the adapter of a finished run; RUN is its folder (train.out).

    What it takes is told before the model is loaded: weights as they were trained with, and keys and values of prompt
    and new tokens, which are kept on the card or, where that has no room, in host memory. `--cache int8` rounds them,
    which takes half as much and may change what is written. A long prompt is read in pieces, so nothing else grows with
    it. It needs the train extra, but for --prompt-tokens.

    \b
    plan generate runs/phi-2-18432 "def quicksort(items):"
    plan generate runs/phi-2-18432 "def quicksort(items):" --base
    plan generate runs/phi-2-18432 --file question.txt --tokens 1K --temperature 0.7
    plan generate runs/phi-2-18432 --prompt-tokens 32K
    """
    from planner.generating import choose  # not with every other command

    run = run.expanduser()
    asked = [name for name, value in (("PROMPT", prompt), ("--file", options["file"])) if value is not None]
    asked += ["--prompt-tokens"] if options["prompt_tokens"] is not None else []
    if len(asked) != 1:
        why = f"are {len(asked)} prompts." if asked else "has no prompt."
        told = " and ".join(asked) if asked else f"plan generate {run}"
        raise PlanError(told, why, "Give PROMPT, --file FILE, or --prompt-tokens N to be told what it would take.")
    new, keeping = _count("--tokens", options["tokens"] or "256"), _keeping(options["cache"])
    sampling = _sampling(options)
    plan = plan_of_run("plan generate", run)
    situation = _situation(plan)
    if options["prompt_tokens"] is not None:
        found = choose(plan, situation, _count("--prompt-tokens", options["prompt_tokens"]), new, keeping)
        if json_:
            print_object(_document(plan, found))
        else:
            click.echo(told_of(plan, found))
        return 0
    text = prompt if prompt is not None else _read(options["file"])
    if not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text):
        raise PlanError("the prompt", "is no text in UTF-8.", "--file FILE reads one from a file.")
    try:
        from trainer.generating import Prompt, Sampling, quietly, write
    except ImportError as error:
        nearest = "pip install 'tierplan[train]' brings it."
        raise PlanError("plan generate", f"generating needs the train extra ({error}).", nearest) from error
    with quietly(bars=sys.stderr.isatty() and not json_):
        tokens = Prompt(plan, text, chat=options["chat"])
        found = choose(plan, situation, len(tokens.tokens), new, keeping)
        how: dict[str, Any] = {"sampling": Sampling(*sampling), "adapter": not options["base"]}
        if json_:
            written = write(plan, run, tokens, found, **how)
            print_object(_document(plan, found) | {"base": options["base"], "written": asdict(written)})
            return 0
        click.echo(told_of(plan, found), err=True)
        begin = "" if options["chat"] else text
        with _reading(found.prompt) as (read, stop):

            def say(piece: str) -> None:
                stop()  # before anything is written, which a bar that is drawn anew would wipe off the terminal
                _say(piece)

            written = write(plan, run, tokens, found, **how, begin=begin, say=say, read=read)
    click.echo()
    click.echo(_told_after(written), err=True)
    return 0


def told_of(plan: Plan, found: Generation) -> str:
    """What is planned, in sentences."""
    kept = sum(found.card.get(name, 0) for name in ("attention/cache", "attention/cache_scales", "attention/windows"))
    kept += found.host.get("attention/cache", 0)
    where = "host" if found.kind == "cpu" else "card"
    needs, there = (found.host_high, found.host_budget) if found.kind == "cpu" else (found.high, found.budget)
    ways = KEPT | ({"card": "in memory", "int8": "in memory, in eight bits"} if found.kind == "cpu" else {})
    told = (
        f"{plan.model.id} on {plan.gpu.name}: {_tokens(found.prompt)} to read, {found.new:,} to write at most. The "
        f"{where} needs {format_bytes(needs)} at most of {format_bytes(there)}. Keys and values are kept "
        f"{ways[found.keeping]}, {format_bytes(kept)}."
    )
    if found.kind != "cpu" and found.host.get("attention/cache"):
        told += f" The host needs {format_bytes(found.host_high)} of {format_bytes(found.host_budget)}."
    if found.prompt_seconds is not None and found.token_seconds is not None:
        told += (
            f" Reading, {_tokens(found.chunk)} at a time, may take {format_seconds(found.prompt_seconds)}, and a token "
            f"{found.token_seconds:.3g} s: estimated by rates of training."
        )
    known = max(plan.total_tokens, int(plan.model.native_context * plan.rope.factor))
    if found.prompt + found.new > known:
        told += f" The model knows no more than {_tokens(known)} in a row: what it writes beyond may be of no use."
    return told


def _tokens(many: int) -> str:
    return f"{many:,} token" + "s" * (many != 1)


def _document(plan: Plan, found: Generation) -> dict[str, Any]:
    return {
        "model": plan.model.id,
        "card": plan.gpu.id,
        "prompt_tokens": found.prompt,
        "new_tokens": found.new,
        "tokens_at_once": found.chunk,
        "cache": found.keeping,
        "gpu": {
            "peak_bytes": found.expected,
            "high_bytes": found.high,
            "budget_bytes": found.budget,
            "terms": found.card,
        },
        "host": {"high_bytes": found.host_high, "budget_bytes": found.host_budget, "terms": found.host},
        "estimated_seconds": {"prompt": found.prompt_seconds, "token": found.token_seconds},
    }


def _situation(plan: Plan) -> Situation:
    from planner.optimizations.base import Situation
    from planner.planning import read_gpu, read_model

    gpu = read_gpu("cpu" if plan.gpu.kind == "cpu" else card_of(plan))
    return Situation(gpu, read_model(plan.model.source), plan.memory.host.budget_bytes)


def _count(option: str, text: str) -> int:
    found = parse_count(text)
    if not 1 <= found <= MOST_TOKENS:
        raise PlanError(f"{option} {text}", f"is no number of tokens from 1 to {MOST_TOKENS:,}.", f"Try {option} 1K.")
    return found


def _read(file: str) -> str:
    try:
        if file == "-":
            return sys.stdin.buffer.read().decode("utf-8")
        return Path(file).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PlanError(f"--file {file}", f"cannot be read as text: {error}.") from error


def _keeping(text: str | None) -> Keeping | None:
    from planner.generating import KEEPINGS

    if text is None:
        return None
    found = next((each for each in KEEPINGS if each == text), None)
    if found is None:
        raise PlanError(f"--cache {text}", "is no way to keep keys and values.", did_you_mean(text, KEEPINGS))
    return found


def _sampling(options: dict[str, Any]) -> tuple[float, float, int]:
    """Temperature, top-p and seed."""
    temperature = _number("--temperature", options["temperature"] or "0", 0, 100, "from 0 to 100")
    if 0 < temperature < 0.01:
        raise PlanError(
            f"--temperature {options['temperature']}", "is too little to divide by.", "0 takes the likeliest."
        )
    idle = [name for name in ("top_p", "seed") if options[name] is not None and not temperature]
    if idle:
        asked = " ".join(f"--{name.replace('_', '-')} {options[name]}" for name in idle)
        raise PlanError(asked, "has no part in it: at temperature 0 nothing is drawn.", "Add --temperature 0.7.")
    top_p = _number("--top-p", options["top_p"] or "1", 1e-6, 1, "above 0, and 1 at most")
    seed = options["seed"] or "0"
    if not (seed.isascii() and seed.isdigit() and len(seed) < 19):
        raise PlanError(f"--seed {seed}", "is no whole number of at most 18 digits.", "Try --seed 1.")
    return temperature, top_p, int(seed)


def _number(option: str, text: str, least: float, most: float, told: str) -> float:
    try:
        found = float(text)
    except ValueError:
        found = math.nan
    if not least <= found <= most:
        raise PlanError(f"{option} {text}", f"is no number {told}.", f"Try {option} 0.7.")
    return found


@contextmanager
def _reading(prompt: int) -> Iterator[tuple[Callable[[int], None], Callable[[], None]]]:
    """Shows how much of a long prompt has been read, on standard error where that is a terminal; and ends that."""
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("reading", total=prompt)
        yield lambda done: bar.update(task, completed=done), bar.stop


def _told_after(written: Written) -> str:
    rate = f", {written.tokens / written.seconds:,.1f} a second" if written.seconds else ""
    ended = ", to the end of the text" if written.ended else ""
    taken = "" if written.reserved is None else f"; {format_bytes(written.reserved)} of the card were taken"
    return f"{_tokens(written.tokens)}{ended}{rate}{taken}."


def _say(text: str) -> None:
    click.echo(text, nl=False)
    sys.stdout.flush()
