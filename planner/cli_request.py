"""The options that decide a plan: what `plan` takes, and how it becomes a request, every mistake at once."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import click

from planner.errors import PlanError, PlanErrors, did_you_mean, raise_all

if TYPE_CHECKING:
    from planner.plan import Plan
    from planner.planning import Request

DEFAULT_MODEL = "phi-2"
OBJECTIVES = ("context", "speed", "memory")
Command = TypeVar("Command", bound=Callable[..., Any])
Options = Mapping[str, Any]
Value = TypeVar("Value")


class Twice(str):
    """The last of several different values that were given to an option that takes one."""

    values: tuple[str, ...]


def once(*names: str, at_once: bool = True, **attributes: Any) -> Callable[[Any], Any]:
    """An option that takes one value. Of several nobody can say which was meant, so that is a mistake.

    Args:
        at_once: raise it; else the value is a ``Twice``, to be told with other mistakes.
    """

    def only(context: click.Context, parameter: click.Parameter, values: tuple[str, ...]) -> str | None:
        different = tuple(dict.fromkeys(values))
        if at_once and "" in map(str.strip, different):
            raise PlanError(f"{parameter.opts[0]} ''", "is empty.")
        if len(different) < 2:
            return values[0] if values else None
        if at_once:
            raise _given_twice(parameter.opts[0], different)
        last = Twice(different[-1])
        last.values = different
        return last

    return click.option(*names, multiple=True, callback=only, **attributes)


def _given_twice(option: str, values: Sequence[str]) -> PlanError:
    return PlanError(" ".join(f"{option} {value}" for value in values), "takes one value.", "Keep one of them.")


# Everything arrives as text and is read here, not by click, which stops at the first mistake.
_one = partial(once, at_once=False)
OPTIONS: dict[str, Callable[[Any], Any]] = {
    "gpu": _one("--gpu", metavar="ID", help="Card: an id of `plan gpus`, a YAML file, local, or cpu."),
    "model": _one(
        "--model",
        metavar="ID",
        help=f"Model: an id of `plan models`, a folder, a GGUF file, or a hub id. [{DEFAULT_MODEL}]",
    ),
    "tier": _one("--tier", metavar="N", help="Tier 1 to 11 instead of the highest that fits."),
    "context": _one("--context", metavar="TOKENS", help="Length of a sequence instead of a tier, such as 24K."),
    "objective": _one(
        "--objective",
        metavar="WHAT",
        help="context (longest), or at a given length speed or memory. [context]",
    ),
    "host_ram": _one("--host-ram", metavar="SIZE", help="Host memory a run may take. [32GiB]"),
    "disk": _one("--disk", metavar="SIZE", help="Disk a run may use while it trains, such as 200GiB. [none]"),
    "max_step_time": _one("--max-step-time", metavar="TIME", help="Longest bearable step, such as 10m. [24h]"),
    "with_": click.option(
        "--with", "with_", multiple=True, metavar="NAME", help="Insist on an optimisation; repeatable."
    ),
    "without": click.option("--without", multiple=True, metavar="NAME", help="Rule an optimisation out; repeatable."),
    "set_": click.option(
        "--set",
        "set_",
        multiple=True,
        metavar="KNOB=VALUE",
        help="Fix a knob (lora.rank=16) or setting (train.lr=1e-4).",
    ),
    "data": _one("--data", metavar="PATH", help="Text, code or JSONL to train on: a folder or a file."),
    "price": _one("--price", metavar="MONEY", help="Price of the card for an hour, to tell what a run costs."),
    "power_price": _one(
        "--power-price", metavar="MONEY", help="Price of a kWh, to tell what its energy costs at most."
    ),
}


LIMITS = ("host_ram", "disk", "max_step_time", "with_", "without", "set_")
"""The options that narrow what a plan may be, for commands that ask for no single one."""


def planning_options(*names: str) -> Callable[[Command], Command]:
    """Give a command these of the options, in this order."""

    def decorate(command: Command) -> Command:
        for name in reversed(names):
            command = OPTIONS[name](command)
        return command

    return decorate


def given(options: Options) -> list[str]:
    """The planning options that were given, as typed on a command line."""
    return [option_name(name) for name in OPTIONS if is_given(options.get(name))]


def is_given(value: object) -> bool:
    """Whether an option was typed at all; an empty text was."""
    return value is not None and value is not False and value != ()


def option_name(name: str) -> str:
    """``max_step_time`` as the user knows it: ``--max-step-time``."""
    return "--" + name.rstrip("_").replace("_", "-")


def command_line(options: Options) -> str:
    """The command that plans this again; where its answer went is left out, so equal plans stay equal."""
    words = ["plan"]
    for name in OPTIONS:
        value = options.get(name)
        for one in [value] if isinstance(value, str) else value or ():
            words += [option_name(name), one]
    return shlex.join(words)


def read_request(options: Options, errors: list[PlanError]) -> Request:
    """The request; what cannot be read is added to ``errors`` and left at its default."""
    from planner.planning import Request
    from planner.settings import parse_settings
    from planner.units import parse_bytes, parse_count, parse_seconds

    def take(name: str, read: Callable[[str], Value], absent: Value) -> Value:
        text = options.get(name)
        if text is None:
            return absent
        try:
            return read(text)
        except PlanError as error:
            asked = f"{option_name(name)} {text if text.strip() else repr(text)}"
            errors.append(PlanError(asked, _without_quantity(error, text), error.nearest))
            return absent

    errors += [
        _given_twice(option_name(name), v.values) for name in OPTIONS if isinstance(v := options.get(name), Twice)
    ]
    for name in ("gpu", "model", "data"):
        if (text := options.get(name)) is not None and not text.strip():
            errors.append(PlanError(f"{option_name(name)} {text!r}", "is empty."))
    try:
        knobs, train = parse_settings(options.get("set_") or ()) if options.get("set_") else ({}, {})
    except PlanError as error:
        errors += all_of(error)
        knobs, train = {}, {}
    target, rows, rope, rope_factor = (train.pop(name, None) for name in ("target", "rows", "rope", "rope_factor"))
    data = home_expanded(options.get("data"))
    if data and train.setdefault("data", data) != data:
        errors.append(PlanError(f"--data {data} --set train.data={train['data']}", "name two places.", "Drop one."))
    return Request(
        gpu=options.get("gpu") or Request.gpu,
        model=options.get("model") or DEFAULT_MODEL,
        tier=take("tier", _tier, None),
        total_tokens=take("context", parse_count, None),
        target=target if isinstance(target, int) else None,
        rows=rows if isinstance(rows, int) else None,
        rope=rope,  # type: ignore[arg-type]
        rope_factor=rope_factor,  # type: ignore[arg-type]
        objective=take("objective", _objective, "context"),  # type: ignore[arg-type]
        host_bytes=take("host_ram", parse_bytes, Request.host_bytes),
        disk_bytes=take("disk", parse_bytes, Request.disk_bytes),
        max_step_seconds=take("max_step_time", parse_seconds, Request.max_step_seconds),
        required=tuple(dict.fromkeys(options.get("with_") or ())),
        excluded=tuple(dict.fromkeys(options.get("without") or ())),
        knobs=knobs,
        train=train,
        price_per_hour=take("price", _price, None),
        power_price_per_kwh=take("power_price", _price, None),
        command=command_line(options),
    )


def home_expanded(path: str | None) -> str | None:
    """A path as typed, but for ``~``: `--data=~/text` reaches us as it stands."""
    return None if path is None else os.path.expanduser(path)


def made(request: Request, errors: Sequence[PlanError] = ()) -> Plan:
    """The plan of a request.

    Raises:
        PlanError: the errors found before, and those that planning finds, together.
    """
    from planner.planning import make_plan

    try:
        plan = make_plan(request)
    except PlanError as error:
        raise_all([*errors, *all_of(error)])
        raise AssertionError("unreachable") from error
    raise_all(list(errors))
    return plan


def plan_for(options: Options) -> Plan:
    """The plan that options without output ask for; a card has to be among them, or the default is taken."""
    errors: list[PlanError] = []
    return made(read_request(options, errors), errors)


def all_of(error: PlanError) -> tuple[PlanError, ...]:
    """The single mistakes an error tells of."""
    return error.errors if isinstance(error, PlanErrors) else (error,)


def _tier(text: str) -> int:
    from planner.tiers import TIERS

    last = TIERS[-1].number
    if not text.isascii() or not text.isdigit() or not 1 <= int(text) <= last:
        raise PlanError(text, f"tiers are whole numbers from 1 to {last}.", "--context takes a number of tokens.")
    return int(text)


def _price(text: str) -> float:
    try:
        price = float(text)
    except ValueError:
        price = -1.0
    if not 0 <= price <= 1e6:  # false for NaN too
        raise PlanError(text, "is no price: a number from 0 to 1,000,000 in any money.", "Write one such as 0.35.")
    return price


def _objective(text: str) -> str:
    if text not in OBJECTIVES:
        nearest = did_you_mean(text, OBJECTIVES) or f"It is one of {', '.join(OBJECTIVES)}."
        raise PlanError(text, "is no objective.", nearest)
    return text


def _without_quantity(error: PlanError, text: str) -> str:
    """Why, where the quantity itself, such as an empty text, would not be seen in what was asked."""
    return error.why if text.strip() else "is empty."
