"""What is behind a name: an optimisation, a term of memory or work, a letter, a knob, or the scaling of positions."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal

from planner.baseline import baseline
from planner.errors import PlanError, did_you_mean
from planner.explain_formulas import (
    Formula,
    LetterValue,
    Run,
    attributes,
    formula_of_term,
    formula_of_work,
    formulas_of,
    planned_run,
    smallest_run_with,
    used_by,
    value,
    values,
)
from planner.ledger import Term, Work
from planner.optimizations import all_optimizations, given_items
from planner.optimizations.base import Knob, Optimization
from planner.optimizations.item import Given, Item
from planner.plan import Plan
from planner.rope_scaling import MEANINGS, ROPE_SETTINGS, rope_warnings
from planner.symbols import BY_SYMBOL, LETTERS, symbolic_letters

Kind = Literal["optimisation", "term", "work", "letter", "knob", "setting"]
RESOURCES = {
    "linear": "the matrix units, on products with weights",
    "attention": "the matrix units, in the attention kernel",
    "memory": "the card's own memory",
    "link": "the link between card and host, beside everything else",
    "disk": "the disk, beside everything else",
    "prefetch": "the link to the card, beside everything else of a phase",
    "exposed": "the link between card and host, while nothing else goes on",
    "launch": "the host, beside everything else",
}


@dataclass(frozen=True)
class Explanation:
    """Everything there is to say about one name, for one plan.

    Attributes:
        facts: name and sentence; a name may come more than once.
        letters: every letter of the formulas.
        run: which plan the values belong to.
    """

    name: str
    kind: Kind
    title: str
    text: str
    facts: tuple[tuple[str, str], ...]
    formulas: tuple[Formula, ...]
    letters: tuple[LetterValue, ...]
    run: str

    def document(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self) | {"facts": [{"name": name, "told": told} for name, told in self.facts]}


def explanation(name: str, plan: Plan, gpu: str = "") -> Explanation:
    """Explain one name with the numbers of a plan.

    Args:
        name: id of an optimisation, name of a term or of a piece of work, letter, letter's word, knob, or ``rope``.
        gpu: the card as the user named it, where the plan's id does not find it again (a file, ``local``).

    Raises:
        PlanError: the name is nothing of these.
    """
    run, asked, known = planned_run(plan, gpu), name.strip(), all_optimizations()
    words = {letter.word: letter.symbol for letter in LETTERS if letter.word}
    knobs = {f"{owner}.{knob.name}": (each, knob) for owner, each in known.items() for knob in each.knobs}
    if asked in known:
        return _optimisation(known[asked], run)
    if asked in given_items():
        return _given(given_items()[asked], run)
    if asked in BY_SYMBOL:
        return _letter(asked, run)
    if asked in knobs:
        return _knob(*knobs[asked], run)
    if asked in words:
        return _letter(words[asked], run)
    if asked in ROPE_SETTINGS:
        return _rope(asked, run)
    terms, work = _terms_and_work(run)
    if asked in terms:
        return _term(terms[asked], run)
    if asked in work:
        return _work(work[asked], run)
    raise _unknown(asked, list(dict.fromkeys([*known, *given_items(), *terms, *work, *words, *knobs, *ROPE_SETTINGS])))


def _terms_and_work(run: Run) -> tuple[dict[str, Term], dict[str, Work]]:
    """Every term and work there can be; the plan's own come last and win."""
    smallest = [smallest_run_with(name, run) for name in all_optimizations()]
    ledgers = [each.configuration.ledger for each in smallest if each is not None]
    terms: dict[str, Term] = {}
    work: dict[str, Work] = {}
    for ledger in (*ledgers, baseline(), run.configuration.ledger):
        terms |= ledger.terms
        work |= ledger.work
    return terms, work


def _term(term: Term, run: Run) -> Explanation:
    letters = values([term.bytes(symbolic_letters())], run)
    formula = formula_of_term(term, run)
    return Explanation(
        term.name, "term", term.meaning, "", tuple(_about_term(term, run)), (formula,), letters, _where(run)
    )


def _about_term(term: Term, run: Run) -> Iterable[tuple[str, str]]:
    known, chosen = all_optimizations(), run.configuration.ids
    makers = [name for name in known if term.name in known[name].makes]
    yield "Made by", " or ".join(makers) if makers else "plain training, with nothing switched on"
    if term.name not in run.configuration.ledger.terms:
        yield "In this plan", "no: what makes it is off; it is shown as it would be"
    for name, each in known.items():
        if touched := attributes(each, term.name):
            on = ", on in this plan" if name in chosen else ", off in this plan"
            yield "Changed by", f"{name} ({', '.join(touched)}{on})"
    needs = [need.text for name in makers for need in known[name].requires]
    yield "Requires", "; ".join(needs) if needs else "nothing"


def _work(work: Work, run: Run) -> Explanation:
    formula, letters = formula_of_work(work, run), values([work.amount(symbolic_letters())], run)
    facts = (("Keeps busy", RESOURCES[work.resource.value]),)
    return Explanation(work.name, "work", work.meaning, "", facts, (formula,), letters, _where(run))


def _letter(symbol: str, run: Run) -> Explanation:
    letter = BY_SYMBOL[symbol]
    shown = LetterValue(symbol, letter.meaning, letter.unit, value(symbol, run))
    facts = [("Value", "none in this plan" if shown.value is None else f"{shown.value:,} {letter.unit}")]
    facts += [("In words", letter.word)] if letter.word else []
    facts += [("Used by", used)] if (used := used_by(symbol, run)) else []
    return Explanation(symbol, "letter", letter.meaning, "", tuple(facts), (), (shown,), _where(run))


