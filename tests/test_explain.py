"""`plan explain`: every name is explained, and every formula shown gives the number that the plan holds."""

from __future__ import annotations

import io
import json
import re
from functools import cache

import pytest
import sympy
from rich.console import Console

from planner.baseline import baseline
from planner.errors import PlanError
from planner.explain import Explanation, _term, _terms_and_work, _work, explanation
from planner.explain_formulas import planned_run
from planner.explain_report import print_explanation
from planner.ledger import GROUPS
from planner.optimizations import all_optimizations
from planner.plan import Plan
from planner.planning import Request, make_plan
from planner.symbols import LETTERS


@cache
def planned(gpu: str = "rtx2060s", model: str = "phi-2") -> Plan:
    return make_plan(Request(gpu=gpu, model=model, tier=1, host_bytes=2**37))


def explained(name: str, gpu: str = "rtx2060s", model: str = "phi-2") -> Explanation:
    return explanation(name, planned(gpu, model))


def printed(found: Explanation, width: int = 80) -> str:
    console = Console(file=io.StringIO(), width=width, color_system=None)
    print_explanation(found, console)
    return console.file.getvalue()  # type: ignore[attr-defined]


def computed(line: str) -> sympy.Expr:
    """What a line such as ``ceil(2·16/8)`` comes to, read by sympy and not by our own code."""
    names = {"ceil": sympy.ceiling, "max": sympy.Max, "min": sympy.Min, "floor": sympy.floor}
    names |= {letter.symbol: sympy.Symbol(letter.symbol, integer=True, positive=True) for letter in LETTERS}
    return sympy.sympify(line.replace("·", "*").replace("^", "**"), locals=names)


def sizes_in(plan: Plan) -> dict[str, int]:
    """Every term of the plan with its bytes."""
    found: dict[str, int] = dict(plan.memory.host.terms)
    for terms in plan.memory.gpu.phases.values():
        found |= terms
    found.pop("runtime/process")  # of the calibration, not of a formula
    return found


@pytest.mark.parametrize("model", ["phi-2", "llama-3.2-1b"])
def test_the_number_behind_every_term_is_the_one_in_the_plan(model: str) -> None:
    sizes = sizes_in(planned(model=model))
    assert len(sizes) > 20
    for name, size in sizes.items():
        (formula,) = explained(name, model=model).formulas
        assert formula.result == size, name
        assert computed(formula.numbers) == size, name


@pytest.mark.parametrize("name", ["activations/mlp", "loss/gradient", "weights/linear", "attention/scores"])
def test_formula_numbers_and_letters_belong_together(name: str) -> None:
    found = explained(name)
    (formula,) = found.formulas
    by_symbol = {str(symbol): symbol for symbol in computed(formula.text).free_symbols}
    assert {letter.symbol for letter in found.letters} == set(by_symbol)
    values = {by_symbol[letter.symbol]: letter.value for letter in found.letters}
    assert computed(formula.text).subs(values) == formula.result
    assert all(letter.unit and letter.meaning for letter in found.letters)
    assert formula.latex and formula.source and formula.basis


def test_a_term_tells_who_makes_and_changes_it() -> None:
    facts = explained("activations/checkpoints").facts
    assert ("Made by", "gradient_checkpointing or streamed") in facts
    assert any(name == "Changed by" and told.startswith("checkpoint_offload (device") for name, told in facts)
    assert ("Made by", "plain training, with nothing switched on") in explained("weights/embedding").facts


def test_a_term_that_the_plan_lacks_is_shown_as_it_would_be() -> None:
    plan = make_plan(Request(tier=1, excluded=("adamw_8bit",)))
    found = explanation("optimizer/scales", plan)
    assert dict(found.facts)["In this plan"].startswith("no:")
    assert found.formulas[0].result > 0


@pytest.mark.parametrize("gpu", ["rtx2060s", "h200-sxm", "cpu"])
@pytest.mark.parametrize("name", sorted(all_optimizations()))
def test_every_optimisation_is_explained_on_every_machine(name: str, gpu: str) -> None:
    found = explained(name, gpu, "smollm2-135m")
    each = all_optimizations()[name]
    facts = dict(found.facts)
    assert facts["In this plan"].startswith(("on: ", "off: "))
    assert found.text and found.title
    assert [told for fact, told in found.facts if fact == "Evidence"]
    assert len([1 for fact, _ in found.facts if fact == "Knob"]) == len(each.knobs)
    shown = {formula.name for formula in found.formulas}
    letters = {claim.removeprefix("letter ") for claim in each.claims if claim.startswith("letter ")}
    if not each.makes and letters and not any("/" in claim for claim in each.claims):
        assert {letter.symbol for letter in found.letters} & letters or (gpu == "cpu" and not shown)
        assert all(letters & set(words(formula.text)) for formula in found.formulas)
        return
    claimed = {claim.rpartition(".")[0] for claim in each.claims if "/" in claim} - set(baseline().work)
    assert shown == set(each.makes) | claimed or (gpu == "cpu" and not shown)
    json.dumps(found.document())
    printed(found)


def words(formula: str) -> list[str]:
    return re.findall(r"[A-Za-z_]+", formula)


