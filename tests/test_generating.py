"""Text is written as the whole model would, from caches of every kind, in the bytes that were planned."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_trainer_parity import _grouped_products_of_any_type
from tokenizers import Tokenizer, decoders, models
from torch import Tensor
from trainer_tiny import CONFIGS, VOCAB, make_plan, save_model, save_tokenizer
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PhiConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from planner import generating as planned
from planner.errors import PlanError
from planner.generating import KEEPINGS, Keeping
from planner.machine import cpu_profile
from planner.model import load_model as load_shape
from planner.optimizations.base import Situation
from planner.planning import read_gpu
from trainer import generating, generating_attention, key_values
from trainer.counting import TensorBytes
from trainer.key_values import make_cache
from trainer.loading import find_source, load_config, load_model
from trainer.streamed.kernels import KERNELS

__all__ = ["_grouped_products_of_any_type"]

CPU = torch.device("cpu")
CHUNK = 7
TOKENS = torch.randint(VOCAB, (1, 41), generator=torch.Generator().manual_seed(4))


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts of several chunks, rows of scores in several pieces."""
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
    cache, host = make_cache(model, keeping, total, CHUNK)
    found, begun = [], total // 2
    with torch.no_grad():
        parts = [slice(at, min(at + CHUNK, begun)) for at in range(0, begun, CHUNK)]
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


SMALL: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": None,
}
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
    "gemma2": lambda: Gemma2Config(**WIDE, num_key_value_heads=2, head_dim=32, sliding_window=64),
    "mistral": lambda: MistralConfig(**WIDE, num_key_value_heads=2, sliding_window=256),
    "gemma3_text": lambda: Gemma3TextConfig(**WIDE, num_key_value_heads=2, head_dim=32, sliding_window=64),
}
WRITTEN_OUT = ("llama", "phi", "mistral", "gemma2")
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
@pytest.mark.parametrize("family", [family for family in MODELS if family != "gemma2"])  # which no kernel attends in
@pytest.mark.parametrize("chunk", [300, 200])
def test_bytes_are_those_planned(
    chunk: int,
    family: str,
    dtype: str | None,
    keeping: Keeping,
    folders: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Counted op by op, in chunks of which one sees as much as any: within 1 %, or 2 % where it is cut into blocks."""
    monkeypatch.undo()  # scores as they are
    choices = CHOICES | ({"mixed_precision": {"dtype": dtype}} if dtype else {})
    wanted, peak = _bytes(folders[family], family, choices, keeping, chunk)
    windows = load_shape(folders[family]).sliding_layers
    assert peak <= wanted <= peak * (1.02 if windows else 1.01)


def _bytes(folder: Path, family: str, choices: Any, keeping: Keeping, chunk: int, tokens: int = 700) -> tuple[int, int]:
    """Bytes that are planned to read so many tokens and write a few, and that are counted."""
    plan = make_plan(folder, choices=choices, family=family)
    situation = Situation(read_gpu("h200-sxm"), load_shape(folder), 2**34)
    found = planned.generation(plan, situation, tokens, 5, keeping, chunk)
    session = generating.GeneratingSession(plan)
    session.apply_choices()
    adapted, _, _ = session.adapted_model()
    prompt = generating.Prompt.of([3 + place % 200 for place in range(tokens)])
    with TensorBytes([*adapted.parameters(), *adapted.buffers()]) as live:
        live.mark("generating")
        sampling = generating.Sampling(temperature=0.8, top_p=0.9)
        generating.written(adapted, prompt, found, sampling, lambda _: None, lambda _: None)
    wanted = sum(found.card.values()) - found.card["runtime/workspace"] + found.host.get("attention/cache", 0)
    return wanted, live.peak


@pytest.mark.parametrize("scores", [None, 200_000], ids=["all at once", "in pieces"])
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
@pytest.mark.parametrize("family", WRITTEN_OUT)
def test_bytes_of_scores_that_are_written_out_are_those_planned(
    family: str, dtype: str | None, scores: int | None, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Soft-capped ones, and of a plan without a kernel, the last chunk whole: never fewer, 5 % more at most."""
    monkeypatch.undo()
    for module in (generating_attention, planned):
        monkeypatch.setattr(module, "SCORES", scores or planned.SCORES)
    choices = {"lora": CHOICES["lora"]} | ({"mixed_precision": {"dtype": dtype}} if dtype else {})
    wanted, peak = _bytes(folders[family], family, choices, "card", 300, 901)
    assert peak <= wanted <= 1.05 * peak


def test_what_is_written_is_what_transformers_writes(folders: dict[str, Path]) -> None:
    """Greedily, by the stock model's own cache, on from the same tokens."""
    source = find_source(str(folders["llama"]))
    plan = make_plan(folders["llama"], choices=CHOICES)
    situation = Situation(cpu_profile(), load_shape(folders["llama"]), 2**34)
    session = generating.GeneratingSession(plan)
    session.apply_choices()
    adapted, _, _ = session.adapted_model()
    stock = AutoModelForCausalLM.from_pretrained(source.place, attn_implementation="eager").eval()
    ids = torch.randint(3, 900, (1, 30), generator=torch.Generator().manual_seed(1))
    wanted = stock.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, pad_token_id=0
    )
    prompt = generating.Prompt.of(ids[0].tolist())
    for keeping in ("card", "host"):
        found = planned.generation(plan, situation, 30, 12, keeping, CHUNK)  # type: ignore[arg-type]
        said: list[str] = []
        written = generating.written(adapted, prompt, found, generating.Sampling(), said.append, lambda _: None)
        assert written.tokens == 12 and not written.ended
        assert written.text == "".join(said) == generating.spelled(None, wanted[0, 30:].tolist())


