"""Properties of every formula and every configuration, on models, runs and sets that nobody chose by hand."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from itertools import product

import numpy as np
import pytest
import sympy
from drawing import (
    MACHINES,
    NAMES,
    PATTERNS,
    Drawn,
    drawn,
    examples,
    in_proportion,
    of_width,
    random_models,
    repaired,
)
from hypothesis import assume, given
from hypothesis import strategies as st

from planner.adapter_matrices import LEAST_EIGHT_BIT
from planner.baseline import baseline
from planner.calibration import calibration
from planner.compose import compose
from planner.evaluate import ENDLESS, Candidates, Evaluator, Limits
from planner.hardware import load_profile
from planner.ledger import Device, Phase
from planner.model import ModelShape, load_model
from planner.optimizations import all_optimizations
from planner.optimizations.base import Situation
from planner.planning import Request, make_plan
from planner.symbols import LETTERS, Letters, Number, symbolic_letters


@st.composite
def any_letters(draw: st.DrawFn) -> dict[str, int]:
    """Letters that belong to no model: each from its least value up, and T no more than S."""
    wide = {"S": 5000, "T": 5000, "D": 5000, "F": 20_000, "V": 200_000, "P": 10**8, "N": 10**6, "M": 10**8, "U": 10**5}
    values = {x.symbol: draw(st.integers(x.least, wide.get(x.symbol, 60))) for x in LETTERS}
    values |= {x.symbol: draw(st.integers(0, 1)) for x in LETTERS if x.unit == "flag" or x.symbol == "p"}
    values |= {width: draw(st.sampled_from([16, 32])) for width in "aw"}
    possible = {"l": min(values["l"], values["L"]), "H": max(values["H"], values["K"])}
    return values | possible | {"A": draw(st.sampled_from([1, values["L"]])), "T": min(values["S"], values["T"])}


# Formulas

Key = tuple[str, object, object]  # a name and what its bytes or its amount are computed by


@cache
def formulas() -> dict[Key, Callable[[Letters], Number]]:
    """Every formula of every term and every piece of work, of the baseline and of any set on any machine."""
    ledgers = [baseline()]
    for machine in MACHINES.values():
        for model in (*PATTERNS, *map(load_model, ("gemma-2-2b", "mixtral-8x7b"))):  # capped scores, experts
            situation = Situation(machine, model, 2**35, merge=True, disk_bytes=2**45)
            for off, passes in product(("", *(name for name in NAMES if name != "lora")), (False, True)):
                ids = repaired(set(NAMES) - {off}, situation, passes=passes)
                ledgers.append(compose(ids, {}, situation).ledger)
                for owner, knob in ((name, knob) for name in ids for knob in all_optimizations()[name].knobs):
                    # With a letter it gives that its value and does no more; the first choice is that of the set above.
                    for choice in () if knob.letter else knob.choices(replace(situation, chosen=frozenset(ids)))[1:]:
                        ledgers.append(compose(ids, {owner: {knob.name: choice}}, situation).ledger)
    found: dict[Key, Callable[[Letters], Number]] = {}
    for ledger in ledgers:
        found |= {(name, term.count, term.bits): term.bytes for name, term in ledger.terms.items()}
        found |= {(name, work.amount, None): work.amount for name, work in ledger.work.items()}
    return found


@cache
def expressions() -> dict[Key, sympy.Expr]:
    return {key: sympy.sympify(formula(symbolic_letters())) for key, formula in formulas().items()}


def test_no_formula_is_missed() -> None:
    seen = Counter(name for name, _, _ in formulas())
    for each in all_optimizations().values():
        assert each.makes <= seen.keys()
        changed = [claim for claim in each.claims if claim.endswith((".count", ".bits", ".amount"))]
        assert all(seen[claim.rpartition(".")[0]] >= 2 for claim in changed), "with it and without"


@pytest.mark.parametrize("passes", [False, True])
def test_a_knob_with_a_letter_gives_that_its_value_and_changes_no_formula(passes: bool) -> None:
    """On this rest `planner.branches`, and which formulas are gone through here."""
    situation = Situation(load_profile("h200-sxm"), load_model("phi-2"), 2**35, merge=True, disk_bytes=2**45)
    looked_at = set()
    for off in ("", *(name for name in NAMES if name != "lora")):
        ids = repaired(set(NAMES) - {off}, situation, passes=passes)
        plain = compose(ids, {}, situation)
        for owner, knob in ((name, knob) for name in ids for knob in all_optimizations()[name].knobs if knob.letter):
            looked_at.add(f"{owner}.{knob.name}")
            for choice in knob.choices(replace(situation, chosen=frozenset(ids))):
                other = compose(ids, {owner: {knob.name: choice}}, situation)
                assert (other.ledger.terms, other.ledger.work) == (plain.ledger.terms, plain.ledger.work), looked_at
                own = {knob.letter, *(("M_s", "M_b") if knob.letter == "R" else ())}  # sizes of adapters, which R sets
                assert {name for name, value in other.letters.items() if plain.letters[name] != value} <= own
    assert len(looked_at) >= 3


def check_three_evaluations(values: Mapping[str, int]) -> None:
    """Ints, numpy arrays and sympy give the same whole number of bytes, not below zero."""
    # The search gives arrays for the run alone; any other letter may be one as well.
    partly = Letters(**{s: np.array([v, v]) if s in {"S", "T", "R"} else v for s, v in values.items()})
    wholly = Letters(**{s: np.array([v]) for s, v in values.items()})
    symbols = vars(symbolic_letters())
    substitution = {symbols[symbol]: sympy.Integer(value) for symbol, value in values.items()}
    for key, formula in formulas().items():
        size = formula(Letters(**values))
        assert type(size) is int and size >= 0, (key, size)
        for letters in (partly, wholly):
            array = np.asarray(formula(letters))
            assert array.dtype.kind == "i" and (array == size).all(), (key, size, array)
        assert expressions()[key].xreplace(substitution) == size, key


@examples(120)
@given(drawn().map(lambda run: vars(run.letters)) | any_letters())
def test_every_formula_gives_whole_bytes_alike_in_ints_arrays_and_sympy(values: dict[str, int]) -> None:
    check_three_evaluations(values)


# Sums and peaks


@examples(100)
@given(drawn(), st.lists(st.integers(64, 2**26), min_size=2, max_size=5), st.integers(1, 2**26))
def test_evaluation_adds_up_and_grows_with_the_sequence(run: Drawn, totals: list[int], target: int) -> None:
    """What the search evaluates is the sum of the terms, and what does not fit here does not fit further on."""
    total = np.array(sorted(totals))
    at = Candidates(total, np.minimum(total, target), np.full_like(total, run.knobs["lora"]["rank"]), run.batch)
    configuration, kind = run.configuration, run.situation.gpu.kind
    evaluate = Evaluator(at, run.situation, calibration(), Limits(2**62, 2**62, 1e30))
    outcome, process = evaluate(configuration), calibration().host_process_bytes(kind)
    for index, (tokens, trained) in enumerate(zip(total.tolist(), at.target.tolist(), strict=True)):
        letters = configuration.at(batch=run.batch, total=tokens, target=trained, workspace=evaluate.workspace)
        terms, sizes = configuration.ledger.terms, configuration.ledger.bytes(letters)
        # Nothing fits beyond ``ENDLESS`` bytes, so the search counts no term as more than that.
        alive = {
            (device, phase): sum(
                min(sizes[name], ENDLESS) for name, x in terms.items() if phase in x.phases and x.device is device
            )
            for device, phase in product(Device, Phase)
        }
        assert outcome.expected[index] == max(alive[Device.GPU, phase] for phase in Phase)
        assert outcome.pinned[index] == max(alive[Device.PINNED, phase] for phase in Phase)
        held = max(alive[Device.PINNED, phase] + alive[Device.HOST, phase] for phase in Phase)
        assert outcome.host[index] == held + process + int(outcome.high[index]) * (kind == "cpu")
    assert (outcome.low <= outcome.expected).all() and (outcome.expected <= outcome.high).all()
    for peaks in (outcome.expected, outcome.high, outcome.host, outcome.pinned):
        assert (np.diff(peaks) >= 0).all()
    rank = np.asarray(outcome.time.rank)
    assert (np.diff(rank) >= -1e-9 * rank[1:]).all()


@pytest.mark.parametrize("gpu", ["h200-sxm", "cpu"])
def test_the_largest_run_that_can_be_asked_for_passes_no_limit_of_a_number(gpu: str) -> None:
    off = ("exact_attention", "gradient_checkpointing", "chunked_loss")
    plan = make_plan(Request(gpu, "llama-3.1-8b", total_tokens=2**26, excluded=off, train={"batch": 4096}))
    peak = plan.memory.gpu.peak_bytes
    assert plan.verdict == "does-not-fit" and 0 < peak.low <= peak.expected <= peak.high


@pytest.mark.parametrize(("gpu", "model"), [("rtx2060s", "phi-2"), ("h200-sxm", "qwen3-1.7b")])
def test_a_plan_adds_up(gpu: str, model: str) -> None:
    memory = make_plan(Request(gpu, model, tier=2)).memory
    totals = {phase: sum(terms.values()) for phase, terms in memory.gpu.phases.items()}
    peak = memory.gpu.peak_bytes
    assert peak.low <= peak.expected == max(totals.values()) == totals[memory.gpu.peak_phase] <= peak.high


# Peaks never fall


def small_matrices(run: Drawn) -> int:
    """Adapter matrices of a layer whose moments an eight-bit optimiser keeps in float32."""
    widths = [width for linear in run.model.linears for width in (linear.inputs, linear.outputs)]
    return sum(run.knobs["lora"]["rank"] * width < LEAST_EIGHT_BIT for width in widths)


def check_rise(before: Drawn, after: Drawn, allowed: int = 0) -> None:
    """No memory holds less in any phase, so no peak falls; the card in a loss by no more than what is allowed.

    Left out is where eight-bit moments begin: a matrix that grows to 4,096 elements takes less than a smaller one. And
    the disk where checkpoints are pruned by its bytes: of larger ones fewer are kept.
    """
    assume("adamw_8bit" not in before.ids or small_matrices(before) == small_matrices(after))
    for device in Device:
        if device is Device.DISK and "kept_checkpoints" in before.ids:
            continue
        low, high = before.phases(device), after.phases(device)
        for phase in Phase:
            slack = allowed if device is Device.GPU and phase in (Phase.LOSS, Phase.EVALUATE_LOSS) else 0
            assert high[phase] + slack >= low[phase], (device, phase, before, after)


@examples(120)
@given(drawn(), st.sampled_from([1, 2, 50, 5000]), st.sampled_from(["batch", "total", "total and target", "rank"]))
def test_peaks_do_not_fall_when_the_run_grows(run: Drawn, by: int, what: str) -> None:
    knobs = dict(run.knobs) | {"lora": dict(run.knobs["lora"]) | {"rank": run.knobs["lora"]["rank"] + by}}
    grown = {
        "batch": replace(run, batch=run.batch + by % 8 + 1),
        "total": replace(run, total=run.total + by),
        "total and target": replace(run, total=run.total + by, target=run.target + by),
        "rank": replace(run, knobs=knobs),
    }[what]
    check_rise(run, grown)
    check_rise(replace(run, target=run.total), replace(grown, target=grown.total))


@examples(100)
@given(drawn(), st.data())
def test_trained_tokens(run: Drawn, data: st.DataObject) -> None:
    """More trained tokens take more, but for one step: where every token is trained, none needs picking out.

    The chunked loss then reads the hidden states where they lie, and their copy, B·T·D elements, is not made.
    """
    grown = replace(run, target=data.draw(st.integers(run.target, run.total)))
    all_at_once, x = run.target < grown.target == run.total and "chunked_loss" in run.ids, run.letters
    check_rise(run, grown, x.B * x.T * x.D * x.a // 8 if all_at_once else 0)


@examples(120)
@given(drawn(), random_models(), st.integers(1, 40), st.sampled_from(["layers", "vocab", "width", "proportions"]))
def test_peaks_do_not_fall_when_the_model_grows(run: Drawn, model: ModelShape, by: int, what: str) -> None:
    """What depends on a size (P, M, N, U, ...) grows with it. The width is raised twice over.

    Alone, heads and MLP as they are; and with them in proportion, as the models of one family differ.
    """
    if what == "width":
        run = replace(run, model=replace(model, model_type=run.model.model_type))
        run = replace(run, ids=repaired(set(run.ids), run.situation))
        grown = of_width(run.model, run.model.width + by)
    elif what == "proportions":
        grown = in_proportion(run.model, 2 + by % 3)
    else:
        grown = replace(run.model, **{what: getattr(run.model, what) + by})
    check_rise(run, replace(run, model=grown))


# Order


@examples(100)
@given(drawn(), st.data())
def test_the_order_of_rewrites_does_not_matter(run: Drawn, data: st.DataObject) -> None:
    composed = run.configuration
    situation = replace(run.situation, chosen=frozenset(run.ids))
    waiting = [all_optimizations()[name] for name in data.draw(st.permutations(run.ids))]
    nothing_on = compose([], {}, run.situation)
    ledger, letters, chosen = nothing_on.ledger, dict(nothing_on.letters), dict(nothing_on.settings)
    while waiting:
        there = {*ledger.terms, *ledger.work}
        first = next(x for x in waiting if {c.rpartition(".")[0] for c in x.claims if "/" in c} <= there | x.makes)
        waiting.remove(first)
        knobs = composed.knobs[first.id]
        ledger = first.rewrite(ledger, knobs, situation)
        letters |= first.letters(situation, knobs)
        chosen |= first.settings(situation, knobs)
    assert ledger == composed.ledger  # dictionaries are equal in any order
    assert letters == composed.letters and chosen == composed.settings
