"""Formulas for people: the very functions that the planner computes with, written out by sympy."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from planner.baseline import baseline
from planner.calibration import calibration
from planner.compose import Configuration, compose, problems
from planner.hardware import load_profile
from planner.ledger import Device, Phase, Resource, Term, Work
from planner.machine import cpu_profile, detect_local
from planner.model import load_model
from planner.optimizations import all_optimizations
from planner.optimizations.base import Knobs, Optimization, Situation
from planner.plan import Plan
from planner.symbols import LETTERS, Letters, symbolic_letters
from planner.units import format_bytes


@dataclass(frozen=True)
class LetterValue:
    """A letter with its value in the plan; None where this plan gives it none."""

    symbol: str
    meaning: str
    unit: str
    value: int | None


@dataclass(frozen=True)
class Formula:
    """A term or a piece of work: as text, as LaTeX, with the plan's numbers in it, and what comes out.

    Attributes:
        unit: ``bytes`` or ``FLOP``.
        place: where the bytes lie; empty for work.
        alive: the phases, in order.
        without: what there would be without the optimisation that is explained; empty where none is.
    """

    name: str
    meaning: str
    text: str
    latex: str
    numbers: str
    result: int
    unit: str
    place: str
    alive: tuple[str, ...]
    basis: str
    source: str
    without: str = ""


@dataclass(frozen=True)
class Run:
    """One configuration with a value for every letter."""

    plan: Plan
    situation: Situation
    configuration: Configuration
    letters: Letters


def planned_run(plan: Plan, gpu: str = "") -> Run:
    """The configuration of a plan; ``gpu`` is the card as the user named it, if its id does not find it."""
    if plan.gpu.kind == "cpu":
        card = cpu_profile()
    else:
        card = detect_local() if gpu == "local" else load_profile(gpu or plan.gpu.id)
    shape = load_model(plan.model.source.removeprefix("random:"))
    memory = plan.memory
    situation = Situation(
        card, shape, memory.host.budget_bytes, merge=plan.train.merge, disk_bytes=memory.disk.budget_bytes
    )
    knobs = {
        choice.id: {name: value for name, value in choice.knobs.items() if value is not None} for choice in plan.choices
    }
    return _at(plan, situation, compose([choice.id for choice in plan.choices], knobs, situation))


def smallest_run_with(name: str, run: Run) -> Run | None:
    """An optimisation with nothing on beside it but what it needs; None where that is not to be had here."""
    known, ids, nothing_on = all_optimizations(), {name}, baseline()
    for _ in known:
        existing = {
            *nothing_on.terms,
            *nothing_on.work,
            *(made for each in ids for made in known[each].makes | known[each].adds),
        }
        wanted = {claim.rpartition(".")[0] for each in ids for claim in known[each].claims if "/" in claim}
        wanted |= {need.term for each in ids for need in known[each].requires if hasattr(need, "term")}
        makers = {name: len(each.makes & (wanted - existing)) for name, each in known.items()}
        if not any(makers.values()):
            break
        ids.add(max(makers, key=lambda name: makers[name]))  # whoever makes most of it
    # A knob may have nothing to choose from in so small a set, and something with one more beside it.
    larger = [ids, *(ids | {other} for other in known)]
    ids = next((each for each in larger if _can_choose(each, run.situation)), set())
    if not ids or any("is already" in reason for told in problems(ids, run.situation).values() for reason in told):
        return None
    return _at(run.plan, run.situation, compose(ids, {}, run.situation))


def _can_choose(ids: set[str], situation: Situation) -> bool:
    known, situation = all_optimizations(), replace(situation, chosen=frozenset(ids))
    return all(knob.choices(situation) for each in ids for knob in known[each].knobs)


def run_without(name: str, run: Run) -> Run:
    """The configuration without an optimisation and without what cannot be on when it is off."""
    ids = set(run.configuration.ids) - {name}
    while broken := problems(ids, run.situation):
        ids -= set(broken)
    return run_of(run.plan, run.situation, ids, run.configuration.knobs)


def run_of(plan: Plan, situation: Situation, ids: Iterable[str], knobs: Mapping[str, Knobs]) -> Run:
    """A set of optimisations at a plan's length; knobs that are not given have the value that is best first."""
    return _at(plan, situation, compose(ids, knobs, situation))


def _at(plan: Plan, situation: Situation, configuration: Configuration) -> Run:
    card = situation.gpu
    letters = configuration.at(
        batch=plan.train.batch,
        total=plan.total_tokens,
        target=plan.target,
        workspace=calibration().workspace_bytes(card.compute_capability if card.kind == "gpu" else None),
        rank=plan.lora_rank,
    )
    for letter in LETTERS:  # letters of optimisations that are off, for formulas that are shown all the same
        if not hasattr(letters, letter.symbol):
            setattr(letters, letter.symbol, letter.least)
    return Run(plan, situation, configuration, letters)


def formula_of_term(term: Term, run: Run, without: str = "") -> Formula:
    """A term of memory."""
    expression = term.bytes(symbolic_letters())
    return Formula(
        name=term.name,
        meaning=term.meaning,
        text=written(expression),
        latex=latex(expression),
        numbers=written(expression, run.letters),
        result=int(term.bytes(run.letters)),
        unit="bytes",
        place=_place(term),
        alive=tuple(_in_order(term)),
        basis=term.basis.value,
        source=term.source,
        without=without,
    )


