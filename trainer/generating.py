"""Writes text with the adapter of a finished run, in the memory that was planned for it.

The prompt is read in chunks into a cache of its final size; then transformers' own `generate` goes on token by token,
which samples, stops at the end of a text, and streams what it writes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import Cache, GenerationConfig, PreTrainedModel, TextStreamer
from transformers.generation.streamers import BaseStreamer
from transformers.utils import logging

from planner.errors import PlanError
from planner.generating import CHUNK, Generation
from planner.plan import Plan
from trainer import generating_attention
from trainer.device import hold
from trainer.finished import put_on
from trainer.gguf_reading import read_once
from trainer.key_values import make_cache
from trainer.loading import find_source, load_tokenizer, tokenise_bytes, tokenise_with
from trainer.session import ResidentSession

BY_LENGTH = ("dynamic", "longrope")
"""Rotary embeddings whose frequencies go by the length of a sequence, by which what was kept was not turned."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen: the likeliest where ``temperature`` is 0."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class Written:
    """What was written.

    Attributes:
        text: what the new tokens spell; ``tokens``: how many they are, with the end of the text if it came.
        ended: whether the model ended it, and not the length.
        prompt_seconds: to read the prompt; ``seconds``: to write all after it.
        reserved: bytes of the card that the allocator held at most; None without a card.
    """

    text: str
    tokens: int
    ended: bool
    prompt_seconds: float
    seconds: float
    reserved: int | None


@contextmanager
def quietly(*, bars: bool) -> Iterator[None]:
    """Meanwhile a GGUF file is read once, and transformers shows its progress where bars are wanted."""
    showed = logging.is_progress_bar_enabled()
    if not bars:
        logging.disable_progress_bar()
    try:
        with read_once():
            yield
    finally:
        if showed:
            logging.enable_progress_bar()


class Prompt:
    """The tokens of a prompt, as the plan's model reads them.

    Args:
        chat: put it as a user's message, in the form that the model's own chat template gives it.

    Raises:
        PlanError: it has no tokens, or there is no such template.
    """

    def __init__(self, plan: Plan, text: str, *, chat: bool = False) -> None:
        self.tokenizer = load_tokenizer(find_source(plan.model.source))
        if chat:
            if self.tokenizer is None or not self.tokenizer.chat_template:
                nearest = "Without --chat it goes on with a text."
                raise PlanError("--chat", f"{plan.model.id} has no chat template.", nearest)
            message = [{"role": "user", "content": text}]
            told = self.tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
            self.tokens: list[int] = self.tokenizer(told, add_special_tokens=False)["input_ids"]
        else:
            tokenise = tokenise_with(self.tokenizer) if self.tokenizer is not None else tokenise_bytes
            (self.tokens,) = tokenise([text])
        if not self.tokens:
            raise PlanError("the prompt", "has no tokens.", "Give some text to go on with.")


class _GeneratingSession(ResidentSession):
    """The plan's model as it is trained, but all on the device, and attending to a cache."""

    def stream_weights(self) -> None:
        """Weights stay on the device: they are read once for each token."""

    def _attention(self) -> str:
        return generating_attention.register(self._kernel)


