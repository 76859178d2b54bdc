"""When a plan scales the rotary embedding, by how much, what it says of it, and what it refuses."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from planner.cli_check import planned_again, same_settings
from planner.errors import PlanError
from planner.explain import explanation
from planner.model import load_model
from planner.plan import Plan, Rope, Scaling
from planner.plan_file import load_plan
from planner.planning import Request, make_plan
from planner.rope_scaling import MEANINGS, NAMES, rope_mistakes, rope_of, rope_warnings
from planner.settings import parse_settings

PHI, LLAMA, GEMMA, PHI4 = (load_model(name) for name in ("phi-2", "llama-3.2-1b", "gemma-3-1b", "phi-4-mini"))
WINDOWED, LEARNED = load_model("mistral-7b-v0.1"), load_model("gpt2")


def plan(total: int, **asked: object) -> Plan:
    return make_plan(Request(gpu="h200-sxm", total_tokens=total, **asked))  # type: ignore[arg-type]


def test_every_kind_has_a_name_and_a_meaning() -> None:
    assert set(MEANINGS) == set(NAMES) == set(get_args(Scaling))


@given(total=st.integers(2, 2**26))
def test_the_default_reaches_the_whole_sequence_and_no_native_length_more(total: int) -> None:
    rope, native = rope_of(PHI, total), PHI.native_context
    if total <= native:
        assert (rope.scaling, rope.factor, rope.parameters) == ("none", 1.0, {})
    else:
        assert rope.scaling == "yarn" and native * (rope.factor - 1) < total <= native * rope.factor
        assert rope.factor.is_integer() and rope.parameters["factor"] == rope.factor


def test_yarn_writes_every_parameter_out() -> None:
    assert rope_of(PHI, 8192).parameters == {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 2048,
        "attention_factor": 0.1 * math.log(4) + 1,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
    }


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (LLAMA, r"scaling of its own \(llama3\)"),
        (PHI4, r"scaling of its own \(longrope\)"),
        (replace(PHI4, rope_type="default"), "family phi3 take no scaling but longrope"),
        (LEARNED, "no rotary embedding"),
    ],
)
def test_what_cannot_be_scaled_is_left_and_refused_when_asked(model: object, why: str) -> None:
    rope = rope_of(model, 2**20)  # type: ignore[arg-type]
    assert (rope.scaling, rope.parameters) == ("none", {})
    (warning,) = rope_warnings(model, 2**20, rope)  # type: ignore[arg-type]
    assert "nothing is scaled" in warning and warning.endswith("Context trained is not context used.")
    for asked in (("yarn", None), (None, 2.0)):
        (mistake,) = rope_mistakes(model, *asked)  # type: ignore[arg-type]
        with pytest.raises(PlanError, match=why):
            raise mistake
    assert rope_mistakes(model, None, None) == rope_mistakes(model, "none", None) == []  # type: ignore[arg-type]


def test_a_window_in_every_layer_needs_no_scaling_and_may_have_it() -> None:
    assert rope_of(WINDOWED, 2**17).scaling == "none" and "no distance is new" in rope_of(WINDOWED, 2**17).reason
    assert rope_of(WINDOWED, 2**17, "linear").factor == 4


def test_gemma_says_that_only_its_full_layers_are_scaled() -> None:
    (warning,) = rope_warnings(GEMMA, 2**16, rope_of(GEMMA, 2**16))
    assert "The rotary embedding of its full layers is scaled by YaRN ×2" in warning


@pytest.mark.parametrize(
    ("asked", "total", "scaling", "factor", "told"),
    [
        ((None, None), 8192, "yarn", 4.0, "What it computes changes at every length, short ones too"),
        (("none", None), 8192, "none", 1.0, "turns them by angles that it never met. --set train.rope=yarn scales"),
        (("linear", None), 5000, "linear", 3.0, "scaled by linear ×3, so that they lie within what it knows"),
        (("dynamic", 2.0), 8192, "dynamic", 2.0, "rows of up to 2,048 tokens stay as they are"),
        (("yarn", 2.0), 8192, "yarn", 2.0, "which reaches 4,096 tokens"),
        ((None, 8.0), 1024, "yarn", 8.0, "What it computes changes at every length"),
        (("yarn", None), 2**18, "yarn", 128.0, "published for factors of up to 32"),
    ],
)
def test_what_is_asked_is_planned_and_told(
    asked: tuple[Scaling | None, float | None], total: int, scaling: str, factor: float, told: str
) -> None:
    made = plan(total, rope=asked[0], rope_factor=asked[1])
    assert (made.rope.scaling, made.rope.factor) == (scaling, factor)
    assert any(told in warning for warning in made.warnings), made.warnings
    beyond = any(
        "phi-2 was made for 2,048 tokens, and positions beyond are new to it" in each for each in made.warnings
    )
    assert beyond is (total > 2048)
    assert any("Context trained is not context used." in warning for warning in made.warnings) is beyond


def test_a_factor_of_one_is_no_scaling() -> None:
    assert rope_of(PHI, 2048, "yarn") == Rope(reason="2,048 tokens are within the 2,048 that the model was made for")
    assert rope_of(PHI, 4096, "yarn", 1.0).scaling == "none"


def test_scaling_changes_no_byte() -> None:
    plain, scaled = plan(8192, rope="none"), plan(8192)
    assert plain.memory == scaled.memory and plain.time == scaled.time


def test_a_plan_file_holds_it_and_plans_the_same_again(tmp_path: Path) -> None:
    made, file = plan(8192, rope="linear", rope_factor=5.5), tmp_path / "plan.yaml"
    file.write_text(made.to_yaml(), encoding="utf-8")
    again = load_plan(file)
    assert again == made and make_plan(same_settings(again, "h200-sxm")).rope == made.rope
    document = made.document()
    document["rope"]["factor"] = 4.0
    file.write_text(json.dumps(document), encoding="utf-8")
    with pytest.raises(PlanError, match=r"rope\.parameters\.factor"):
        planned_again(load_plan(file))


def test_settings_are_read_and_refused() -> None:
    assert parse_settings(["train.rope=dynamic", "train.rope_factor=2.5"])[1] == {"rope": "dynamic", "rope_factor": 2.5}
    for assignment, why in (
        ("train.rope=yran", r"no scaling of the rotary embedding.*yarn"),
        ("train.rope_factor=0.5", "must be a number from 1"),
        ("train.rope_factor=nan", "must be a number from 1"),
        ("train.rope_factor=much", "must be a number from 1"),
    ):
        with pytest.raises(PlanError, match=why):
            parse_settings([assignment])
    with pytest.raises(PlanError, match="a factor to no scaling"):
        plan(8192, rope="none", rope_factor=2.0)
    with pytest.raises(ValidationError):
        Rope(scaling="longrope")  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["rope", "train.rope", "train.rope_factor"])
def test_it_is_explained(name: str) -> None:
    made = plan(8192)
    found = explanation(name, made)
    facts = dict(found.facts)
    assert found.kind == "setting" and facts["Value"] == f"yarn, factor 4: {made.rope.reason}"
    assert "attention_factor 1.13" in facts["In the config"]
    assert "scaled by YaRN ×4" in found.text
