"""Heads of keys and values pooled: means, files that stock transformers loads, and what no model can be made of."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from cli_fixture import Capture, mistakes
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from test_trainer_parity import _grouped_products_of_any_type
from trainer_tiny import CONFIGS, VOCAB, make_plan, save_model, write_sources
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from planner.cli import main
from planner.errors import PlanError
from planner.model import load_model, shipped_folder
from planner.planning import Request
from planner.planning import make_plan as planned
from trainer import pooling
from trainer.pooling import pool_heads, pooled
from trainer.run import execute

__all__ = ["_grouped_products_of_any_type"]

TOKENS = torch.randint(VOCAB, (2, 24), generator=torch.Generator().manual_seed(4))
POOLED = (
    "llama",
    "qwen2",
    "phi",
    "phi3",
    "gemma2",
    "granite",
    "smollm3",
    "starcoder2",
    "mistral",
    "qwen3_moe",
    "mixtral",
)


def _loaded(folder: Path) -> PreTrainedModel:
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


def _logits(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = _loaded(folder)(input_ids=TOKENS, use_cache=False).logits
    return found


@given(st.sampled_from([(4, 1), (4, 2), (6, 3), (3, 1)]), st.integers(1, 5), st.booleans())
def test_each_head_is_the_mean_of_its_pool(heads: tuple[int, int], width: int, bias: bool) -> None:
    many, few = heads
    shape = (many * width,) if bias else (many * width, 7)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = pooled(weight, many, few)
    for head in range(few):
        pool = [
            weight[each * width : (each + 1) * width] for each in range(head * many // few, (head + 1) * many // few)
        ]
        assert torch.allclose(found[head * width : (head + 1) * width], torch.stack(pool).mean(0))


@pytest.mark.parametrize("family", POOLED)
def test_heads_that_are_alike_are_pooled_into_the_same_model(tmp_path: Path, family: str) -> None:
    """Where the heads of a pool are equal, nothing changes: to rounding, the same logits."""
    save_model(family, tmp_path / "model", torch.float64)
    shape = load_model(str(tmp_path / "model"))
    file = tmp_path / "model" / "model.safetensors"
    before = load_file(file)
    alike = {}
    for name, weight in before.items():
        if ".k_proj." in name or ".v_proj." in name:
            weight = _alike(weight, shape.kv_heads)
        elif ".qkv_proj." in name:
            rows = [shape.heads * shape.head_size, *[shape.kv_heads * shape.head_size] * 2]
            query, key, value = weight.split(rows)
            weight = torch.cat([query, _alike(key, shape.kv_heads), _alike(value, shape.kv_heads)])
        alike[name] = weight.contiguous()
    save_file(alike, file, {"format": "pt"})
    made = pool_heads(str(tmp_path / "model"), 1, tmp_path / "pooled")
    assert torch.allclose(_logits(made), _logits(tmp_path / "model"), rtol=1e-9, atol=1e-9)
    assert load_model(str(made)).kv_heads == 1 and AutoTokenizer.from_pretrained(made) is not None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "pooled"]


def _alike(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Every head as the first."""
    width = weight.shape[0] // heads
    return weight[:width].repeat(heads, *[1] * (weight.dim() - 1))


def test_other_heads_make_another_model_that_training_mends(tmp_path: Path) -> None:
    save_model("llama", tmp_path / "model")
    made = pool_heads(str(tmp_path / "model"), 1, tmp_path / "pooled")
    assert not torch.allclose(_logits(made), _logits(tmp_path / "model"), atol=1e-3)
    assert "each head is the mean of 2" in (made / "README.md").read_text()
    data = str(write_sources(tmp_path / "data", 12))
    plan = make_plan(made, data=data, out=str(tmp_path / "run"), steps=8, lr=2e-2, validation=0.25, evaluation_rows=3)
    assert execute(plan) == 0
    found = json.loads((tmp_path / "run" / "measurement.json").read_text())["evaluation"]
    assert found["after"]["loss"] < found["before"]["loss"]


