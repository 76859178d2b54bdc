"""Every optimisation that is registered, whoever made it: what it says of itself, what it claims, and its hook."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest

from planner.baseline import baseline
from planner.compose import compose, problems
from planner.hardware import list_profiles, load_profile
from planner.ledger import ATTRIBUTES
from planner.machine import cpu_profile
from planner.model import list_models, load_model
from planner.optimizations import all_optimizations, by_id
from planner.optimizations.base import REGISTRY, Evidence, Needs, Optimization, Scalar, Situation, With
from planner.session import Session
from planner.sets import valid_sets
from planner.settings import check_sets
from planner.symbols import BY_SYMBOL

ROOT = Path(__file__).parent.parent
NAMES = sorted(all_optimizations())
OF_WORK = ("amount", "resource", "phase")
METHODS = {name for name, value in vars(Session).items() if inspect.isfunction(value) and not name.startswith("_")}
FILE = re.compile(r"(?:docs|hwprofiles|planner|reports|tests|trainer)/[\w./-]*\w(?:, ([^;]+))?")
ARXIV = re.compile(r"arXiv (\d{2})(0[1-9]|1[0-2])\.\d{4,5}(?!\d)")

each = pytest.mark.parametrize("name", NAMES)


@cache
def situations() -> tuple[Situation, ...]:
    """Every generation of shipped cards and the CPU, every kind of model, and cards too old or too little known."""
    shipped = {(card.compute_capability, card.supports_bf16): card for card in reversed(list_profiles())}.values()
    odd = [
        replace(load_profile("rtx2060s"), id="unknown", name="Unknown", compute_capability=None),
        replace(load_profile("rtx2060s"), id="old", name="Old", compute_capability=(3, 5)),
    ]
    models = [load_model(facts.id) for facts in list_models()]
    kinds = {(m.model_type, m.activation, m.sliding_window is None, m.head_size): m for m in models}.values()
    return tuple(
        Situation(gpu, model, 2**35, disk_bytes=2**45) for gpu in (*shipped, cpu_profile(), *odd) for model in kinds
    )


@cache
def works() -> frozenset[str]:
    """Every piece of work that exists with nothing on, or that an optimisation adds."""
    found = set(baseline().work)
    for name in NAMES:
        ids, situation = where(name)
        found |= set(compose(ids, {}, situation).ledger.work)
    return frozenset(found)


def with_needs(name: str) -> frozenset[str]:
    """The optimisation and, for the terms that it needs and neither has nor finds there, whoever makes most of them."""
    known, ids = all_optimizations(), [name]
    for chosen in ids:  # grows while it is read
        ids += [need.name for need in known[chosen].requires if isinstance(need, With) and need.name not in ids]
        needed = {need.term for need in known[chosen].requires if isinstance(need, Needs)}
        needed |= {claim.rpartition(".")[0] for claim in known[chosen].claims if "/" in claim}
        missing = needed - set(baseline().terms) - set(baseline().work) - known[chosen].makes
        while missing := missing.difference(*(known[there].makes for there in ids)):
            ids.append(max(NAMES, key=lambda maker: len(known[maker].makes & missing)))
    return frozenset(ids)


def where(name: str) -> tuple[frozenset[str], Situation]:
    """The optimisation with what it needs, and a shipped card and model on which that is valid."""
    ids = with_needs(name)
    cards = {card.id for card in list_profiles()}
    found = [s for s in situations() if s.gpu.id in cards and not problems(ids, s)]
    assert found, f"{sorted(ids)} is valid on no shipped card with any shipped model"
    return ids, found[0]


@pytest.fixture
def rival(request: pytest.FixtureRequest) -> Iterator[Any]:
    """Registers an optimisation that claims and makes what it is told to, as long as the test runs."""

    def register(claims: frozenset[str], makes: frozenset[str] = frozenset()) -> None:
        parts = {
            "__doc__": "Made for a test.",
            "id": "rival",
            "title": "rival",
            "claims": claims,
            "makes": makes,
            "evidence": (Evidence("made for a test", "tests/test_optimizations.py"),),
            "rewrite": lambda self, ledger, knobs, situation: ledger,
            "apply": lambda self, session: None,
        }
        type("Rival", (Optimization,), parts)

    yield register
    REGISTRY.pop("rival", None)


# What it says of itself


@each
def test_it_introduces_itself(name: str) -> None:
    known = by_id(name)
    assert known.id == name and re.fullmatch(r"[a-z][a-z0-9_]*", name)
    module = inspect.getmodule(type(known))
    assert module and inspect.getdoc(module) and "__doc__" in vars(type(known)), "file and class say what it does"
    assert inspect.getdoc(type(known))
    assert known.title.strip() == known.title != "" and not known.title.endswith(".")
    assert all(1 <= number <= 44 for number in known.numbers) and len(set(known.numbers)) == len(known.numbers)
    assert known.exact or known.effect, "what changes the result says how"
    assert known.exact or not known.free


@each
def test_it_lies_in_a_file_of_its_own_name(name: str) -> None:
    module = inspect.getmodule(by_id(name))
    assert module and module.__name__.rpartition(".")[2] == name
    inside = [kind for kind in REGISTRY.values() if kind.__module__ == module.__name__]
    assert len(inside) == 1, "one optimisation, one file"


@each
def test_sources_of_evidence_and_of_terms_resolve(name: str) -> None:
    ids, situation = where(name)
    terms = compose(ids, {}, situation).ledger.terms
    sources = [evidence.source for evidence in by_id(name).evidence]
    assert by_id(name).evidence and all(evidence.statement for evidence in by_id(name).evidence)
    for source in [*sources, *(terms[made].source for made in by_id(name).makes)]:
        check_source(source)


@pytest.mark.parametrize("source", sorted({term.source for term in baseline().terms.values()}))
def test_sources_of_the_baseline_resolve(source: str) -> None:
    check_source(source)


def check_source(source: str) -> None:
    """A file of the repository exists and holds what follows its name; an arXiv id is one."""
    assert source.strip()
    assert source.lower().count("arxiv") == len(ARXIV.findall(source)), source
    for match in FILE.finditer(source):
        path, _, words = match.group().partition(", ")
        assert (ROOT / path).is_file(), f"{source}: there is no {path}"
        assert words.lower() in (ROOT / path).read_text(encoding="utf-8").lower(), f"{path} has nothing on {words}"


@pytest.mark.parametrize(
    "source",
    ["tests/test_no_such_file.py", "docs/decisions.md, no such heading", "arXiv 2313.08691", "arXiv 23.07"],
)
def test_a_source_that_resolves_to_nothing_is_found_out(source: str) -> None:
    with pytest.raises(AssertionError):
        check_source(source)


# What it claims and makes


@each
def test_claims_name_what_exists(name: str) -> None:
    known = by_id(name)
    terms = set(baseline().terms) | {term for other in all_optimizations().values() for term in other.makes}
    settings = compose([], {}, situations()[0]).settings
    for claim in known.claims:
        if "/" in claim:
            owner, dot, attribute = claim.rpartition(".")
            assert dot and " " not in claim, f"{claim}: a term and its attribute, with a dot between"
            assert owner in works() if attribute in OF_WORK else owner in terms and attribute in ATTRIBUTES, claim
            rivals = [other.id for other in all_optimizations().values() if other.id != name and claim in other.claims]
            assert owner not in known.makes or rivals, f"{claim}: what it makes, it claims to keep others off it alone"
        else:
            kind, _, word = claim.partition(" ")
            assert {"letter": word in BY_SYMBOL, "setting": word in settings}.get(kind, False), claim
    assert not known.makes & set(baseline().terms), "what it makes was not there"


@each
def test_letters_and_settings_are_claimed(name: str) -> None:
    known = by_id(name)
    for situation in situations():
        if known.reasons(situation):
            continue
        for knobs in every_choice(known, situation):
            letters, settings = known.letters(situation, knobs), known.settings(situation, knobs)
            assert {f"letter {letter}" for letter in letters} <= known.claims
            assert {f"setting {setting}" for setting in settings} <= known.claims
            assert {claim for claim in known.claims if " " in claim} == {
                *(f"letter {letter}" for letter in letters),
                *(f"setting {setting}" for setting in settings),
            }, "what is claimed is set"
            for letter, value in letters.items():
                assert type(value) is int and value >= BY_SYMBOL[letter].least


@each
def test_whoever_claims_the_same_is_refused_with_both_named(name: str, rival: Any) -> None:
    known = by_id(name)
    ids, situation = where(name)
    for claim in sorted(known.claims):
        rival(frozenset({claim}))
        found = problems({*ids, "rival"}, situation)
        assert f"{claim} is already claimed by rival" in found[name]
        assert f"{claim} is already claimed by {name}" in found["rival"]
        told = [str(error) for error in check_sets([name, "rival"], [], {}, situation)]
        assert any(name in line and "rival" in line and claim in line for line in told), told
        if claim == min(known.claims):  # every set is looked at, which takes seconds
            assert not [ids for ids in valid_sets(situation, [name, "rival"], [])]
        REGISTRY.pop("rival")
    for term in sorted(known.makes):
        rival(frozenset(), frozenset({term}))
        found = problems({*ids, "rival"}, situation)
        assert found[name] == (f"{term} is already made by rival",)
        assert found["rival"] == (f"{term} is already made by {name}",)
        REGISTRY.pop("rival")


@each
def test_it_composes_with_what_it_needs_and_with_no_less(name: str) -> None:
    ids, situation = where(name)
    configuration = compose(ids, {}, situation)
    assert set(configuration.ids) == set(configuration.knobs) == ids
    assert by_id(name).makes <= set(configuration.ledger.terms)
    for left_out in ids - {name}:
        found = problems(ids - {left_out}, situation)
        assert any(left_out in reason for reasons in found.values() for reason in reasons), "the maker is named"


# What it needs and what it can be set to


@each
def test_requirements_answer_with_sentences(name: str) -> None:
    known, met = by_id(name), 0
    for requirement in known.requires:
        assert requirement.text.strip() == requirement.text != ""
    for situation in situations():
        told = known.reasons(situation)
        met += not told
        assert isinstance(told, tuple)
        for reason in told:
            # Who prints them ends the sentence.
            assert isinstance(reason, str) and reason.strip() == reason and len(reason.split()) > 3
            assert not reason.endswith(".")
        if told:
            assert problems([name], situation)[name][: len(told)] == told
    assert met, "it can be used somewhere"


@each
def test_choices_of_knobs_are_within_their_bounds(name: str) -> None:
    known = by_id(name)
    assert len({knob.name for knob in known.knobs}) == len(known.knobs)
    for knob in known.knobs:
        assert knob.meaning and (knob.low is None) == (knob.high is None)
        assert knob.low is not None or knob.names or not knob.letter, "a letter is a number, with bounds, or a name's"
        for situation in situations():
            choices = knob.choices(situation)
            assert len(set(choices)) == len(choices)
            assert choices or known.reasons(situation), "where there is nothing to choose, it cannot be used"
            for choice in choices:
                if knob.low is None:
                    assert isinstance(choice, str) and choice
                    assert not knob.letter or choice in knob.names
                else:
                    assert type(choice) is (int if knob.whole else float)
                    # 0 is no bound of a number, it stands for "as the plan finds best".
                    assert knob.low <= choice <= (knob.high or 0) or (choice == 0 and len(choices) == 1)


# Its hook


class Recording:
    """A session that notes what it is asked, and refuses what the protocol does not have or does not take."""

    def __init__(self, knobs: dict[str, Scalar]) -> None:
        self.knobs, self.asked, self.called = knobs, set[str](), list[str]()

    def __getattr__(self, name: str) -> Any:
        assert name in METHODS, f"a session has no {name}"
        signature, hints = inspect.signature(getattr(Session, name)), get_type_hints(getattr(Session, name))

        def record(*args: Any, **kwargs: Any) -> Scalar | None:
            given = signature.bind(self, *args, **kwargs).arguments
            for argument, value in given.items():
                hint = hints.get(argument)
                if get_origin(hint) is Literal:
                    assert value in get_args(hint), f"{name}({argument}={value!r})"
                elif isinstance(hint, type):
                    assert type(value) is hint, f"{name}({argument}={value!r})"
            if name == "knob":
                self.asked.add(given["name"])
                return self.knobs[given["name"]]
            assert name not in self.called, f"{name} may be called once"
            self.called.append(name)
            return None

        return record


def every_choice(known: Optimization, situation: Situation) -> list[dict[str, Scalar]]:
    """Every combination of what its knobs may be, the best of each first."""
    names = [knob.name for knob in known.knobs]
    return [dict(zip(names, values, strict=True)) for values in product(*(k.choices(situation) for k in known.knobs))]


@each
def test_its_hook_asks_the_session_and_nothing_else(name: str) -> None:
    known, runs = by_id(name), 0
    for situation in situations():
        if known.reasons(situation):
            continue
        for knobs in every_choice(known, situation):
            session = Recording(knobs)
            known.apply(session)
            runs += 1
            assert session.called, "a hook that does nothing switches nothing on"
            assert session.asked == set(knobs), "what the plan sets is what the run reads"
    assert runs


def test_no_two_hooks_ask_the_session_for_the_same() -> None:
    """Each method may be called once, so what can be on together must not share one."""
    asked: dict[str, str] = {}
    for name in NAMES:
        session = Recording(every_choice(by_id(name), where(name)[1])[0])
        by_id(name).apply(session)
        for method in session.called:
            other = asked.setdefault(method, name)
            clash = other == name or by_id(other).claims & by_id(name).claims
            assert clash, f"{name} and {other} can be on together, and both call {method}"


def test_the_recording_session_refuses_what_is_no_session() -> None:
    assert "adapt" in METHODS and "knob" in METHODS
    for wrong in ("no_such_method", "__enter__"):
        with pytest.raises((AssertionError, AttributeError)):
            getattr(Recording({}), wrong)()
    with pytest.raises(AssertionError):
        Recording({}).optimize_with("sgd")
    with pytest.raises(AssertionError):
        Recording({}).adapt(rank="8", alpha=16)
    with pytest.raises(TypeError):
        Recording({}).checkpoint_layers(2)
