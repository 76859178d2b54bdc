"""What is loaded, what is refused, and what a session makes of its hooks."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import gguf
import pytest
import torch
from trainer_tiny import CONFIGS, make_plan, save_model, save_tokenizer, write_gguf
from transformers import AutoModelForCausalLM

from planner.errors import PlanError
from planner.model import load_model as plan_shape
from planner.optimizations import by_id
from planner.plan import Choice
from trainer.built import BuiltRun
from trainer.data import synthetic_batch
from trainer.device import take_device
from trainer.four_bit import FourBit, constants_of
from trainer.layers import layers_of
from trainer.loading import find_source, load_config, load_model, load_tokenizer
from trainer.measure import exact_terms
from trainer.session import ResidentSession, build
from trainer.step import nothing

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "llama"
    save_model("llama", folder)
    return folder


def _load(source: str, **given: Any) -> Any:
    found = find_source(source)
    options: dict[str, Any] = {
        "dtype": torch.float32,
        "attention": "eager",
        "device": CPU,
        "four_bit": None,
        "seed": 3,
    }
    return load_model(found, load_config(found), **(options | given))


def _with_config(folder: Path, **changes: Any) -> Path:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    return folder


@pytest.mark.parametrize(("files", "why"), [
    (["config.json"], "holds no weights"),
    (["config.json", "pytorch_model.bin"], "pickled"),
    (["a.gguf", "b.gguf"], r"2 GGUF files: a\.gguf, b\.gguf"),
])  # fmt: skip
def test_folders_that_are_refused(tmp_path: Path, files: list[str], why: str) -> None:
    for file in files:
        (tmp_path / file).write_bytes(b"")
    with pytest.raises(PlanError, match=why):
        find_source(str(tmp_path))


def test_sources_by_kind(tmp_path: Path, llama: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    for source in (tmp_path, tmp_path / "model.gguf"):
        found = find_source(str(source))
        assert (found.place, found.gguf) == (str(tmp_path), "model.gguf")
    assert find_source(str(llama)).gguf is None
    assert find_source("org/name").place == "org/name"
    assert find_source(f"random:{llama}").random
    for wrong in (str(tmp_path / "nothing"), str(llama / "config.json")):
        with pytest.raises(PlanError):
            find_source(wrong)


def test_a_file_that_is_no_gguf_is_an_error_for_users(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"no such format")
    with pytest.raises(PlanError, match="cannot be read"):
        load_config(find_source(str(tmp_path)))


def test_code_of_the_repository_is_refused(tmp_path: Path) -> None:
    save_model("llama", tmp_path)
    (tmp_path / "code.py").write_text("raise SystemExit('it ran')")
    _with_config(tmp_path, model_type="mine", auto_map={"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"})
    with pytest.raises(PlanError, match=r"type 'mine'; its own code \(auto_map\) is refused"):
        load_config(find_source(str(tmp_path)))


def test_quantised_weights_are_refused(tmp_path: Path) -> None:
    save_model("llama", tmp_path)
    _with_config(tmp_path, quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(PlanError, match=r"quantised already \(gptq\)"):
        load_config(find_source(str(tmp_path)))


def test_missing_weights_are_never_made_up(tmp_path: Path) -> None:
    save_model("llama", tmp_path)
    _with_config(tmp_path, num_hidden_layers=4)
    with pytest.raises(PlanError, match=r"missing or of another shape, such as model\.layers\.3"):
        _load(str(tmp_path))


def test_every_dropout_is_off(tmp_path: Path) -> None:
    save_model("phi", tmp_path)
    config = load_config(find_source(str(tmp_path)))
    assert (config.resid_pdrop, config.embd_pdrop, config.attention_dropout) == (0.0, 0.0, 0.0)
    assert config.use_cache is False


@pytest.mark.parametrize("family", CONFIGS)
def test_random_weights_have_the_shape_and_the_tables(tmp_path: Path, family: str) -> None:
    save_model(family, tmp_path)
    made, stored = (
        _load(f"random:{tmp_path}", dtype=torch.bfloat16),
        AutoModelForCausalLM.from_pretrained(tmp_path),
    )
    assert {n: p.shape for n, p in made.named_parameters()} == {n: p.shape for n, p in stored.named_parameters()}
    assert {p.dtype for p in made.parameters()} == {torch.bfloat16}
    assert {n for n, _ in made.named_buffers()} == {n for n, _ in stored.named_buffers()}
    for name, buffer in stored.named_buffers():
        assert torch.equal(made.get_buffer(name), buffer)
    tokens = torch.arange(24)[None]
    loss = made(input_ids=tokens, labels=tokens, use_cache=False).loss
    assert 4.5 < float(loss) < 7  # log 320 = 5.77: random weights know nothing
    again = _load(f"random:{tmp_path}", dtype=torch.bfloat16)
    assert all(torch.equal(a, b) for a, b in zip(made.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize("random", [False, True])
def test_four_bit_linears_and_nothing_else(llama: Path, random: bool) -> None:
    source = f"random:{llama}" if random else str(llama)
    model = _load(source, dtype=torch.bfloat16, four_bit=FourBit(double_quantization=True))
    kinds = {name.split(".")[-1]: type(m).__name__ for name, m in model.named_modules() if hasattr(m, "in_features")}
    assert kinds.pop("lm_head") == "Linear" and set(kinds.values()) == {"Linear4bit"} and len(kinds) == 7
    assert model.lm_head.weight is model.get_input_embeddings().weight
    weight = model.model.layers[0].mlp.up_proj.weight
    assert weight.dtype == torch.uint8 and weight.numel() == 64 * 96 // 2
    assert weight.quant_state.nested and weight.quant_state.dtype == torch.bfloat16


@pytest.mark.parametrize("four_bit", [None, FourBit(double_quantization=True)], ids=str)
def test_gguf_is_loaded_as_plain_tensors(tmp_path: Path, four_bit: FourBit | None) -> None:
    """Plain linears, or NF4 made here, even where transformers could keep the file's own blocks."""
    write_gguf(tmp_path / "model.gguf")
    model = _load(str(tmp_path), dtype=torch.bfloat16, four_bit=four_bit)
    kind = "Linear" if four_bit is None else "Linear4bit"
    assert {type(model.model.layers[0].mlp.get_submodule(name)).__name__ for name in ("up_proj", "down_proj")} == {kind}
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert model.lm_head.weight.dtype == torch.bfloat16
    session = ResidentSession(make_plan(tmp_path / "model.gguf"))
    session.adapt(rank=2, alpha=4)
    built = session.build()
    batch = synthetic_batch(1, 24, 24, 320, seed=0)
    built.loss(batch, torch.tensor(24.0), nothing).backward()
    assert all(parameter.grad.isfinite().all() for parameter in built.trained)
    assert built.tokenizer.decode(built.tokenise(["in re<end>é"])[0]) == "in re<end>é"