class _Bytes(BaseStreamer):
    """Streams what random models write, whose tokens are bytes."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say, self._prompt = say, True

    def put(self, value: Tensor) -> None:
        """The prompt first, then token by token."""
        if not self._prompt:
            self._say(spelled(None, value.flatten().tolist()))
        self._prompt = False

    def end(self) -> None:
        """Nothing is held back."""


class _Text(TextStreamer):
    def __init__(self, tokenizer: Any, say: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._say = say

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """See the base class."""
        self._say(text)


def spelled(tokenizer: Any, tokens: list[int]) -> str:
    """The text of tokens."""
    if tokenizer is None:
        return bytes(token for token in tokens if token < 256).decode("utf-8", errors="replace")
    return str(tokenizer.decode(tokens, skip_special_tokens=True))


def write(
    plan: Plan,
    run: Path,
    prompt: Prompt,
    found: Generation,
    sampling: Sampling,
    *,
    adapter: bool = True,
    begin: str | None = None,
    say: Callable[[str], None] = lambda _: None,
    read: Callable[[int], None] = lambda _: None,
) -> Written:
    """Load the model of a run and write on from a prompt.

    Args:
        found: what was planned for it; the card is held to its bound.
        adapter: whether to write with the run's adapter, or with the base model alone.
        begin: what is said first, once the prompt has been read.
        say: told the text piece by piece; ``read``: told how many tokens of the prompt have been read.

    Raises:
        PlanError: the device or the model is not here, the adapter does not fit, or memory was less than planned.
    """
    session = _GeneratingSession(plan)
    session.apply_choices()
    try:
        adapted, _, _ = session.adapted_model()
        put_on(adapted, run)
        with nullcontext() if adapter else adapted.disable_adapter():
            return _written(adapted, prompt, found, sampling, say, read, begin)
    except torch.OutOfMemoryError as error:
        why = "the card has less memory free than was planned."
        raise PlanError(
            "plan generate", why, "Close what else uses it, or ask for --cache host or fewer tokens."
        ) from error


def _written(
    adapted: PeftModel,
    prompt: Prompt,
    found: Generation,
    sampling: Sampling,
    say: Callable[[str], None],
    read: Callable[[int], None],
    begin: str | None = None,
) -> Written:
    base: Any = adapted.get_base_model()
    model: PreTrainedModel = base
    model.eval()
    device, total = model.device, found.prompt + found.new
    _check_rotary(model, total)
    if device.type == "cuda":
        hold(device, found.high)
        torch.cuda.reset_peak_memory_stats(device)
    ids = torch.tensor([prompt.tokens], device=device)
    cache, host = make_cache(model.config, found.keeping, total, device)
    try:
        began = time.monotonic()
        read_into(cache, model, ids, read)
        _wait(device)
        between = time.monotonic()
        if begin is not None:
            say(begin)
        streamer = _Text(prompt.tokenizer, say) if prompt.tokenizer is not None else _Bytes(say)
        torch.manual_seed(sampling.seed)
        model.generation_config = GenerationConfig()  # what a model suggests is not what was asked for
        with torch.no_grad():
            everything: Any = model.generate(  # type: ignore[operator]
                ids,
                attention_mask=torch.ones_like(ids),
                past_key_values=cache,
                generation_config=_config(model, prompt.tokenizer, found.new, sampling),
                streamer=streamer,
            )
        _wait(device)
        ended = time.monotonic()
        new: list[int] = everything[0, ids.shape[1] :].tolist()
    finally:
        if host is not None:
            host.close()
    return Written(
        text=spelled(prompt.tokenizer, new),
        tokens=len(new),
        ended=len(new) < found.new,
        prompt_seconds=between - began,
        seconds=ended - between,
        reserved=torch.cuda.max_memory_reserved(device) if device.type == "cuda" else None,
    )


def read_into(cache: Cache, model: PreTrainedModel, ids: Tensor, read: Callable[[int], None]) -> None:
    """Read all of a prompt ``[1, S]`` but its last token, which whoever writes begins with."""
    last = ids.shape[1] - 1
    with torch.no_grad():
        for start in range(0, last, CHUNK):
            stop = min(start + CHUNK, last)
            model(input_ids=ids[:, start:stop], past_key_values=cache, use_cache=True, logits_to_keep=1)
            read(stop)


def _config(model: PreTrainedModel, tokenizer: Any, new: int, sampling: Sampling) -> GenerationConfig:
    ends = {getattr(model.config, "eos_token_id", None), getattr(tokenizer, "eos_token_id", None)} - {None}
    listed = sorted({one for end in ends for one in (end if isinstance(end, list | tuple) else (end,))})
    chosen = (
        {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
        if sampling.temperature
        else {"do_sample": False}
    )
    return GenerationConfig(
        max_new_tokens=new,
        eos_token_id=listed or None,
        pad_token_id=listed[0] if listed else 0,
        use_cache=True,
        **chosen,
    )


def _check_rotary(model: PreTrainedModel, total: int) -> None:
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        if not {*BY_LENGTH}.isdisjoint(kinds.values() if isinstance(kinds, dict) else (kinds,)):
            native = int(module.original_max_seq_len)  # type: ignore[arg-type]
            if total > native:
                why = "turns keys by the length of the whole sequence, which grows while it is written."
                nearest = f"Up to {native:,} tokens, prompt and new ones together, all are turned alike."
                raise PlanError(f"{total:,} tokens", f"are too many: the model {why}", nearest)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