def test_a_model_of_several_files_stays_one(tmp_path: Path) -> None:
    save_model("phi", tmp_path / "model").save_pretrained(tmp_path / "model", max_shard_size="100KB")
    (tmp_path / "model" / "model.safetensors").unlink(missing_ok=True)
    files = sorted(path.name for path in (tmp_path / "model").glob("*.safetensors"))
    made = pool_heads(str(tmp_path / "model"), 2, tmp_path / "pooled")
    assert len(files) > 2 and files == sorted(path.name for path in made.glob("*.safetensors"))
    index = json.loads((made / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(
        tensor.nbytes for name in files for tensor in load_file(made / name).values()
    )
    assert _logits(made).isfinite().all()


@pytest.mark.parametrize("streamed", [True, False])
def test_a_plan_of_it_keeps_less_of_keys_and_values(tmp_path: Path, streamed: bool) -> None:
    """What pooling is for, by the formulas: of Phi-2, whose query heads have a key head each, and with 4 of these."""
    source = shipped_folder("phi-2")
    assert source is not None
    config = json.loads((source / "config.json").read_text()) | {"num_key_value_heads": 4}
    (tmp_path / "phi-2-4").mkdir()
    (tmp_path / "phi-2-4" / "config.json").write_text(json.dumps(config))
    settings = {"required": ("streamed",)} if streamed else {"excluded": ("streamed",)}
    many, few = (
        planned(Request("rtx3090", f"random:{model}", total_tokens=32768, **settings))  # type: ignore[arg-type]
        for model in ("phi-2", tmp_path / "phi-2-4")
    )
    assert {choice.id for choice in many.choices} == {choice.id for choice in few.choices}
    keys = 2 * 32768 * 32 * 80 * 2  # bytes of all keys and values of a layer, with a head for each query head
    sizes = [max(sum(v for k, v in t.items() if k.startswith(("attention/", "buffers/"))) for t in where)
             for where in (many.memory.gpu.phases.values(), few.memory.gpu.phases.values())]  # fmt: skip
    hosts = [plan.memory.host.peak_bytes for plan in (many, few)]
    saved = (sizes[0] - sizes[1]) + (hosts[0] - hosts[1])
    assert saved > keys / 2


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox"])
def test_matrices_that_mix_all_heads_are_left_alone(tmp_path: Path, family: str) -> None:
    save_model(family, tmp_path / "model")
    with pytest.raises(PlanError, match="in other matrices than can be pooled"):
        pool_heads(str(tmp_path / "model"), 1, tmp_path / "pooled")
    assert [path.name for path in tmp_path.iterdir()] == ["model"], "nothing is left behind"


def _without(folder: Path, *more: str) -> None:
    """What is beside the model in its folder."""
    assert sorted(path.name for path in folder.iterdir()) == sorted(["model", *more]), "nothing is left behind"


def test_a_source_that_is_broken_is_told_of_and_leaves_nothing(tmp_path: Path, capsys: Capture) -> None:
    save_model("llama", tmp_path / "model")
    folder, out = tmp_path / "model", tmp_path / "deep" / "er" / "pooled"
    words = ("pool-heads", str(folder), "--kv-heads", "1", "--out", str(out))
    config, weights = folder / "config.json", folder / "model.safetensors"
    whole, stored = config.read_text(), weights.read_bytes()
    config.write_text(whole.replace('"num_key_value_heads": 2', '"num_key_value_heads": 4'))
    (told,) = mistakes(capsys, *words)
    assert "has 32 rows in model.layers.0.self_attn.k_proj.weight, and by its config.json it has 64." in told
    config.write_text(whole)
    weights.write_bytes(stored[:100])
    (told,) = mistakes(capsys, *words)
    assert f"error: model {folder}: model.safetensors cannot be read:" in told
    weights.write_bytes(stored)
    index = folder / "model.safetensors.index.json"
    for text in ("{}", "{", '{"weight_map": []}', '{"weight_map": {"a": "missing.safetensors"}}', '{"weight_map": {}}'):
        index.write_text(text)
        (told,) = mistakes(capsys, *words)
        assert told.startswith(f"error: model {folder}: ") and "model.safetensors.index.json" in told
    index.unlink()
    _without(tmp_path)
    assert main([*words]) == 0 and (out / "config.json").is_file()
    _without(tmp_path, "deep")


def test_an_interrupted_one_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_model("llama", tmp_path / "model")

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pooling, "save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pool_heads(str(tmp_path / "model"), 1, tmp_path / "deep" / "pooled")
    _without(tmp_path)


def test_what_cannot_be_pooled_is_refused_with_what_can(tmp_path: Path, capsys: Capture) -> None:
    save_model("starcoder2", tmp_path / "model")
    model, out = str(tmp_path / "model"), str(tmp_path / "pooled")
    assert CONFIGS["starcoder2"]().num_key_value_heads == 2
    for number in ("2", "3", "0", "-1"):
        (told,) = mistakes(capsys, "pool-heads", model, "--kv-heads", number, "--out", out)
        assert told.startswith(f"error: --kv-heads {number}") and "pools of equal size make 1." in told
    (told,) = mistakes(capsys, "pool-heads", "random:phi-2", "--kv-heads", "4", "--out", out)
    assert "is random weights." in told
    (told,) = mistakes(capsys, "pool-heads", str(tmp_path / "nowhere"), "--kv-heads", "1", "--out", out)
    assert "is neither a folder" in told
    (told,) = mistakes(capsys, "pool-heads", model, "--kv-heads", "1", "--out", model)
    assert "is there already" in told
    assert main(["pool-heads", model, "--kv-heads", "1", "--out", out]) == 0
    assert capsys.readouterr().out == f"Written: {out}\n"
    (told,) = mistakes(capsys, "pool-heads", out, "--kv-heads", "1", "--out", f"{out}-2")
    assert "has one head for keys and values already" in told
