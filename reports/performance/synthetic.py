"""Optimisations made at run time, to see how the search grows with their number. They describe nothing real."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

from planner.compose import model_letters
from planner.ledger import ALWAYS, Device, Formula, Ledger, Phase, Resource, Term, Work
from planner.optimizations.base import REGISTRY, Evidence, Knob, Knobs, Needs, Optimization, Scalar, Situation
from planner.symbols import BY_SYMBOL, Letter, Letters, Number

Kind = Literal["better", "neutral", "trade", "host", "bound", "hub", "letter", "dial", "executor"]
MIB = 2**20
TURNS = (8, 4, 2, 1)  # values of a knob
EXECUTOR_KNOBS = 5
# Letters of the model that formulas of what exists read, and that nothing claims.
LETTERS = ("n", "J", "I", "O", "m", "o", "N", "i")


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


def turned(value: int, *knobs: str, down: bool = False) -> Formula:
    """So many bytes for a token, times an eighth of each knob; or less the higher they are."""

    def formula(x: Letters) -> Number:
        number = value * x.B * x.S
        for knob in knobs:
            number = number * (9 - getattr(x, knob) if down else getattr(x, knob)) // 8
        return number

    return formula


def _letter(letter: str) -> Callable[[Situation], tuple[Scalar, ...]]:
    """Values for a letter of the model, the model's own the highest of them."""

    def choices(situation: Situation) -> tuple[Scalar, ...]:
        own = model_letters(situation.model)[letter]
        return tuple(dict.fromkeys(own * turn // 8 for turn in TURNS))

    return choices


def _price(name: str, number: int) -> Work:
    return Work(name, per_token((number + 1) ** 2 * 10**6), Resource.MEMORY, Phase.BACKWARD, "its price")


def _saving(name: str, count: Formula, device: Device = Device.GPU) -> Term:
    return Term(name, count, constant(8), ALWAYS - {Phase.LOAD}, "a saving", "synthetic", device=device)


def synthetic(kind: Kind, number: int) -> type[Optimization]:
    """One optimisation; defining it registers it. Savings are terms of less than nothing.

    Args:
        kind: ``neutral`` changes nothing. ``better`` saves memory at no price. ``trade`` saves memory and costs time,
            ``host`` saves memory of the card and takes some of the host, and time. ``bound`` is as trade, and each
            needs what the first of them makes. ``hub`` gives a setting its value that nothing reads. ``letter`` gives
            a letter that formulas everywhere read half its value, and costs time; ``dial`` leaves open which of four
            shares. ``executor`` has five knobs of four values, each with something to gain and to lose.
    """
    name = f"synthetic_{kind}_{number}"
    made, root = f"buffers/{name}", f"buffers/synthetic_{kind}_0"
    letter = LETTERS[number % len(LETTERS)]
    places = [f"{name}_{place}" for place in range(EXECUTOR_KNOBS)]
    makes, adds, claims, knobs = {made}, {name}, set[str](), tuple[Knob, ...]()
    terms, work = [_saving(made, constant(-(3 + number) * MIB))], [_price(name, number)]
    if kind in ("neutral", "hub", "better"):
        adds, work = set(), []
    if kind in ("neutral", "hub", "letter", "dial"):
        makes, terms = set(), []
    if kind == "hub":
        claims = {f"setting {name}"}
    if kind in ("letter", "dial"):
        claims = {f"letter {letter}"}
    if kind == "dial":
        knobs = (Knob("turn", "how much of it", _letter(letter), letter=letter, low=0, high=2**40),)
    if kind == "host":
        terms.append(_saving(f"{made}_host", constant((2 + number) * 8 * MIB), Device.HOST))
        makes = {made, f"{made}_host"}
    if kind == "executor":
        knobs = tuple(Knob(f"knob{n}", "a knob", lambda _: TURNS, place, 1, 8) for n, place in enumerate(places))
        pairs = list(zip(places, [*places[1:], places[0]], strict=True))
        terms = [_saving(f"{made}_{n}", turned(200 * (n + 1), *pair)) for n, pair in enumerate(pairs)]
        terms.append(_saving(made, per_token(-2000)))
        makes = {term.name for term in terms}
        amounts = [turned(10**6 * (n + 1), place, down=True) for n, place in enumerate(places)]
        work = [
            Work(f"{name}_{n}", amount, Resource.MEMORY, Phase.BACKWARD, "its price")
            for n, amount in enumerate(amounts)
        ]
        adds, claims = {piece.name for piece in work}, {"setting executor"}

    def rewrite(self: Optimization, ledger: Ledger, knobs: Knobs, situation: Situation) -> Ledger:
        return ledger.with_terms(*terms).with_work(*work)

    body: dict[str, Any] = {
        "__doc__": "Made for a measurement.",
        "id": name,
        "title": name,
        "evidence": (Evidence("made for a measurement", "reports/performance/synthetic.py"),),
        "makes": frozenset(makes),
        "adds": frozenset(adds),
        "claims": frozenset(claims),
        "knobs": knobs,
        "requires": (Needs(root, "it is built upon it"),) if kind == "bound" and number else (),
        "rewrite": rewrite,
        "apply": lambda self, session: None,
    }
    if kind == "letter":
        body["letters"] = lambda self, situation, knobs: {letter: model_letters(situation.model)[letter] // 2}
    return type(name, (Optimization,), body)


@contextmanager
def registered(kinds: Sequence[Kind]) -> Iterator[list[str]]:
    """So many optimisations, gone again afterwards; their names."""
    names, letters = [], []
    for number, kind in enumerate(kinds):
        # Those that are numbered among their own kind: what is bound needs the first of them.
        own = kinds[:number].count(kind) if kind == "bound" else number
        each = synthetic(kind, own)
        names.append(each.id)
        letters += [knob.letter for knob in each.knobs if knob.letter not in BY_SYMBOL]
    try:
        BY_SYMBOL.update({letter: Letter(letter, "made for a measurement", "turns") for letter in letters})
        yield names
    finally:
        for name in names:
            REGISTRY.pop(name)
        for letter in letters:
            BY_SYMBOL.pop(letter)


def mixed(number: int) -> list[Kind]:
    """So many as may come in truth: of thirty one executor, nine that save at a price, seven that set letters."""
    cycle: tuple[Kind, ...] = (
        "executor",
        *("trade", "letter", "neutral", "host", "better", "dial", "trade", "bound", "better", "trade"),
        *("letter", "neutral", "trade", "dial", "bound", "better", "host", "letter", "trade", "neutral"),
        *("better", "hub", "bound", "trade", "letter", "better", "host", "neutral", "better"),
    )
    return list(cycle[:number])
