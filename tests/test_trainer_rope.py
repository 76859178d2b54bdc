"""A run with scaled positions: what it writes lets stock transformers and PEFT compute the same, and memory stays."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel
from test_trainer_run import LEAN
from torch.nn.functional import cross_entropy
from trainer_tiny import make_plan, save_model, write_sources
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig

from planner.compose import model_letters
from planner.documents import read_documents
from planner.errors import PlanError
from planner.model import load_model as plan_shape
from planner.plan import Plan, Rope
from planner.rope_scaling import rope_of
from trainer.data import NOT_TRAINED, evaluation_batches, prepare
from trainer.measure import exact_terms
from trainer.rotary import frequencies_beside_buffers, go_by_batch, scale
from trainer.run import execute
from trainer.session import build

NATIVE, TOTAL = 12, 32
RELEASE = tuple(map(int, transformers.__version__.split(".")[:2]))


def made_for_few(folder: Path, family: str, **rope: Any) -> Path:
    """A tiny model made for 12 tokens, whose queries and keys are large enough for positions to matter."""
    model = save_model(family, folder)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight")):
                parameter.mul_(20)
    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config["max_position_embeddings"] = NATIVE
    config["rope_parameters"] |= rope
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def planned(model: Path, out: Path, rope: Rope, family: str = "llama", **given: Any) -> Plan:
    options = {"steps": 3, "lr": 1e-2, "batch": 1, "evaluation_rows": 5, "validation": 0.25}
    made = make_plan(model, family=family, choices=LEAN, out=str(out), rope=rope, total_tokens=TOTAL, **options | given)
    return made.model_copy(update={"model": made.model.model_copy(update={"native_context": NATIVE})})


def held_out_loss(base: torch.nn.Module, adapter: Path, data: Path) -> float:
    """The run's own held-out rows through plain PEFT, each as the first that the model meets."""
    model = PeftModel.from_pretrained(base, adapter).eval()
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    rows = prepare(
        read_documents(data),
        lambda texts: [tokenizer(text, add_special_tokens=False).input_ids for text in texts],
        length=TOTAL,
        target=None,
        validation=0.25,
        seed=0,
    )
    total, tokens = 0.0, 0
    with torch.no_grad():
        for batch in evaluation_batches(rows.validation, 5, 1, 0):
            model(input_ids=batch.inputs[:, :1])  # within the native context: transformers forgets what it saw before
            logits = model(input_ids=batch.inputs).logits.flatten(0, 1)
            total += float(cross_entropy(logits, batch.targets.flatten(), ignore_index=NOT_TRAINED, reduction="sum"))
            tokens += batch.trained
    return total / tokens


@pytest.mark.parametrize(("family", "kind"), [("llama", "yarn"), ("phi", "linear"), ("llama", "dynamic")])
def test_the_adapter_carries_its_scaling(tmp_path: Path, family: str, kind: Any) -> None:
    model, data = made_for_few(tmp_path / "model", family), write_sources(tmp_path / "data")
    rope = rope_of(plan_shape(model), TOTAL, kind)
    assert execute(planned(model, tmp_path / "out", rope, family, data=str(data))) == 0
    adapter = tmp_path / "out" / "adapter"
    config, plain = AutoConfig.from_pretrained(adapter), AutoConfig.from_pretrained(model)
    assert config.rope_parameters == plain.rope_parameters | rope.parameters
    other = {"rope_parameters", "transformers_version", "_name_or_path"}
    assert {key: value for key, value in config.to_dict().items() if key not in other} == {
        key: value for key, value in plain.to_dict().items() if key not in other
    }  # nothing of how it was trained: no dropout set to zero, no attention of ours
    after = json.loads((tmp_path / "out" / "measurement.json").read_text())["evaluation"]["after"]["loss"]
    scaled = AutoModelForCausalLM.from_pretrained(model, config=config, dtype=torch.float32)
    assert math.isclose(held_out_loss(scaled, adapter, data), after, rel_tol=1e-5)
    unscaled = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    assert not math.isclose(held_out_loss(unscaled, adapter, data), after, rel_tol=1e-5)
    with pytest.raises(OSError, match="no file named"):  # never without a word as an unscaled model
        AutoModelForCausalLM.from_pretrained(adapter)
    card = (adapter / "README.md").read_text()
    assert "made for 12 tokens" in card and "AutoConfig.from_pretrained(this_folder)" in card