@pytest.mark.parametrize("window", [None, 2, 5, 9, 30])
@pytest.mark.parametrize("new", [1, 2, 8, 20])
def test_a_kernel_gives_what_scores_written_out_give(new: int, window: int | None) -> None:
    """Whatever is before: nothing, less than the window, more; with sinks and without, in float64."""
    generator = torch.Generator().manual_seed(new)

    def some(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    for before in (0, 1, 4, 11, 40):  # of a window that nothing passes the cache keeps more than it
        length = new + before
        query, key, value, sinks = some(2, 4, new, 16), some(2, 2, length, 16), some(2, 2, length, 16), some(4)
        for each in (None, sinks) if window is None or new <= window else ():
            found = generating_attention.by_kernel(KERNELS["cpu"], query, key, value, 0.25, window, each)
            wanted = generating_attention.written_out(query, key, value, 0.25, window, each)
            torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-13)
        for each in (None, sinks):  # cut into blocks: of one row
            parts = query[:1], key[:1], value[:1]
            found = generating_attention.by_kernel(KERNELS["cpu"], *parts, 0.25, window, each)
            wanted = generating_attention.written_out(*parts, 0.25, window, each)
            torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-13)


def test_scores_that_float16_does_not_reach_are_no_matter() -> None:
    """As Phi-2 has them: products of query and key beyond 65,504, of which one scale is taken afterwards."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (60 * torch.randn(1, 4, 9, 80, generator=generator) for _ in range(3))
    assert (query @ key.transpose(2, 3)).abs().max() > 65504
    wanted = generating_attention.written_out(query, key, value, 80**-0.5)
    found = generating_attention.written_out(query.half(), key.half(), value.half(), 80**-0.5)
    assert torch.isfinite(found).all() and (found.float() - wanted).norm() < 0.02 * wanted.norm()


BY_LENGTH: dict[str, Callable[[], Any]] = {
    "phi3": lambda: Phi3Config(
        **SMALL,
        max_position_embeddings=64,
        original_max_position_embeddings=32,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": [1.0] * 8,
            "long_factor": [1.0 + place for place in range(8)],
            "original_max_position_embeddings": 32,
        },
    ),
    "llama": lambda: LlamaConfig(
        **SMALL,
        max_position_embeddings=32,
        rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0},
    ),
}


@pytest.mark.parametrize("family", BY_LENGTH)
def test_all_tokens_are_turned_by_the_length_there_will_be(family: str, tmp_path: Path) -> None:
    """Of rotary embeddings that go by the length, 32 tokens are the native one here, and 41 there are in all."""
    torch.manual_seed(3)
    AutoModelForCausalLM.from_config(BY_LENGTH[family](), dtype=torch.float64).save_pretrained(tmp_path)
    with torch.no_grad():
        wanted = _loaded(tmp_path, "eager")(input_ids=TOKENS, use_cache=False).logits[0]
    model = _loaded(tmp_path, generating_attention.register("cpu"))
    as_stock = _by_cache(model, "card")
    assert (as_stock - wanted).norm() > 1e-4 * wanted.norm(), "else this would show nothing"
    model = _loaded(tmp_path, generating_attention.register("cpu"))
    generating.turn_alike(model, TOKENS.shape[1])
    assert (_by_cache(model, "card") - wanted).norm() <= 1e-6 * wanted.norm()


def test_a_window_that_nothing_passes_is_none() -> None:
    """As Phi-3.5's is, of 262,144 tokens: its layers are kept like others, in host memory where that is asked for."""

    def model(window: int) -> PreTrainedModel:
        config = Phi3Config(**SMALL, max_position_embeddings=64, sliding_window=window)
        return AutoModelForCausalLM.from_config(config)

    cache, host = make_cache(model(64), "host", 41, CHUNK)
    assert host is not None and {type(layer) for layer in cache.layers} == {key_values.KeptInHost}
    host.close()
    assert {type(layer) for layer in make_cache(model(63), "host", 41, CHUNK)[0].layers} == {key_values.KeptWindow}


