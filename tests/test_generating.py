"""Text is written as the whole model would, from caches of every kind, in the bytes that were planned."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_trainer_parity import _grouped_products_of_any_type
from torch import Tensor
from trainer_tiny import CONFIGS, VOCAB, make_plan, save_model, save_tokenizer
from transformers import AutoModelForCausalLM, Gemma3TextConfig, LlamaConfig, PhiConfig, PreTrainedModel

from planner import generating as planned
from planner.generating import KEEPINGS, Keeping
from planner.machine import cpu_profile
from planner.model import load_model as load_shape
from planner.optimizations.base import Situation
from planner.planning import read_gpu
from trainer import generating, generating_attention, key_values
from trainer.counting import TensorBytes
from trainer.key_values import make_cache
from trainer.loading import find_source, load_config, load_model

__all__ = ["_grouped_products_of_any_type"]

CPU = torch.device("cpu")
TOKENS = torch.randint(VOCAB, (1, 41), generator=torch.Generator().manual_seed(4))


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts of several chunks, rows of scores in several pieces."""
    for module in (generating, key_values, planned):
        monkeypatch.setattr(module, "CHUNK", 7)
    for module in (generating_attention, planned):
        monkeypatch.setattr(module, "SCORES", 300)


def _loaded(folder: Path, attention: str, dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    source = find_source(str(folder))
    return load_model(
        source, load_config(source), dtype=dtype, attention=attention, device=CPU, four_bit=None, seed=0
    ).eval()


def _by_cache(model: PreTrainedModel, keeping: Keeping) -> Tensor:
    """Logits ``[S, V]`` of each token: the first half read in chunks, the rest token by token."""
    total = TOKENS.shape[1]
    cache, host = make_cache(model.config, keeping, total, CPU)
    found, begun = [], total // 2
    with torch.no_grad():
        parts = [slice(at, min(at + 7, begun)) for at in range(0, begun, 7)]
        parts += [slice(at, at + 1) for at in range(begun, total)]
        for part in parts:
            made = model(input_ids=TOKENS[:, part], past_key_values=cache, use_cache=True)
            found.append(made.logits[0])
    if host is not None:
        host.close()
    return torch.cat(found)


@pytest.mark.parametrize("kernel", ["cpu", None])
@pytest.mark.parametrize("family", CONFIGS)
def test_tokens_in_pieces_are_the_tokens_of_a_row(family: str, kernel: str | None, tmp_path: Path) -> None:
    """In float64, as near as norms and rotary embeddings allow, which transformers rounds to float32 on both sides."""
    save_model(family, tmp_path, torch.float64)
    with torch.no_grad():
        wanted = _loaded(tmp_path, "eager")(input_ids=TOKENS, use_cache=False).logits[0]
    model = _loaded(tmp_path, generating_attention.register(kernel))
    for keeping in ("card", "host"):
        found = _by_cache(model, keeping)  # type: ignore[arg-type]
        assert (found - wanted).norm() <= 1e-6 * wanted.norm(), keeping


def test_eight_bits_are_near(tmp_path: Path) -> None:
    """Each element is off by half a step at most, which is the largest of its token and head over 127."""
    save_model("llama", tmp_path, torch.float64)
    with torch.no_grad():
        wanted = _loaded(tmp_path, "eager")(input_ids=TOKENS, use_cache=False).logits[0]
    found = _by_cache(_loaded(tmp_path, generating_attention.register("cpu")), "int8")
    off = float((found - wanted).norm() / wanted.norm())
    assert 1e-5 < off < 1e-2, off


LAYERS = 3
WIDE: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 8,
    "vocab_size": 1000,
    "max_position_embeddings": 4096,
    "bos_token_id": 0,
    "eos_token_id": None,
    "pad_token_id": None,
}
MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaConfig(**WIDE, num_key_value_heads=2),
    "phi": lambda: PhiConfig(**WIDE),
    "gemma3_text": lambda: Gemma3TextConfig(**WIDE, num_key_value_heads=2, head_dim=32, sliding_window=64),
}
CHOICES: dict[str, dict[str, Any]] = {
    "lora": {"rank": 8, "alpha": 16},
    "exact_attention": {"kernel": "cpu"},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model of each kind, wide enough that what is small beside it does not count."""
    found = {family: tmp_path_factory.mktemp(family) for family in MODELS}
    for family, folder in found.items():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(MODELS[family]()).save_pretrained(folder)
        save_tokenizer(folder)
    return found


@pytest.mark.parametrize("keeping", KEEPINGS)
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
@pytest.mark.parametrize("family", MODELS)
def test_bytes_are_those_planned(
    family: str, dtype: str | None, keeping: Keeping, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted op by op: at a kernel's layers within 1 %; where scores are written out no more than planned."""
    monkeypatch.undo()  # chunks as they are
    choices = CHOICES | ({"mixed_precision": {"dtype": dtype}} if dtype else {})
    plan = make_plan(folders[family], choices=choices, family=family)
    situation = Situation(read_gpu("h200-sxm"), load_shape(folders[family]), 2**34)
    found = planned.generation(plan, situation, 700, 5, keeping)
    session = generating._GeneratingSession(plan)
    session.apply_choices()
    adapted, _, _ = session.adapted_model()
    prompt = generating.Prompt.__new__(generating.Prompt)
    prompt.tokenizer, prompt.tokens = None, list(range(3, 203)) * 3 + list(range(100))
    with TensorBytes([*adapted.parameters(), *adapted.buffers()]) as live:
        live.mark("generating")
        sampling = generating.Sampling(temperature=0.8, top_p=0.9)
        generating._written(adapted, prompt, found, sampling, lambda _: None, lambda _: None)
    wanted = sum(found.card.values()) - found.card["runtime/workspace"] + found.host.get("attention/cache", 0)
    assert live.peak <= wanted
    assert wanted <= live.peak * (1.01 if family != "gemma3_text" else 1.08)


def test_what_is_written_is_what_transformers_writes(folders: dict[str, Path]) -> None:
    """Greedily, by the stock model's own cache, on from the same tokens."""
    source = find_source(str(folders["llama"]))
    plan = make_plan(folders["llama"], choices=CHOICES)
    situation = Situation(cpu_profile(), load_shape(folders["llama"]), 2**34)
    session = generating._GeneratingSession(plan)
    session.apply_choices()
    adapted, _, _ = session.adapted_model()
    stock = AutoModelForCausalLM.from_pretrained(source.place, attn_implementation="eager").eval()
    ids = torch.randint(3, 900, (1, 30), generator=torch.Generator().manual_seed(1))
    wanted = stock.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, pad_token_id=0
    )
    prompt = generating.Prompt.__new__(generating.Prompt)
    prompt.tokenizer, prompt.tokens = None, ids[0].tolist()
    for keeping in ("card", "host"):
        found = planned.generation(plan, situation, 30, 12, keeping)  # type: ignore[arg-type]
        said: list[str] = []
        written = generating._written(adapted, prompt, found, generating.Sampling(), said.append, lambda _: None)
        assert written.tokens == 12 and not written.ended
        assert written.text == "".join(said) == generating.spelled(None, wanted[0, 30:].tolist())
