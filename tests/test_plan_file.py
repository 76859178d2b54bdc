"""The plan file: its schema ships and is true, equal inputs give equal bytes, mistakes are told all at once."""

import json
from pathlib import Path

import jsonschema
import pytest
import yaml

import planner
from planner.errors import PlanError, PlanErrors
from planner.plan import json_schema
from planner.plan_file import load_plan
from planner.planning import Request, make_plan
from planner.validating import _decisive

SHIPPED = Path(planner.__file__).with_name("plan.schema.json")


def test_shipped_schema_is_the_schema() -> None:
    """`plan schema > planner/plan.schema.json` writes it anew."""
    assert json.loads(SHIPPED.read_text(encoding="utf-8")) == json_schema()


@pytest.mark.parametrize("gpu", ["rtx2060s", "h200-sxm", "cpu"])
def test_plans_satisfy_the_schema_and_hold_what_was_promised(gpu: str) -> None:
    document = json.loads(make_plan(Request(gpu=gpu, model="smollm2-135m")).to_json())
    jsonschema.validate(document, json.loads(SHIPPED.read_text(encoding="utf-8")))
    for path in [
        "schema",
        "verdict",
        "gpu.id",
        "model.id",
        "model.parameters",
        "tier",
        "context",
        "target",
        "total_tokens",
        "lora_rank",
        "executor",
        "choices",
        "rejected",
        "memory.gpu.budget_bytes",
        "memory.gpu.peak_bytes.low",
        "memory.gpu.peak_bytes.expected",
        "memory.gpu.peak_bytes.high",
        "memory.gpu.peak_phase",
        "memory.gpu.phases",
        "memory.host.peak_bytes",
        "time.step_seconds.bound",
        "time.step_seconds.estimate",
    ]:
        place = document
        for key in path.split("."):
            assert key in place, path
            place = place[key]
    assert all({"id", "reason", "knobs"} <= choice.keys() for choice in document["choices"])
    assert all(rejection["reasons"] for rejection in document["rejected"])
    phases = document["memory"]["gpu"]["phases"]
    expected = document["memory"]["gpu"]["peak_bytes"]["expected"]
    assert max(sum(terms.values()) for terms in phases.values()) == expected
    assert sum(phases[document["memory"]["gpu"]["peak_phase"]].values()) == expected


def test_equal_inputs_give_equal_bytes_and_files_read_back(tmp_path: Path) -> None:
    first, second = make_plan(Request()), make_plan(Request())
    assert first.to_yaml() == second.to_yaml() and first.to_json() == second.to_json()
    for name, text in (("plan.yaml", first.to_yaml()), ("plan.json", first.to_json())):
        (tmp_path / name).write_text(text, encoding="utf-8")
        assert load_plan(tmp_path / name) == first


def test_a_file_from_before_there_was_a_knob_means_what_it_did(tmp_path: Path) -> None:
    written = make_plan(Request(tier=3, required=("gradient_noise",)))
    assert written.knobs("gradient_noise")["kind"] == "relative"
    document = written.document()
    (choice,) = (each for each in document["choices"] if each["id"] == "gradient_noise")
    del choice["knobs"]["kind"]
    place = tmp_path / "plan.yaml"
    place.write_text(yaml.safe_dump(document), encoding="utf-8")
    assert load_plan(place).knobs("gradient_noise")["kind"] == "absolute"
    del choice["knobs"]["decay"]  # which every file has
    place.write_text(yaml.safe_dump(document), encoding="utf-8")
    with pytest.raises(PlanError, match="decay: is missing"):
        load_plan(place)


def test_a_record_from_before_there_was_a_knob_is_of_the_same_plan() -> None:
    plan = make_plan(Request(tier=3, required=("gradient_noise",), knobs={"gradient_noise": {"kind": "absolute"}}))
    before = json.loads(json.dumps(plan.document()))
    for choice in before["choices"]:
        choice["knobs"].pop("kind", None)
    assert before != plan.document() and _decisive(before) == _decisive(plan.document())
    other = make_plan(Request(tier=3, required=("gradient_noise",)))
    assert _decisive(other.document()) != _decisive(before)