def _knob(owner: Optimization, knob: Knob, run: Run) -> Explanation:
    name, chosen = f"{owner.id}.{knob.name}", run.plan.knobs(owner.id).get(knob.name)
    offered = ", ".join(map(str, knob.choices(run.situation)))
    shown = f"{chosen:,}" if type(chosen) is int else str(chosen)
    facts = [
        ("Value", shown if owner.id in run.configuration.ids else f"none: {owner.id} is off in this plan"),
        ("Set it with", f"--set {name}=VALUE"),
        (
            "Choices",
            (f"{offered} (the first is preferred)" if "," in offered else offered) or "none on this card",
        ),
    ]
    facts += [("Allowed", f"{knob.low:,} to {knob.high:,}")] if knob.low is not None and knob.high is not None else []
    facts += [("Belongs to", f"{owner.id}: {owner.title}")]
    facts += [("Used by", used)] if knob.letter and (used := used_by(knob.letter, run)) else []
    letters = values([getattr(symbolic_letters(), knob.letter)], run) if knob.letter else ()
    return Explanation(name, "knob", knob.meaning, "", tuple(facts), (), letters, _where(run))


def _rope(name: str, run: Run) -> Explanation:
    plan, rope = run.plan, run.plan.rope
    facts = [
        ("Value", f"{rope.scaling}, factor {rope.factor:g}: {rope.reason}"),
        (
            "Model",
            f"{plan.model.id}, made for {plan.model.native_context:,} tokens, with rotary embedding {rope.model}",
        ),
        ("Set it with", "--set train.rope=KIND and --set train.rope_factor=NUMBER"),
        *((f"KIND {kind}", meaning) for kind, meaning in MEANINGS.items()),
        ("NUMBER", "from 1; left out, total tokens by native context, rounded up"),
        ("Left out", "yarn where the sequence is longer than the native context and the model has no scaling itself"),
    ]
    if rope.parameters:
        facts.append(("In the config", ", ".join(f"{key} {value}" for key, value in rope.parameters.items())))
    text = "\n".join(rope_warnings(run.situation.model, plan.total_tokens, rope))
    title = "how the rotary embedding is scaled for sequences longer than the model was made for"
    return Explanation(name, "setting", title, text, tuple(facts), (), (), _where(run))


def _optimisation(each: Optimization, run: Run) -> Explanation:
    shown = run if each.id in run.configuration.ids else smallest_run_with(each.id, run)
    formulas, letters = formulas_of(each, shown) if shown is not None else ((), ())
    facts = tuple(_about(each, run))
    return Explanation(each.id, "optimisation", each.title, _docstring(each), facts, formulas, letters, _where(run))


def _given(each: Given, run: Run) -> Explanation:
    """What no plan switches on or off."""
    state, why = each.state(run.situation)
    facts = (("In this plan", f"{state}: {why}"), *_claimed(each), *_evidence(each))
    return Explanation(each.id, "optimisation", each.title, _docstring(each), facts, (), (), _where(run))


def _claimed(each: Item) -> Iterable[tuple[str, str]]:
    for one in each.claimed:
        yield "Claimed", f"item {one.number}: {one.words} ({one.verdict}). {one.true}"


def _evidence(each: Item) -> Iterable[tuple[str, str]]:
    for one in each.evidence:
        yield "Evidence", f"{one.statement} ({one.source})"


def _about(each: Optimization, run: Run) -> Iterable[tuple[str, str]]:
    on = next((choice.reason for choice in run.plan.choices if choice.id == each.id), None)
    off = next(("; ".join(rejection.reasons) for rejection in run.plan.rejected if rejection.id == each.id), "")
    yield "In this plan", f"on: {on}" if on is not None else f"off: {off}"
    yield (
        "Result",
        "the same function as without it" if each.exact else f"not the same as without it: {each.effect}",
    )
    unmet = "; ".join(each.reasons(run.situation))
    needs = "; ".join(requirement.text for requirement in each.requires) or "nothing"
    yield "Requires", needs + (f" (not met: {unmet})" if unmet else "")
    for knob in each.knobs:
        chosen = run.plan.knobs(each.id).get(knob.name)
        yield "Knob", f"{each.id}.{knob.name}{'' if chosen is None else f' = {chosen}'}: {knob.meaning}"
    if each.makes:
        yield "Makes", ", ".join(sorted(each.makes))
    if each.claims:
        yield "Replaces", ", ".join(sorted(each.claims))
    yield from _claimed(each)
    yield from _evidence(each)


def _docstring(each: Item) -> str:
    """What the file of an optimisation says of itself, each paragraph on one line."""
    text = inspect.getdoc(sys.modules[type(each).__module__]) or inspect.getdoc(each) or ""
    return "\n".join(" ".join(paragraph.split()) for paragraph in text.split("\n\n"))


def _where(run: Run) -> str:
    plan = run.plan
    tier = f"tier {plan.tier}, " if plan.tier else ""
    length = f"{plan.total_tokens:,} tokens, {plan.target:,} of them trained"
    return f"{plan.model.id} on {plan.gpu.name}, {tier}{length}"


def _unknown(asked: str, names: list[str]) -> PlanError:
    group = [name for name in names if asked and name.startswith(asked.rstrip("/.") + "/")]
    nearest = f"It is a group: {', '.join(group)}." if group else did_you_mean(asked, names)
    why = "is no optimisation, term, letter or knob."
    return PlanError(f"explain {asked!r}", why, nearest or "`plan optimizations` and `plan --gpu ID` name some.")