UNITS = {Resource.LINEAR: "FLOP", Resource.ATTENTION: "FLOP", Resource.LAUNCH: "kernels"}


def formula_of_work(work: Work, run: Run) -> Formula:
    """A piece of work."""
    amount = work.amount(symbolic_letters())
    return Formula(
        name=work.name,
        meaning=work.meaning,
        text=written(amount),
        latex=latex(amount),
        numbers=written(amount, run.letters),
        result=int(work.amount(run.letters)),
        unit=UNITS.get(work.resource, "bytes"),
        place="",
        alive=(work.phase.value,),
        basis="derived",
        source="shapes of the modules in transformers",
    )


def formulas_of(each: Optimization, run: Run) -> tuple[tuple[Formula, ...], tuple[LetterValue, ...]]:
    """Every term that an optimisation makes or changes, beside what there is without it; and the letters.

    Of one that does nothing but set a letter these are the terms that have it.
    """
    before, formulas, expressions = run_without(each.id, run), [], []
    terms = run.configuration.ledger.terms.values()
    named = [term for term in terms if term.name in each.makes or attributes(each, term.name)]
    for term in named or [term for term in terms if _has(term, letters_of(each))]:
        formulas.append(formula_of_term(term, run, _told_without(term, before, attributes(each, term.name))))
        expressions.append(term.bytes(symbolic_letters()))
    return tuple(formulas), values(expressions, run)


def letters_of(each: Optimization) -> frozenset[str]:
    """The letters whose value an optimisation sets."""
    return frozenset(claim.removeprefix("letter ") for claim in each.claims if claim.startswith("letter "))


def _has(term: Term, letters: frozenset[str]) -> bool:
    return any(str(symbol) in letters for symbol in getattr(term.bytes(symbolic_letters()), "free_symbols", ()))


def _told_without(term: Term, before: Run, touched: list[str]) -> str:
    old = before.configuration.ledger.terms.get(term.name)
    if old is None:
        return "there is none"
    told = [format_bytes(int(old.bytes(before.letters)))]
    if "phases" in touched and old.phases != term.phases:
        told.append(f"alive in {', '.join(_in_order(old))}")
    if "device" in touched and old.device != term.device:
        told.append(_place(old))
    return ", ".join(told)


def _place(term: Term) -> str:
    return "on the card" if term.device is Device.GPU else f"in {term.device} memory"


def _in_order(term: Term) -> list[str]:
    return [phase.value for phase in Phase if phase in term.phases]


def attributes(each: Optimization, term: str) -> list[str]:
    """What of a term an optimisation claims: count, bits, device, phases."""
    return sorted(claim.rpartition(".")[2] for claim in each.claims if claim.rpartition(".")[0] == term)


def value(symbol: str, run: Run) -> int | None:
    """A letter's value; None where it belongs to an optimisation that is off."""
    always = {"B", "S", "T", "Z", "R"}
    return int(getattr(run.letters, symbol)) if symbol in always or symbol in run.configuration.letters else None


def values(expressions: Iterable[Any], run: Run) -> tuple[LetterValue, ...]:
    """The letters that occur, in the order in which they are defined."""
    used = {str(symbol) for expression in expressions for symbol in getattr(expression, "free_symbols", ())}
    return tuple(
        LetterValue(letter.symbol, letter.meaning, letter.unit, value(letter.symbol, run))
        for letter in LETTERS
        if letter.symbol in used
    )


def used_by(symbol: str, run: Run) -> str:
    """Names of the terms and the work of a configuration in which a letter occurs."""
    letters, ledger = symbolic_letters(), run.configuration.ledger
    sizes = {name: term.bytes(letters) for name, term in ledger.terms.items()}
    sizes |= {name: work.amount(letters) for name, work in ledger.work.items()}
    wanted = getattr(letters, symbol)
    return ", ".join(name for name, size in sizes.items() if wanted in getattr(size, "free_symbols", ()))


def written(expression: Any, letters: Letters | None = None) -> str:
    """An expression on one line: with letters, or with their values in the same places."""
    from sympy import sympify
    from sympy.printing.str import StrPrinter

    class Printer(StrPrinter):  # type: ignore[misc]
        def _print_Symbol(self, symbol: Any) -> str:
            return str(symbol.name) if letters is None else str(int(getattr(letters, symbol.name)))

        def _print_ceiling(self, function: Any) -> str:
            return f"ceil({self._print(function.args[0])})"

        def _print_Max(self, function: Any) -> str:
            return f"max({', '.join(map(self._print, function.args))})"

        def _print_Min(self, function: Any) -> str:
            return f"min({', '.join(map(self._print, function.args))})"

    return str(Printer().doprint(sympify(expression))).replace("**", "^").replace("*", "·")


def latex(expression: Any) -> str:
    """An expression as LaTeX, without the dollar signs."""
    from sympy import latex as latex_of

    return str(latex_of(expression, mul_symbol="dot"))