def test_mistakes_are_told_together(tmp_path: Path) -> None:
    document = yaml.safe_load(make_plan(Request()).to_yaml())
    document["lora_rang"], document["target"], document["memory"]["gpu"]["budget_bytes"] = 4, -1, "much"
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(document), encoding="utf-8")
    with pytest.raises(PlanErrors) as caught:
        load_plan(tmp_path / "plan.yaml")
    message = str(caught.value)
    assert "lora_rang" in message and "lora_rank" in message and "target" in message and "budget_bytes" in message


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "holds no plan"),
        ("a: [1", "is not valid YAML"),
        ("schema: tierplan/9\n", "tierplan/9"),
        ("a: &a [*a]\n", "a plan has no aliases"),
        ("!!python/object/apply:os.system ['true']", "is not valid YAML"),
    ],
)
def test_files_that_are_no_plan(tmp_path: Path, text: str, told: str) -> None:
    (tmp_path / "plan.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(PlanError, match=told):
        load_plan(tmp_path / "plan.yaml")


@pytest.mark.parametrize(
    ("path", "value", "told"),
    [
        (("choices", 0, "id"), "checkpoint_ofload", "checkpoint_offload"),
        (("choices", "mixed_precision", "id"), "chunked_loss", "is there twice"),
        (("lora_rank",), 4, "the knob rank of lora is"),
        (("tier",), 12, "tiers go from 1 to 11"),
        (("tier",), 0, "tiers go from 1 to 11"),
        (("time", "limit_seconds"), -1.0, "leaves no time"),
        (("choices", "lora", "knobs", "rank"), "16", "not a whole number"),
        (("choices", "lora", "knobs", "rank"), 100_000, "must be from 1 to 1,024"),
        (("choices", "lora", "knobs", "rang"), 3, "no knob 'rang'"),
        (("choices", "chunked_loss", "knobs"), {}, "is missing"),
        (("choices", "exact_attention", "knobs", "kernel"), 3, "not a name"),
        (("memory", "gpu", "peak_bytes", "expected"), 10**9, "the terms of the highest phase are"),
        (("memory", "gpu", "phases", "backward", "activations/mlp"), 10**10, "the terms of the highest phase are"),
        (("memory", "gpu", "peak_phase"), "load", "is not the highest"),
        (("memory", "gpu", "peak_bytes", "low"), 2**40, "a low above the expected"),
        (("memory", "host", "pinned_bytes"), 2**40, "more than the peak"),
        (("memory", "gpu", "budget_bytes"), 2**20, "memory.gpu is beyond its budget"),
        (("memory", "gpu", "budget_bytes"), 2**40, "more than the visible memory"),
        (("memory", "host", "budget_bytes"), 2**20, "memory.host is beyond its budget"),
        (("time", "limit_seconds"), 1e-3, "cannot be within time.limit_seconds"),
        (("tier",), 2, "tier 2 has 10,240"),
    ],
)
def test_what_no_plan_could_hold_is_refused(
    tmp_path: Path, path: tuple[str | int, ...], value: object, told: str
) -> None:
    document = json.loads(make_plan(Request(tier=1)).to_json())
    place, steps = document, list(path)
    if steps[:1] == ["choices"] and isinstance(steps[1], str):
        steps[1] = next(n for n, choice in enumerate(document["choices"]) if choice["id"] == steps[1])
    for step in steps[:-1]:
        place = place[step]
    place[steps[-1]] = value
    (tmp_path / "plan.json").write_text(json.dumps(document), encoding="utf-8")
    with pytest.raises(PlanError, match=told):
        load_plan(tmp_path / "plan.json")


def test_a_key_given_twice_is_refused(tmp_path: Path) -> None:
    text = make_plan(Request(tier=1)).to_yaml()
    (tmp_path / "plan.yaml").write_text(text + "tier: 2\n", encoding="utf-8")
    with pytest.raises(PlanError, match="tier is there twice"):
        load_plan(tmp_path / "plan.yaml")
