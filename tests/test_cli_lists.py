"""The subcommands: lists, explanations, the schema, and `plan check`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from cli_fixture import Capture, answered, mistakes
from plan_fixture import document, example_plan

from planner.cli import main
from planner.cli_output import write_plan
from planner.plan import json_schema
from planner.planning import Request, make_plan


def test_the_lists_as_json(capsys: Capture) -> None:
    cards = {card["id"]: card for card in answered(capsys, "gpus", "--json")["gpus"]}
    assert cards["rtx2060s"]["budget_bytes"] == (7974 - 621) * 2**20
    assert all(fact["source"] or fact["why"] for card in cards.values() for fact in card["facts"].values())
    models = {model["id"]: model for model in answered(capsys, "models", "--json")["models"]}
    assert models["phi-2"]["counted"] == 2_779_683_840


def test_the_lists_as_tables_fit_80_columns(capsys: Capture) -> None:
    for command in ("gpus", "models", "optimizations"):
        assert main([command]) == 0
        out = capsys.readouterr().out
        assert max(map(len, out.splitlines())) <= 80
        assert {"gpus": "rtx2060s", "models": "phi-2", "optimizations": "chunked_loss"}[command] in out


def test_optimisations_have_the_state_they_have_in_the_plan(capsys: Capture) -> None:
    listed = answered(capsys, "optimizations", "--gpu", "cpu", "--model", "smollm2-135m", "--context", "1K", "--json")
    states = {each["id"]: each["state"] for each in listed}
    plan = make_plan(Request(gpu="cpu", model="smollm2-135m", total_tokens=1024))
    assert {name for name, state in states.items() if state == "on"} == {choice.id for choice in plan.choices}
    assert states["nf4_weights"] == "off"
    nf4 = next(each for each in listed if each["id"] == "nf4_weights")
    assert any("needs a graphics card" in reason for reason in nf4["reasons"])


def test_explain_goes_by_what_a_plan_is_narrowed_to(capsys: Capture) -> None:
    asked = ("explain", "weights/linear", "--tier", "1", "--with", "nf4_weights")
    narrow, wide = (answered(capsys, *asked[:4], *more, "--json") for more in (asked[4:], ("--without", "nf4_weights")))
    assert narrow["name"] == wide["name"] == "weights/linear"
    assert narrow != wide, "a quarter of the bytes, and another plan"
    assert main([*asked, "--without", "nf4_weights"]) == 2
    assert "asks for both" in capsys.readouterr().err


def test_explain_as_json_and_as_text(capsys: Capture) -> None:
    found = answered(capsys, "explain", "weights/head", "--tier", "1", "--json")
    assert found["formulas"][0]["result"] == 262_144_000
    assert main(["explain", "weights/head", "--tier", "1"]) == 0
    assert "262,144,000 bytes" in capsys.readouterr().out


def test_the_schema_is_that_of_the_plan(capsys: Capture) -> None:
    schema = answered(capsys, "schema")
    assert schema == json_schema()
    jsonschema = pytest.importorskip("jsonschema")
    jsonschema.validate(json.loads(example_plan().to_json()), schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(document(surplus=1), schema)


@pytest.mark.parametrize(
    ("gpu", "settings"),
    [("rtx2060s", {"tier": 1}), ("cpu", {"model": "smollm2-135m", "total_tokens": 1000, "target": 10})],
)
def test_a_fresh_plan_still_fits_and_nothing_differs(
    gpu: str, settings: dict[str, Any], tmp_path: Path, capsys: Capture
) -> None:
    place = tmp_path / "plan.yaml"
    write_plan(make_plan(Request(gpu=gpu, **settings)), place)
    assert main(["check", str(place)]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "is a valid plan." in out and "It still fits" in out and "nothing differs" in out


def test_a_plan_that_was_changed_by_hand_is_found_out(tmp_path: Path, capsys: Capture) -> None:
    place, plan = tmp_path / "plan.yaml", make_plan(Request(tier=1))
    high = plan.memory.gpu.peak_bytes.high
    place.write_text(plan.to_yaml().replace(f"high: {high}", f"high: {high + 2**20}"))
    assert main(["check", str(place)]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "the file itself was changed" in out and "memory.gpu.peak_bytes.high" in out
    assert main(["check", str(place), "--json"]) == 0
    differences = json.loads(capsys.readouterr().out)["differences"]
    assert differences == [{"place": "memory.gpu.peak_bytes.high", "file": high + 2**20, "now": high}]


def test_a_changed_calibration_is_named(tmp_path: Path, capsys: Capture) -> None:
    place, plan = tmp_path / "plan.yaml", make_plan(Request(tier=1))
    place.write_text(plan.to_yaml().replace(plan.provenance.calibration_sha256, "f" * 64))
    assert main(["check", str(place)]) == 0
    assert "Since it was made, the calibration changed." in capsys.readouterr().out


def test_a_plan_for_a_large_card_does_not_fit_a_small_one(tmp_path: Path, capsys: Capture) -> None:
    place = tmp_path / "plan.yaml"
    plan = make_plan(Request(gpu="rtx4090", total_tokens=40_000, excluded=("checkpoint_offload", "streamed")))
    assert plan.verdict == "fits"
    write_plan(plan, place)
    assert main(["check", str(place)]) == 0
    assert main(["check", str(place), "--gpu", "rtx3060-12gb"]) == 1
    assert "does not fit" in capsys.readouterr().out


def test_a_plan_for_a_card_that_is_gone_says_how_to_go_on(tmp_path: Path, capsys: Capture) -> None:
    place = tmp_path / "plan.yaml"
    write_plan(example_plan(gpu=document()["gpu"] | {"id": "rtx1"}), place)
    told = mistakes(capsys, "check", str(place))
    assert told[0].startswith("error: card rtx1: ") and "--gpu CARD` takes the file of its profile" in told[0]
