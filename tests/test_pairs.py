"""Runs with an optimisation and without it: they differ in it alone, and memory changes as it was planned to."""

from __future__ import annotations

import json

import pytest

from planner.effects import effects
from planner.measurements import Record
from planner.optimizations import all_optimizations
from planner.plan import Plan
from planner.plan_file import load_plan
from planner.planning import Request, make_plan
from reports.render.largest import found as largest_found
from reports.render.pairs import FOLDER, in_host, made, on_card, pinned, record
from reports.validation.cases import Case
from reports.validation.largest import CARDS, LARGEST
from reports.validation.measure import HERE
from reports.validation.pairs import CARD, PAIRED, PAIRS, Pair

WITH_IT = {
    "mixed_precision": {"exact_attention"},  # another kernel, as the card's fastest is for 16 bits
    "streamed": {"checkpoint_offload", "exact_attention", "gradient_checkpointing"},  # that is how it does it
}
"""What cannot stay as it was when an optimisation is switched."""
NO_PAIR = {"lora", "kept_checkpoints"}
"""Nothing is trained without the first; the second changes the disk alone."""
NAMES = [f"{pair.optimization}-{pair.with_it}" for pair in PAIRS]


def _frozen(name: str) -> Plan:
    return load_plan(FOLDER / "plans" / f"{name}.yaml")


def _ran(found: Record) -> Plan:
    return Plan.model_validate_json(json.dumps(found.content["plan"]))


def test_each_run_has_its_plan_and_a_part_in_a_pair() -> None:
    names = {case.name for case in PAIRED}
    assert {path.stem for path in (FOLDER / "plans").glob("*.yaml")} == names
    assert names == {name for pair in PAIRS for name in (pair.without, pair.with_it)}
    assert len(names) == len(PAIRED) and {path.stem for path in FOLDER.glob("*.json")} <= names


@pytest.mark.parametrize("pair", PAIRS, ids=NAMES)
def test_a_pair_differs_in_one_optimisation(pair: Pair) -> None:
    without, with_it = _frozen(pair.without), _frozen(pair.with_it)
    assert without.verdict == with_it.verdict == "fits"
    before, after = ({choice.id: choice.knobs for choice in plan.choices} for plan in (without, with_it))
    differ = {name for name in before | after if before.get(name) != after.get(name)}
    assert pair.optimization in after and pair.optimization not in before
    assert differ == {pair.optimization} | WITH_IT.get(pair.optimization, set())
    assert without.total_tokens == with_it.total_tokens and without.lora_rank == with_it.lora_rank
    settings = [plan.train.model_copy(update={"steps": None, "evaluate_every": 0}) for plan in (without, with_it)]
    assert settings[0] == settings[1]
    assert not pair.timed or with_it.stages or without.train.steps == with_it.train.steps


def test_whatever_changes_the_card_or_the_time_has_a_pair() -> None:
    paired = {pair.optimization for pair in PAIRS}
    for model in ("llama-3.2-1b", "phi-2", "gemma-2-2b"):
        for required, excluded in (((), ("streamed",)), (("streamed",), ())):
            if model == "gemma-2-2b" and required:
                continue  # its scores are capped, for which layers in passes have no kernel
            found = effects(
                make_plan(Request(CARD, model, total_tokens=4096, required=required, excluded=excluded)), CARD
            )
            changing = {
                name for name, each in found.items() if each.terms or each.step is None or abs(each.step - 1) > 0.005
            }
            assert changing - NO_PAIR <= paired, model
    assert paired <= {*all_optimizations()}


@pytest.mark.parametrize(("pair", "records"), made().items(), ids=lambda value: getattr(value, "with_it", ""))
def test_memory_changed_as_it_was_planned_to(pair: Pair, records: tuple[Record, Record]) -> None:
    assert on_card(*records).holds and abs(on_card(*records).off) < 2 * 2**20
    assert abs(pinned(*records).off) < 2**20
    if pair.host and pair.optimization != "mapped_tokens":  # its library takes what no formula has
        assert in_host(*records).holds


@pytest.mark.parametrize("name", sorted({path.stem for path in FOLDER.glob("*.json")}))
def test_a_run_went_by_the_plan_that_was_frozen(name: str) -> None:
    found, frozen = record(name), _frozen(name)
    assert found is not None and found.over <= 0, "the bound"
    assert _ran(found).choices == frozen.choices
    assert found.expected == frozen.memory.gpu.peak_bytes.expected
    assert found.content["predicted"]["step_seconds"] == frozen.time.step_seconds.estimate


@pytest.mark.parametrize(("card", "case"), [*zip(CARDS, LARGEST, strict=True)], ids=CARDS)
def test_the_largest_set_takes_what_was_planned(card: str, case: Case) -> None:
    found, frozen = largest_found()[card], load_plan(HERE / "largest" / "plans" / f"{case.name}.yaml")
    assert len(frozen.choices) >= 28 and _ran(found).choices == frozen.choices
    assert abs(found.error) < 0.01 and found.over <= 0
    assert all(loss is not None for loss in found.content["losses"]) and len(found.content["losses"]) == 4
    assert found.how == ("run" if card == CARD else "rehearsed")
