"""A merged model is the adapted model: as stock transformers loads it, in its files, and in the bytes it takes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from test_trainer_parity import _grouped_products_of_any_type
from torch import Tensor
from trainer_tiny import CONFIGS, VOCAB, make_plan, save_model, write_sources
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from planner import merging
from planner.cli import main
from planner.compose import compose
from planner.errors import PlanError
from planner.machine import cpu_profile
from planner.model import load_model as plan_shape
from planner.optimizations.base import Situation
from trainer import merging as merger
from trainer.counting import TensorBytes
from trainer.four_bit import FourBit
from trainer.loading import Source, add_adapters, find_source, load_config, load_model, load_tokenizer
from trainer.run import execute

__all__ = ["_grouped_products_of_any_type"]

CPU = torch.device("cpu")
TOKENS = torch.randint(VOCAB, (2, 24), generator=torch.Generator().manual_seed(4))


def _adapted(folder: Path, dtype: torch.dtype, four_bit: FourBit | None = None) -> tuple[PeftModel, Source]:
    source = find_source(str(folder))
    base = load_model(
        source, load_config(source), dtype=dtype, attention="eager", device=CPU, four_bit=four_bit, seed=0
    )
    adapted = add_adapters(base.requires_grad_(False), rank=4, alpha=12, seed=0)
    generator = torch.Generator().manual_seed(3)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:  # PEFT begins with zero
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    return adapted, source


def _loaded(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation="eager", output_loading_info=True
    )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


def _logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS, use_cache=False).logits


@pytest.mark.parametrize("family", CONFIGS)
def test_merged_model_computes_what_the_adapted_model_does(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without rounding the two are the same function: fused, parallel, tied, with biases or without."""
    save_model(family, tmp_path / "model", torch.float64)
    adapted, source = _adapted(tmp_path / "model", torch.float64)
    monkeypatch.setattr(merger, "SIXTEEN_BITS", (torch.float64,))
    monkeypatch.setattr(merger, "BLOCK", 1000)  # several pieces of each matrix
    merger.merge(adapted, source, load_tokenizer(source), tmp_path / "merged", torch.float64)
    wanted = _logits(adapted)
    assert (wanted - _logits(_loaded(tmp_path / "model", torch.float64))).norm() > 0.01 * wanted.norm()
    # The norms of transformers round to float32 in between, on both sides alike.
    assert (_logits(_loaded(tmp_path / "merged", torch.float64)) - wanted).norm() <= 1e-6 * wanted.norm()
    changed = _config(tmp_path / "merged")
    before = _config(tmp_path / "model")
    assert {name for name in changed if changed[name] != before.get(name)} <= {"dtype"}
    assert AutoTokenizer.from_pretrained(tmp_path / "merged")("def").input_ids


def _config(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "config.json").read_text()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_each_weight_is_rounded_once(tmp_path: Path, dtype: torch.dtype) -> None:
    save_model("llama", tmp_path / "model", dtype)
    adapted, source = _adapted(tmp_path / "model", dtype)
    merger.merge(adapted, source, None, tmp_path / "merged", dtype)
    written = _loaded(tmp_path / "merged", torch.float32).state_dict()
    sixteen = torch.bfloat16 if dtype is torch.float32 else dtype
    assert _config(tmp_path / "merged")["dtype"] == str(sixteen).removeprefix("torch.")
    base = adapted.get_base_model()
    for name, layer in base.get_decoder().layers.named_modules():
        if hasattr(layer, "lora_A"):
            a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            wanted = (layer.base_layer.weight.double() + 3 * b.double() @ a.double()).to(sixteen)
            found = written[f"model.layers.{name}.weight"].to(sixteen)
            # float32 sums before the rounding move at most a weight in a thousand to its neighbour
            assert (found != wanted).float().mean() < 1e-3, name
            torch.testing.assert_close(found, wanted, rtol=2 * torch.finfo(sixteen).eps, atol=1e-7)
    embedding = base.get_input_embeddings().weight
    assert torch.equal(written["model.embed_tokens.weight"], embedding.to(sixteen).float())


def test_four_bit_weights_are_merged_as_they_were_trained_against(tmp_path: Path) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    save_model("llama", tmp_path / "model", torch.bfloat16)
    adapted, source = _adapted(tmp_path / "model", torch.bfloat16, FourBit(double_quantization=True))
    merger.merge(adapted, source, None, tmp_path / "merged", torch.bfloat16)
    assert "quantization_config" not in _config(tmp_path / "merged")
    written = _loaded(tmp_path / "merged", torch.bfloat16)
    layer = adapted.get_base_model().model.layers[1].mlp.down_proj
    dequantised = functional.dequantize_4bit(layer.base_layer.weight.data, layer.base_layer.weight.quant_state)
    product = 3 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    wanted = (dequantised.float() + product).to(torch.bfloat16)
    original = _loaded(tmp_path / "model", torch.bfloat16).model.layers[1].mlp.down_proj.weight
    assert torch.equal(written.model.layers[1].mlp.down_proj.weight, wanted)
    assert not torch.equal((original.float() + product).to(torch.bfloat16), wanted)
    # Rounding 16-bit weights again is all that is between them: a few hundredths of what the adapters do.
    error = (_logits(written).float() - _logits(adapted).float()).norm() / _logits(adapted).float().norm()
    assert error < 0.02


