"""Optimisations made at run time, to see how the search grows with their number. They describe nothing real."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

from planner.ledger import ALWAYS, Formula, Ledger, Phase, Resource, Term, Work
from planner.optimizations.base import REGISTRY, Evidence, Knobs, Needs, Optimization, Situation
from planner.symbols import Letters, Number

Kind = Literal["better", "neutral", "trade", "bound", "hub"]
MIB = 2**20


def constant(value: int) -> Formula:
    """A formula that reads no letter."""

    def formula(x: Letters) -> Number:
        return value

    return formula


def per_token(value: int) -> Formula:
    """A formula that grows with the sequence."""

    def formula(x: Letters) -> Number:
        return value * x.B * x.S

    return formula


def synthetic(kind: Kind, number: int) -> type[Optimization]:
    """One optimisation; defining it registers it. Savings are terms of less than nothing.

    Args:
        kind: ``better`` saves memory at no price, ``neutral`` changes nothing, ``trade`` saves memory and costs time,
            ``bound`` as trade, and each needs what the first of them makes, ``hub`` gives a setting its value.
    """
    name = f"synthetic_{kind}_{number}"
    made, root = f"buffers/{name}", f"buffers/synthetic_{kind}_0"
    trades = kind in ("trade", "bound")

    def rewrite(self: Optimization, ledger: Ledger, knobs: Knobs, situation: Situation) -> Ledger:
        if kind in ("neutral", "hub"):
            return ledger
        ledger = ledger.with_terms(
            Term(made, constant(-(3 + number) * MIB), constant(8), ALWAYS - {Phase.LOAD}, "a saving", "synthetic")
        )
        if not trades:
            return ledger
        amount = per_token((number + 1) ** 2 * 10**6)
        return ledger.with_work(Work(name, amount, Resource.MEMORY, Phase.BACKWARD, "its price"))

    body: dict[str, Any] = {
        "__doc__": "Made for a measurement.",
        "id": name,
        "title": name,
        "evidence": (Evidence("made for a measurement", "reports/performance/synthetic.py"),),
        "makes": frozenset() if kind in ("neutral", "hub") else frozenset({made}),
        "adds": frozenset({name}) if trades else frozenset(),
        "claims": frozenset({f"setting {name}"}) if kind == "hub" else frozenset(),
        "requires": (Needs(root, "it is built upon it"),) if kind == "bound" and number else (),
        "rewrite": rewrite,
        "apply": lambda self, session: None,
    }
    return type(name, (Optimization,), body)


@contextmanager
def registered(kinds: Sequence[Kind]) -> Iterator[list[str]]:
    """So many optimisations, gone again afterwards; their names."""
    names = [synthetic(kind, number).id for number, kind in enumerate(kinds)]
    try:
        yield names
    finally:
        for name in names:
            REGISTRY.pop(name)