def test_gguf_is_read_once(tmp_path: Path) -> None:
    """Not for tokenizer, config and weights each; and nothing of it is left behind."""
    write_gguf(tmp_path / "model.gguf")
    session = ResidentSession(make_plan(tmp_path / "model.gguf"))
    session.adapt(rank=2, alpha=4)
    with patch.object(gguf, "GGUFReader", wraps=gguf.GGUFReader) as reader:
        session.build()
        assert gguf.GGUFReader is reader and reader.call_count == 1
        assert load_tokenizer(find_source(str(tmp_path))) is not None
        assert reader.call_count > 1


def test_tokenizer_recognises_no_control_token(llama: Path) -> None:
    plan = make_plan(llama)
    session = ResidentSession(plan)
    session.adapt(rank=2, alpha=4)
    built = session.build()
    end = built.tokenizer.convert_tokens_to_ids("<end>")
    ids = built.tokenise(["a<end>b", ""])
    assert end not in ids[0] and ids[1] == [] and built.tokenizer.decode(ids[0]) == "a<end>b"
    assert end in built.tokenizer("a<end>b").input_ids


def test_random_weights_read_bytes_where_there_is_no_tokenizer(tmp_path: Path, llama: Path) -> None:
    (tmp_path / "config.json").write_bytes((llama / "config.json").read_bytes())
    source = find_source(f"random:{tmp_path}")
    assert load_tokenizer(source) is None
    save_tokenizer(tmp_path)
    assert load_tokenizer(source) is not None
    session = ResidentSession(make_plan(f"random:{llama.parent}/llama"))
    session.adapt(rank=2, alpha=4)
    assert session.build().tokenise(["é"]) != [[0xC3, 0xA9]]  # this folder has one


