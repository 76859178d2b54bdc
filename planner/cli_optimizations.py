"""`plan optimizations`: every item, numbered as in the claims document, with state, effect and verdict."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from planner.cli_output import plain_table, print_json, print_table
from planner.cli_request import plan_for, planning_options
from planner.units import format_bytes

if TYPE_CHECKING:
    from planner.effects import Effect
    from planner.optimizations.base import Optimization
    from planner.optimizations.item import Item
    from planner.plan import Plan

State = tuple[str, list[str]]
STATES = {"on": "green", "always": "green", "off": "red", "never": "dim"}
FEW = 2
"""So many terms, the largest changes first, stand in the table; ``--json`` has all."""


@click.command(short_help="List the optimisations, with why each is on or off.")
@planning_options("gpu", "model", "tier", "context")
@click.option("--json", "json_", is_flag=True, help="Print a JSON list, one row for each, instead of a table.")
def optimizations(json_: bool, **options: Any) -> None:
    """List the optimisations by number: whether each is on for a card and a model, why, what it does, what was claimed.

    \b
    plan optimizations
    plan optimizations --gpu rtx4090 --model llama-3.1-8b
    plan optimizations --json
    """
    from planner.effects import effects
    from planner.optimizations import all_items

    plan = plan_for(options)
    gpu = options.get("gpu") or ""
    states, found = _states(plan, gpu), effects(plan, gpu)
    items = all_items()
    if json_:
        rows = [_row(each, states[name], found.get(name), plan) for name, each in items.items()]
        print_json(json.dumps(rows, indent=2, ensure_ascii=False))
        return
    from rich.text import Text

    table = plain_table("no.", "", "id", "what it is, why it is on or off, what it does, and what was claimed")
    for name, each in items.items():
        state, reasons = states[name]
        told = Text(f"{each.title}\n").append("; ".join(reasons), style="dim")
        told.append(f"\n{done}", style="dim") if (done := "; ".join(_words(found.get(name)))) else None
        if each.claimed:
            told.append(f"\nclaimed: {each.words} – {each.verdict}")
        numbers = Text("\n".join(map(str, each.numbers)) or "–")
        table.add_row(numbers, Text(state, style=STATES[state]), Text(name, style="bold"), told)
    tier = f"tier {plan.tier}, " if plan.tier else ""
    where = f"{plan.model.id} on {plan.gpu.name}, {tier}{plan.total_tokens:,} tokens"
    print_table(
        table,
        f"For {where}. no.: in the claims document; – is not in it. on, off: in this plan; --with and --without "
        "change it. always: in every run here; never: nothing here to switch on. `plan explain NAME` says what is so "
        "of a claim, with formulas and sources.",
    )


def _states(plan: Plan, gpu: str) -> dict[str, State]:
    """State and reasons of everything there is."""
    from planner.explain_formulas import planned_run
    from planner.optimizations import given_items

    states: dict[str, State] = {choice.id: ("on", [choice.reason]) for choice in plan.choices}
    states |= {rejection.id: ("off", list(rejection.reasons)) for rejection in plan.rejected}
    situation = planned_run(plan, gpu).situation
    for name, each in given_items().items():
        state, why = each.state(situation)
        states[name] = state, [why]
    return states


def _words(effect: Effect | None) -> Iterator[str]:
    """What switching it on does, for people."""
    if effect is None:
        return
    from planner.effects import device_words

    if effect.peak_bytes:
        yield f"{_more(effect.peak_bytes)} at the peak of the card"
    largest = sorted(effect.terms.items(), key=lambda each: -abs(each[1]))
    if largest:
        more = f" and {len(largest) - FEW} more" if len(largest) > FEW else ""
        yield ", ".join(f"{term} {_more(size)}" for term, size in largest[:FEW]) + more
    for term, place in list(effect.moved.items())[:FEW]:
        yield f"{term} lies {device_words(place)}"
    if effect.step is None:
        yield "its time is unknown on this card"
    elif abs(effect.step - 1) >= 0.0005:
        yield f"a step takes {effect.step:.3g} times as long"
    if not effect.terms and not effect.moved and effect.step is not None and abs(effect.step - 1) < 0.0005:
        yield "no memory and no time that is modelled"
    if effect.beside:
        yield f"together with what comes or goes with it: {', '.join(effect.beside)}"


def _more(size: int) -> str:
    return f"{'+' if size > 0 else '−'}{format_bytes(abs(size))}"


def _row(each: Item, state: State, effect: Effect | None, plan: Plan) -> dict[str, Any]:
    from planner.optimizations.base import Optimization

    row: dict[str, Any] = {
        "id": each.id,
        "numbers": list(each.numbers),
        "title": each.title,
        "state": state[0],
        "reasons": state[1],
        "verdict": each.verdict,
        "claimed": each.words,
        "true": each.true,
        "items": [{"number": c.number, "claimed": c.words, "verdict": c.verdict, "true": c.true} for c in each.claimed],
        "evidence": [{"statement": one.statement, "source": one.source} for one in each.evidence],
        "on": {"gpu": plan.gpu.id, "model": plan.model.id, "tier": plan.tier, "total_tokens": plan.total_tokens},
    }
    if isinstance(each, Optimization):
        row |= _of_a_plan(each, plan)
        row["effect"] = effect and {
            "peak_bytes": effect.peak_bytes,
            "terms": effect.terms,
            "moved": effect.moved,
            "step_ratio": effect.step,
            "beside": list(effect.beside),
        }
    return row


def _of_a_plan(each: Optimization, plan: Plan) -> dict[str, Any]:
    """What only those have that a plan switches on and off."""
    return {
        "exact": each.exact,
        "result": each.effect,
        "claims": sorted(each.claims),
        "makes": sorted(each.makes),
        "requires": [requirement.text for requirement in each.requires],
        "knobs": [
            {
                "name": k.name,
                "meaning": k.meaning,
                "low": k.low,
                "high": k.high,
                "value": plan.knobs(each.id).get(k.name),
            }
            for k in each.knobs
        ],
    }