def test_every_term_and_every_piece_of_work_has_its_formula_whole_with_every_letter() -> None:
    plan = make_plan(Request())
    run = planned_run(plan)
    terms, work = _terms_and_work(run)
    assert len(terms) > 80 and len(work) > 60
    found_all = [_term(each, run) for each in terms.values()] + [_work(each, run) for each in work.values()]
    for found in found_all:
        name = found.name
        assert found.formulas, name
        symbols = {letter.symbol for letter in found.letters}
        shown = "".join(printed(found, 80).split())
        for formula in found.formulas:
            assert set(words(formula.text)) - {"ceil", "floor", "max", "min"} <= symbols, formula
            assert formula.result >= 0 and formula.unit and formula.numbers and formula.source, formula
            assert "".join(formula.latex.split()) in shown, "LaTeX that is cut short is none"
        assert all(letter.unit and letter.value is not None for letter in found.letters), name


def test_a_requirement_that_is_not_met_says_why() -> None:
    told = dict(explained("nf4_weights", "cpu", "smollm2-135m").facts)["Requires"]
    assert "not met: needs a graphics card" in told


def test_what_an_optimisation_changes_stands_beside_what_there_is_without_it() -> None:
    formulas = {formula.name: formula for formula in explained("chunked_loss").formulas}
    assert formulas["loss/gradient"].without == "there is none"
    # Stock loss: 12 bytes for each of 4,608 tokens and 51,200 rows of the vocabulary.
    assert formulas["loss/logits"].without == "2.64 GiB"
    offload = {formula.name: formula for formula in explained("checkpoint_offload").formulas}
    assert offload["activations/checkpoints"].place == "in pinned memory"
    assert offload["activations/checkpoints"].without.endswith("on the card")


@pytest.mark.parametrize("letter", LETTERS, ids=lambda letter: letter.symbol)
def test_every_letter_is_explained(letter: object) -> None:
    symbol, meaning, unit = letter.symbol, letter.meaning, letter.unit  # type: ignore[attr-defined]
    found = explained(symbol)
    assert found.kind == "letter" and found.title == meaning
    value = found.letters[0].value
    assert dict(found.facts)["Value"] == ("none in this plan" if value is None else f"{value:,} {unit}")


def test_letters_have_the_values_of_model_and_run() -> None:
    assert [explained(symbol).letters[0].value for symbol in "STDLV"] == [4608, 512, 2560, 32, 51200]
    assert explained("target").letters == explained("T").letters, "the word that config uses finds the letter"


def test_every_knob_is_explained() -> None:
    for name, each in all_optimizations().items():
        for knob in each.knobs:
            found = explained(f"{name}.{knob.name}")
            assert found.kind == "knob" and found.title == knob.meaning
            assert dict(found.facts)["Set it with"] == f"--set {name}.{knob.name}=VALUE"
    rank = dict(explained("lora.rank").facts)
    assert rank["Value"] == "48" and rank["Allowed"] == "1 to 1,024" and "adapters/weights" in rank["Used by"]


def test_work_is_explained_in_flop_and_bytes() -> None:
    linear = explained("linear/forward").formulas[0]
    phi = 2 * 4608 * 32 * (78_643_200 + 48 * 46_080)  # 2·S·L·(P + R·U): weights and adapters of a layer
    assert (linear.result, linear.unit) == (phi, "FLOP")
    assert explained("link/out").formulas[0].unit == "bytes"


@pytest.mark.parametrize(
    ("asked", "nearest"),
    [
        ("chunkd_loss", "Did you mean chunked_loss"),
        ("activations/mpl", "activations/mlp"),
        ("lora.rnk", "lora.rank"),
        ("activations", "It is a group: activations/inputs"),
        ("", "`plan optimizations`"),
    ],
)
def test_what_is_not_known_brings_the_nearest(asked: str, nearest: str) -> None:
    with pytest.raises(PlanError, match="is no optimisation, term, letter or knob") as caught:
        explained(asked)
    assert nearest in str(caught.value)


def test_names_do_not_clash() -> None:
    terms = set(baseline().terms) | {term for each in all_optimizations().values() for term in each.makes}
    assert not terms & set(all_optimizations())
    assert not {letter.symbol for letter in LETTERS} & set(all_optimizations())
    assert {term.partition("/")[0] for term in terms} <= set(GROUPS)


@pytest.mark.parametrize("width", [80, 120])
def test_an_explanation_fits_the_terminal(width: int) -> None:
    for name in ("activations/mlp", "gradient_checkpointing", "S", "lora.rank"):
        text = printed(explained(name), width)
        assert max(map(len, text.splitlines())) <= width
        assert "\x1b" not in text
    whole, streamed = (
        make_plan(Request(tier=1, **wish)) for wish in ({"excluded": ("streamed",)}, {"required": ("streamed",)})
    )
    text = " ".join(printed(explanation("activations/mlp", streamed), width).split())
    assert "ceil(F·a·f·min(S_c, B·S)/8) bytes" in text
    text = " ".join(printed(explanation("activations/mlp", whole), width).split())
    assert "ceil(A·B·F·S·a·f/8) bytes" in text
    assert "ceil(1·1·10240·4608·16·2/8) = 188,743,680 bytes, 180.00 MiB" in text
    assert "Values: phi-2 on NVIDIA GeForce RTX 2060 SUPER, tier 1, 4,608 tokens, 512 of them trained." in text