def test_build_does_what_the_hooks_say(llama: Path) -> None:
    session = ResidentSession(make_plan(llama, batch=2, total_tokens=16))
    session.adapt(rank=2, alpha=4)
    session.compute_in("bfloat16", scale_loss=False)
    session.store_weights("nf4", double_quantization=True)
    session.attend_with("cpu")
    session.checkpoint_layers()
    session.offload_checkpoints()
    session.chunk_loss(rows=8)
    session.optimize_with("adamw_8bit")
    built = session.build()
    assert built.host is not None and built.host.pinned_bytes == 3 * 2 * 16 * 64 * 2
    assert type(built.optimizer).__name__ == "AdamW8bit" and built.scaler is None
    assert (built.kernel, built.loss_name, built.dtype) == ("cpu", "chunked, 8 rows", torch.bfloat16)
    assert len(built.trained) == 2 * 7 * 3 and {p.dtype for p in built.trained} == {torch.float32}
    assert all(p.grad is not None and not p.grad.any() for p in built.trained)
    terms = exact_terms(built)
    widths = 2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + 96)
    assert terms["adapters"] == terms["gradients"] == 4 * 3 * 2 * widths and terms["optimizer"] == 0
    weights = 3 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 96)
    scales = weights // 64
    tables = 21 * (16 * 4 + 256 * 4 + 4)
    nested = 4 * sum(-(-size // 64 // 256) for size in (4096, 4096, 2048, 2048, 6144, 6144, 6144)) * 3
    rest = 2 * (320 * 64 + 7 * 64) + 2 * 4 * 8
    assert terms["weights"] == weights // 2 + scales + tables + nested + rest
    built.close()


@pytest.mark.parametrize("random", [False, True])
@pytest.mark.parametrize("double", [False, True])
def test_four_bit_weights_of_all_layers_are_one_storage(
    llama: Path, monkeypatch: pytest.MonkeyPatch, random: bool, double: bool
) -> None:
    """Values, gradients and bytes are those of weights that lie apart, bit for bit."""

    def built() -> BuiltRun:
        session = ResidentSession(make_plan(f"random:{llama}" if random else llama))
        session.adapt(rank=2, alpha=4)
        session.compute_in("bfloat16", scale_loss=False)
        session.store_weights("nf4", double_quantization=double)
        return session.build()

    def gradients(run: BuiltRun) -> list[torch.Tensor]:
        torch.manual_seed(5)
        for parameter in run.trained:  # where the second matrix is zero, the first has no gradient
            torch.nn.init.normal_(parameter, std=0.1)
        run.loss(synthetic_batch(1, 24, 24, 320, seed=0), torch.tensor(24.0), nothing).backward()
        return [parameter.grad for parameter in run.trained if parameter.grad is not None]

    def storages(layer: torch.nn.Module) -> set[int]:
        return {weight.untyped_storage().data_ptr() for weight in layer.parameters() if constants_of(weight)}

    together = built()
    monkeypatch.setattr("trainer.four_bit.Shelf.put", lambda shelf, linear, made: None)
    apart = built()
    one, other = layers_of(together.base), layers_of(apart.base)
    assert len(storages(one)) == 1 and len(storages(other)) == 3 * 7
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    assert exact_terms(together) == exact_terms(apart)
    found, wanted = gradients(together), gradients(apart)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True)) and all(g.any() for g in found)


