"""Subcommands that look things up: cards, models, one name explained, the schema of a plan."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from planner.cli_output import console, plain_table, print_object, print_table
from planner.cli_request import LIMITS, plan_for, planning_options
from planner.units import format_bytes

if TYPE_CHECKING:
    from planner.hardware import HardwareProfile, Sourced

as_json = click.option("--json", "json_", is_flag=True, help="Print one JSON object instead of a table.")


@click.command(short_help="List the cards.")
@as_json
def gpus(json_: bool) -> None:
    """List the cards that are known; an unknown one is a YAML file away.

    \b
    plan gpus
    plan gpus --json
    """
    from planner.hardware import SHIPPED, list_profiles

    cards = list_profiles()
    if json_:
        print_object({"gpus": [_card(card) for card in cards]})
        return
    table = plain_table("id", "name", "memory", "to use", "capability", "bf16", right=("memory", "to use"))
    for card in cards:
        capability = ".".join(map(str, card.compute_capability)) if card.compute_capability else card.gfx or "unknown"
        budget, memory = card.budget_bytes(), card.memory_bytes.value
        table.add_row(
            card.id,
            card.name.removeprefix(f"{card.vendor} "),
            _bytes(memory),
            _bytes(budget),
            capability,
            "yes" if card.supports_bf16 else "no",
        )
    print_table(
        table,
        "to use: what CUDA shows of the memory, less its own context. `--gpu local` is the card of this "
        f"machine, `--gpu cpu` the machine without one. Any other card: a YAML file like those in {SHIPPED}.",
    )


@click.command(short_help="List the models.")
@as_json
def models(json_: bool) -> None:
    """List the models that come along; others are a folder, a GGUF file or a hub id.

    \b
    plan models
    plan models --json
    """
    from dataclasses import asdict

    from planner.model import list_models, load_model

    shapes = [(facts, load_model(facts.id)) for facts in list_models()]
    known = [(facts, (*shape.not_planned, *filter(None, [shape.quantized_otherwise]))) for facts, shape in shapes]
    if json_:
        print_object({"models": [{**asdict(facts), "not_planned": reasons} for facts, reasons in known]})
        return
    table = plain_table(
        "id", "on the hub", "parameters", "made for", "licence", "planned", right=("parameters", "made for")
    )
    for facts, reasons in known:
        size, made_for = f"{facts.counted:,}", f"{facts.native_context:,}"
        table.add_row(facts.id, facts.hub_id, size, made_for, facts.licence, "no" if reasons else "yes")
    other = "a folder with config.json, a GGUF file, or a hub id (org/name)"
    print_table(table, f"made for: tokens. `--model` also takes {other}. planned no: `plan --model ID` says why.")


@click.command(short_help="Show formula, numbers and source behind a name.")
@click.argument("name")
@planning_options("gpu", "model", "tier", "context", *LIMITS)
@as_json
def explain(name: str, json_: bool, **options: Any) -> None:
    """Show what is behind NAME: an optimisation, a term of memory or work, a letter, or a knob.

    \b
    plan explain chunked_loss
    plan explain activations/mlp --gpu rtx4090 --context 32K
    plan explain S
    plan explain lora.rank
    plan explain weights/linear --without nf4_weights
    """
    from planner.explain import explanation
    from planner.explain_report import print_explanation

    found = explanation(name, plan_for(options), options.get("gpu") or "")
    if json_:
        print_object(found.document())
    else:
        print_explanation(found, console())


@click.command(short_help="Print the JSON Schema of a plan.")
def schema() -> None:
    """Print the JSON Schema of a plan file, which is also that of `--json`.

    \b
    plan schema > plan.schema.json
    """
    from planner.plan import json_schema

    print_object(json_schema())


def _card(card: HardwareProfile) -> dict[str, Any]:
    """A card as plain data: every fact with its source and basis."""
    return {
        "id": card.id,
        "name": card.name,
        "aliases": list(card.aliases),
        "kind": card.kind,
        "architecture": card.architecture,
        "compute_capability": ".".join(map(str, card.compute_capability)) if card.compute_capability else None,
        "gfx": card.gfx or None,
        "budget_bytes": card.budget_bytes(),
        "supports_bf16": card.supports_bf16,
        "supports_flash_attention_2": card.supports_flash_attention_2,
        "facts": {name: _fact(fact) for name, fact in card.facts().items()},
        "notes": list(card.notes),
    }


def _fact(fact: Sourced) -> dict[str, Any]:
    told = {"value": fact.value, "basis": fact.basis, "source": fact.source}
    return told | ({"why": fact.why} if fact.value is None else {})


def _bytes(size: float | None) -> str:
    return "unknown" if size is None else format_bytes(int(size)).replace(".00 ", " ")
