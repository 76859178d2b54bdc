"""Trainings of a real model: each differs from the one beside it in what it says, and the page adds them up."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from cli_fixture import Capture, answered
from trainer_tiny import save_model

from planner.optimizations import all_items, all_optimizations
from reports.quality import cases, measure
from reports.quality.cases import AGAIN, BASE, KERNEL, SEEDS, TRAININGS, Training
from reports.render import quality

BY_NAME = {training.name: training for training in TRAININGS}
NO_TRAINING = {"lora": "without it nothing is trained", "mixed_precision": "told of beside 32 bits, which is the other"}


def test_whatever_may_change_what_is_learnt_is_trained_with_and_without() -> None:
    changing = {name for name, each in all_optimizations().items() if not each.exact}
    trained = {training.optimization for training in TRAININGS}
    assert changing - {*NO_TRAINING} <= trained <= {*all_optimizations(), ""}
    assert len(BY_NAME) == len(TRAININGS) and {training.beside for training in TRAININGS} <= {*BY_NAME}


@pytest.mark.slow
@pytest.mark.parametrize("training", TRAININGS, ids=lambda training: training.name)
def test_a_training_differs_in_what_it_says(training: Training, capsys: Capture) -> None:
    plans = [
        answered(capsys, "--gpu", "h200-sxm", "--model", "smollm2-135m", *each.arguments(2), "--json")
        for each in (training, BY_NAME[training.beside])
    ]
    mine, beside = ({choice["id"]: choice["knobs"] for choice in plan["choices"]} for plan in plans)
    if training.optimization:
        assert training.optimization in mine and training.optimization not in beside
        assert training.optimization == "streamed" or {*mine} == {*beside, training.optimization}
    kernels = {knobs["kernel"] for choices in (mine, beside) for knobs in choices.values() if "kernel" in knobs}
    assert kernels - {KERNEL} == ({"efficient"} if training.name == "float32" else set()), (
        "what is the fastest in a moment is no part of what is compared"
    )
    assert plans[0]["verdict"] == "fits" and plans[0]["train"]["seed"] == 2
    settings = [plan["train"] for plan in plans]
    differ = {name for name, value in settings[0].items() if value != settings[1][name]}
    named = {word.partition("=")[0].removeprefix("train.") for word in training.words.split() if "train." in word}
    assert differ <= named | {"save_minutes"}
    for name in ("batch", "accumulation", "steps"):
        assert settings[0][name] == settings[1][name], "as many rows and steps"


def _record(training: str, seed: int, loss: float, tokens: int = 100) -> dict[str, Any]:
    evaluation = {"loss": loss, "perplexity": 1.0, "rows": 4, "tokens": tokens}
    return {
        "training": training,
        "seed": seed,
        "evaluation": {"before": evaluation, "after": evaluation},
        "kernel": "flash",
        "environment": {"python": "3.12", "gpu": None, "packages": {"torch": "2", "transformers": "5"}},
    }


NAMED = ("rslora", "lookahead", "ema", "one_cycle", "lora_plus")


def test_the_page_compares_seed_by_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = [_record(BASE, seed, 2.0 + seed) for seed in SEEDS]
    made += [_record(AGAIN, seed, 2.001 + seed) for seed in SEEDS]
    made += [_record("rslora", seed, 1.9 + seed) for seed in SEEDS]
    made += [_record("one_cycle", seed, 1.9995 + seed) for seed in SEEDS]
    made += [_record("lookahead", seed, 2.1 + seed) for seed in SEEDS]
    made += [_record("ema", seed, 2.0 + seed + (0.1 if seed else -0.1)) for seed in SEEDS]
    made += [_record("lora_plus", 0, 1.5), _record("nf4_weights", 0, 1.0, tokens=99)]
    for each in made:
        (tmp_path / f"{each['training']}-{each['seed']}.json").write_text(json.dumps(each))
    monkeypatch.setattr(quality, "FOLDER", tmp_path)
    kept = (quality.found, quality.verdict_of, quality.chance)
    for cached in kept:
        cached.cache_clear()
    try:
        told = {name: quality.verdict_of(BY_NAME[name]) for name in NAMED}
        assert told == {
            "rslora": "better with each seed",
            "lookahead": "worse with each seed",
            "ema": "better with 1, worse with 2 of 3 seeds",
            "one_cycle": "no difference beyond chance",
            "lora_plus": "",
        }
        page = quality.section()
        assert "| −0.1000 | −0.1000 | −0.1000 | −0.1000 | 0.0000 | better with each seed |" in page
        assert "judged by other rows, so not compared: nf4_weights." in page
        assert "which found nothing to do) differ by up to 0.0010; less is chance." in page
        assert "Not with every seed yet, so without a verdict: lora_plus." in page
    finally:
        for cached in kept:
            cached.cache_clear()


SAID = {
    "better with each of three seeds": "better with each seed",
    "worse with each of three seeds": "worse with each seed",
    "better with two of three seeds": "better with 2 of 3 seeds",
    "worse with two of three seeds": "worse with 2 of 3 seeds",
    "no difference beyond chance": "no difference beyond chance",
}
"""What items say of trainings, and what the verdict of one of theirs has to be."""


def test_what_items_say_of_trainings_is_what_their_records_say() -> None:
    told = 0
    for name, each in all_items().items():
        verdicts = {quality.verdict_of(training) for training in TRAININGS if training.optimization == name}
        text = " ".join(one.true for one in each.claimed)
        for words, verdict in SAID.items():
            if words in text:
                assert verdict in verdicts, f"{name}: {words}"
                told += 1
    assert told >= 12


@pytest.mark.parametrize("place", sorted(quality.FOLDER.glob("*.json")), ids=lambda place: place.stem)
def test_a_record_is_of_the_training_that_it_names(place: Path) -> None:
    found = json.loads(place.read_text(encoding="utf-8"))
    training = BY_NAME[found["training"]]
    assert place.stem == f"{training.name}-{found['seed']}" and found["seed"] in SEEDS
    assert (found["optimization"], found["beside"]) == (training.optimization, training.beside)
    train = found["train"]
    assert (train["batch"], train["steps"], train["seed"]) == (cases.ROWS, cases.STEPS, found["seed"])
    assert found["total_tokens"] == cases.TOKENS and len(found["losses"]) == cases.STEPS
    assert not training.optimization or training.optimization in found["choices"]
    if training.name in quality.IDLE:
        assert not found.get("spikes") and found["judged"].get("stopped") is None, "nothing happened in it"
    needed = training.name in {each.beside for each in TRAININGS}
    assert needed or quality.differences(training), "it is compared with the one beside it"


def test_a_training_is_made_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_model("llama", tmp_path / "model")
    rows = [json.dumps({"text": f"def add_{n}(first, second):\n    return first + second\n" * 4}) for n in range(12)]
    (tmp_path / "data.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    monkeypatch.setattr(cases, "TOKENS", 32)
    monkeypatch.setattr(cases, "SETTINGS", "lora.rank=2 train.batch=1 train.steps=2 train.evaluation_rows=2")
    training = Training("float32", "-mixed_precision +label_smoothing", "label_smoothing")
    said = measure.train(training, 1, "cpu", tmp_path / "model", tmp_path / "data.jsonl", tmp_path)
    assert "held-out loss" in said
    found = json.loads((tmp_path / "float32-1.json").read_text(encoding="utf-8"))
    assert "label_smoothing" in found["choices"] and found["seed"] == found["train"]["seed"] == 1
    assert len(found["losses"]) == 2 and found["evaluation"]["after"]["tokens"] > 0
    assert str(tmp_path) not in json.dumps(found)
    broken = Training("broken", "-mixed_precision +lookahead +weight_averaging")
    assert "FAILED" in measure.train(broken, 0, "cpu", tmp_path / "model", tmp_path / "data.jsonl", tmp_path)
    assert "lookahead" in (tmp_path / "broken-0.failed.txt").read_text()