def test_files_are_cut_and_indexed_and_bytes_are_those_planned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_model("qwen2", tmp_path / "model", torch.bfloat16)
    adapted, source = _adapted(tmp_path / "model", torch.bfloat16)
    file = 60_000
    for place in (merging, merger):
        monkeypatch.setattr(place, "FILE", file)
        monkeypatch.setattr(place, "BLOCK", 2048)
    with TensorBytes([*adapted.parameters(), *adapted.buffers()]) as live:
        resident = live.live
        live.mark("merge")
        merger.merge(adapted, source, None, tmp_path / "merged", torch.bfloat16)
        live.mark("between")
    situation = Situation(cpu_profile(), plan_shape(str(tmp_path / "model")), 2**35, merge=True)
    made = compose(["lora", "exact_attention"], {"lora": {"rank": 4}}, situation)
    sizes = made.ledger.bytes(made.at(batch=1, total=32, target=32, workspace=0))
    files = sorted((tmp_path / "merged").glob("*.safetensors"))
    assert len(files) > 3 and all(path.stat().st_size < file + 4096 for path in files)
    index = json.loads((tmp_path / "merged" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sizes["weights/merged"]
    assert set(index["weight_map"].values()) == {path.name for path in files}
    counted = live.peaks["merge"] - resident
    planned = sizes["buffers/merged_file"] + sizes["buffers/merging"]
    assert 0.85 * planned < counted <= planned  # the largest file is a little less than a file may be
    _loaded(tmp_path / "merged", torch.bfloat16)


def test_without_merging_nothing_is_planned_for_it() -> None:
    situation = Situation(cpu_profile(), plan_shape("llama-3.2-1b"), 2**35)
    made = compose(["lora"], {}, situation)
    sizes = made.ledger.bytes(made.at(batch=1, total=32, target=32, workspace=0))
    assert all(sizes[term.name] == 0 for term in merging.TERMS)


def test_a_failure_leaves_no_half_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_model("llama", tmp_path / "model")
    adapted, source = _adapted(tmp_path / "model", torch.float32)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(merger, "save_file", full)
    with pytest.raises(PlanError, match=r"cannot be written: .*No space left"):
        merger.merge(adapted, source, None, tmp_path / "merged", torch.float32)
    monkeypatch.undo()
    monkeypatch.setattr(merger.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    with pytest.raises(PlanError, match=r"needs .* on disk, and .* are free"):
        merger.merge(adapted, source, None, tmp_path / "merged", torch.float32)
    monkeypatch.undo()
    with torch.no_grad():
        next(p for n, p in adapted.named_parameters() if "lora_B" in n).fill_(1e9)
    with pytest.raises(PlanError, match="no float16 number any more"):
        merger.merge(adapted, source, None, tmp_path / "merged", torch.float16)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_run_merges_and_so_does_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_model("phi", tmp_path / "model")
    write_sources(tmp_path / "data")
    run = tmp_path / "run"
    options = {"steps": 3, "lr": 1e-2, "data": str(tmp_path / "data"), "out": str(run), "merge": True}
    choices = {"lora": {"rank": 4, "alpha": 8}, "exact_attention": {"kernel": "cpu"}, "fused_activation": {}}
    assert execute(make_plan(tmp_path / "model", family="phi", choices=choices, **options)) == 0
    told = capsys.readouterr().out
    assert "Merged model:" in told and "Write with it: plan generate" in told
    assert _config(run / "merged")["hidden_act"] == "gelu_new"
    stock = PeftModel.from_pretrained(_loaded(tmp_path / "model", torch.float32), run / "adapter").eval()
    wanted, found = _logits(stock), _logits(_loaded(run / "merged", torch.float32))
    assert 0 < (found - wanted).norm() < 0.02 * wanted.norm()  # rounded to bfloat16
    assert main(["merge", str(run)]) == 2 and "is there already" in capsys.readouterr().err
    (run / "merged").rename(run / "first")
    assert main(["merge", str(run)]) == 0 and "Written:" in capsys.readouterr().out
    name = "model.safetensors"
    assert (run / "merged" / name).read_bytes() == (run / "first" / name).read_bytes()
    assert main(["merge", str(tmp_path)]) == 2 and "not the folder of a finished run" in capsys.readouterr().err