def _spaced_tokenizer() -> PreTrainedTokenizerFast:
    """One whose tokens have their space before them, which the decoder takes off the first, as Llama's does."""
    words = ["<end>", "▁", "▁def", "▁f", ":", "\n", "▁▁▁▁", "return", "▁x", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer = Tokenizer(models.WordLevel({word: place for place, word in enumerate(words)}, unk_token="<end>"))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")


def test_what_is_streamed_is_what_is_written() -> None:
    """Spaces at the beginning, indentation, and characters of several tokens, of which no half is ever said."""
    tokenizer = _spaced_tokenizer()
    names = tokenizer.get_vocab()
    prompt = [names["▁def"]]
    new = [names[word] for word in ("▁f", ":", "\n", "▁▁▁▁", "return", "▁x", "<0xC3>", "<0xA4>", ":")]
    said: list[str] = []
    streamer = generating._Streamer(tokenizer, said.append)
    streamer.put(torch.tensor([prompt]))
    for token in new:
        streamer.put(torch.tensor([token]))
    streamer.end()
    assert "".join(said) == " f:\n    return xä:" and "\ufffd" not in "".join(said) and len(said) == len(new) - 1


class _Ends:
    """Of a model and a tokenizer, what ends a text."""

    def __init__(self, ends: Any) -> None:
        self.eos_token_id = ends


def test_whatever_ends_a_text_does() -> None:
    model: Any = type("Model", (), {"config": _Ends(7), "generation_config": _Ends([9, 7])})()
    found = generating._config(model, _Ends(3), 5, generating.Sampling())
    assert found.eos_token_id == [3, 7, 9]
    assert generating._config(model, None, 5, generating.Sampling(0.5, 0.9)).do_sample


def test_no_number_is_no_token() -> None:
    scores = torch.tensor([[1.0, -torch.inf, 2.0]])
    assert generating.Numbers()(TOKENS, scores) is scores
    for broken in (torch.nan, torch.inf):
        with pytest.raises(PlanError, match="is no number"):
            generating.Numbers()(TOKENS, torch.tensor([[1.0, broken, 2.0]]))