def test_without_scaling_no_config_is_written(tmp_path: Path) -> None:
    model, data = made_for_few(tmp_path / "model", "llama"), write_sources(tmp_path / "data")
    rope = rope_of(plan_shape(model), TOTAL, "none")
    assert execute(planned(model, tmp_path / "out", rope, data=str(data))) == 0
    adapter = tmp_path / "out" / "adapter"
    assert not (adapter / "config.json").exists()
    assert "Load it with `peft.PeftModel.from_pretrained" in (adapter / "README.md").read_text()


HELD = {
    "default": {},
    "linear": {"factor": 2.0},
    "dynamic": {"factor": 2.0},
    "yarn": {"factor": 2.0},
    "llama3": {
        "factor": 2.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": NATIVE // 2,
    },
    "longrope": {"factor": 2.0, "short_factor": [1.0] * 8, "long_factor": [2.0] * 8},
}


@pytest.mark.parametrize("kind", HELD)
@pytest.mark.parametrize("longest", [NATIVE, TOTAL])
def test_frequencies_take_what_the_formula_says(tmp_path: Path, kind: str, longest: int) -> None:
    """However long the rows were, and after a short one, too."""
    model = made_for_few(tmp_path / "model", "llama", rope_type=kind, **HELD[kind])
    built = build(planned(model, tmp_path / "out", Rope(model=kind)))
    rotary = built.base.get_decoder().rotary_emb
    for length in (longest, 5, longest):
        with torch.no_grad():
            built.base(input_ids=torch.zeros(1, length, dtype=torch.int64))
    held = list({each.data_ptr(): each for each in [*rotary.buffers(), *frequencies_beside_buffers(rotary)]}.values())
    said, counted = model_letters(plan_shape(model))["O"], sum(each.numel() for each in held)
    if kind == "longrope" and RELEASE < (5, 21):
        assert counted < said  # those in use are one tensor with those as first computed, or with those for long rows
    else:
        assert counted == said
    assert all(each.dtype == torch.float32 for each in held)
    others = [each for each in built.model.parameters() if not each.requires_grad]
    assert exact_terms(built)["weights"] == 4 * (sum(each.numel() for each in others) + counted)


def test_a_scaling_that_cannot_be_is_refused(tmp_path: Path) -> None:
    own = made_for_few(tmp_path / "own", "llama", rope_type="linear", factor=2.0)
    with pytest.raises(PlanError, match=r"rotary scaling yarn: .* a scaling of its own \(linear\)"):
        build(planned(own, tmp_path / "out", Rope(scaling="yarn", factor=2.0, parameters={"rope_type": "yarn"})))
    with pytest.raises(PlanError, match="has no rotary embedding"):
        scale(PretrainedConfig(), Rope(scaling="linear", factor=2.0, parameters={"rope_type": "linear"}))


def test_only_the_global_layers_of_gemma_are_scaled(tmp_path: Path) -> None:
    save_model("gemma3_text", tmp_path / "model")
    config = AutoConfig.from_pretrained(tmp_path / "model")
    before = {kind: dict(parameters) for kind, parameters in config.rope_parameters.items()}
    rope = rope_of(plan_shape(tmp_path / "model"), 512, "yarn")
    scale(config, rope)
    assert config.rope_parameters == before | {"full_attention": before["full_attention"] | rope.parameters}


def test_other_kinds_are_left_alone_by_what_forgets_lengths(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(
        made_for_few(tmp_path / "model", "llama", rope_type="yarn", factor=2.0)
    )
    go_by_batch(model)
    assert not model.get_decoder().rotary_emb._forward_pre_hooks