def test_adapters_repeat_by_seed(llama: Path) -> None:
    def first(seed: int) -> torch.Tensor:
        session = ResidentSession(make_plan(llama, seed=seed))
        session.adapt(rank=2, alpha=4)
        return session.build().trained[0]

    assert torch.equal(first(1), first(1)) and not torch.equal(first(1), first(2))


def test_plan_s_choices_are_applied(llama: Path) -> None:
    choices: dict[str, dict[str, Any]] = {
        "lora": {"rank": 4, "alpha": 8},
        "gradient_checkpointing": {},
        "chunked_loss": {"rows": 64},
        "exact_attention": {"kernel": "cpu"},
    }
    built = build(make_plan(llama, choices=choices))
    assert (built.kernel, built.loss_name) == ("cpu", "chunked, 64 rows")
    assert built.model.peft_config["default"].lora_alpha == 8
    layers = built.base.get_decoder().layers
    assert all(layer.forward.__module__ == "trainer.checkpointing" for layer in layers)


def test_hooks_are_held_to_the_protocol(llama: Path) -> None:
    session = ResidentSession(make_plan(llama))
    session.checkpoint_layers()
    with pytest.raises(PlanError, match="asked for already"):
        session.checkpoint_layers()
    with pytest.raises(PlanError, match=r"flsh.*Did you mean flash"):
        session.attend_with("flsh")
    with pytest.raises(PlanError, match="no adapters"):
        session.build()
    lora = Choice(id="lora", reason="", knobs={"rnk": 4})
    with (
        session.applying(lora),
        pytest.raises(PlanError, match=r"choice lora: .*knob rank.*Did you mean rnk"),
    ):
        by_id("lora").apply(session)
    only_offload = ResidentSession(make_plan(llama))
    only_offload.adapt(rank=1, alpha=1)
    only_offload.offload_checkpoints()
    with pytest.raises(PlanError, match="keep no layer inputs"):
        only_offload.build()


def test_another_model_than_planned_is_refused(tmp_path: Path, llama: Path) -> None:
    document = make_plan(llama).document()
    document["model"]["layers"] = 5
    session = ResidentSession(type(make_plan(llama)).model_validate(document))
    session.adapt(rank=1, alpha=1)
    with pytest.raises(PlanError, match=r"in 3 layers, and the plan was made for .* in 5"):
        session.build()


def test_weights_beside_another_config_are_refused(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is loaded is compared with what was planned for, wherever the planner read the shape."""
    plan, shape = make_plan(llama), plan_shape(str(llama))
    for name, other in (("heads", 3), ("vocab", 999), ("activation", "gelu")):
        made = replace(shape, **{name: other})
        monkeypatch.setattr("trainer.config_check.plan_shape", lambda _, made=made: made)
        planned = plan.model.model_copy(update={"parameters": made.parameters})
        session = ResidentSession(plan.model_copy(update={"model": planned}))
        session.adapt(rank=1, alpha=1)
        with pytest.raises(PlanError, match=f"has {name} .* where it is loaded from, and {other} was planned for"):
            session.build()


def test_a_window_shorter_than_the_row_needs_a_kernel_that_has_one(tmp_path: Path) -> None:
    save_model("mistral", tmp_path)
    _with_config(tmp_path, sliding_window=20)
    for total, kernel, fits in ((20, "cudnn", True), (21, "cudnn", False), (21, "efficient", True), (21, "cpu", True)):
        session = ResidentSession(make_plan(tmp_path, family="mistral", total_tokens=total))
        session.adapt(rank=1, alpha=1)
        session.attend_with(kernel)
        if fits:
            session.build()
        else:
            with pytest.raises(PlanError, match="window of 20 tokens"):
                session.build()


def test_a_card_that_is_not_there_is_named(llama: Path) -> None:
    plan = make_plan(llama)
    gpu = plan.gpu.model_copy(update={"kind": "gpu", "name": "NVIDIA Imaginary 1"})
    assert take_device(plan) == CPU
    with pytest.raises(PlanError, match=r"NVIDIA Imaginary 1.*--gpu local"):
        take_device(plan.model_copy(update={"gpu": gpu}))
