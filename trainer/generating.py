"""Writes text with the adapter of a finished run, in the memory that was planned for it.

The prompt is read in chunks into a cache of its final size; then transformers' own `generate` goes on token by token,
which samples, stops at the end of a text, and streams what it writes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import Cache, GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel
from transformers.generation.streamers import BaseStreamer
from transformers.utils import logging

from planner.errors import PlanError
from planner.generating import Generation
from planner.plan import Plan
from planner.units import format_bytes
from trainer import generating_attention
from trainer.finished import put_on, read_adapter
from trainer.gguf_reading import read_once
from trainer.key_values import make_cache
from trainer.loading import find_source, load_tokenizer, tokenise_bytes, tokenise_with
from trainer.session import ResidentSession

BESIDE = 8
"""Tokens of the prompt that the first new ones are spelled beside: some spell a space only after others."""
BY_LENGTH = ("dynamic", "longrope")
"""Rotary embeddings whose frequencies go by the length of a sequence."""


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
        allocated, reserved: bytes of the card that tensors took, and the allocator held, at most; None without a card.
    """

    text: str
    tokens: int
    ended: bool
    prompt_seconds: float
    seconds: float
    allocated: int | None
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

    @classmethod
    def of(cls, tokens: list[int]) -> Prompt:
        """A prompt of tokens, which are bytes of text."""
        made = cls.__new__(cls)
        made.tokenizer, made.tokens = None, tokens
        return made


class GeneratingSession(ResidentSession):
    """The plan's model as it is trained, but all on the device, and attending to a cache."""

    def stream_weights(self) -> None:
        """Weights stay on the device: they are read once for each token."""

    def _attention(self) -> str:
        return generating_attention.register(self._kernel)


class _Streamer(BaseStreamer):
    """Says what new tokens spell, beside the tokens before them, as soon as that is whole characters."""

    def __init__(self, tokenizer: Any, say: Callable[[str], None]) -> None:
        self._tokenizer, self._say = tokenizer, say
        self._tokens: list[int] = []
        self._told = self._said = 0  # tokens that are known to whoever listens, and those that they are read beside
        self._began = False

    def put(self, value: Tensor) -> None:
        """The prompt first, then token by token."""
        self._tokens += value.flatten().tolist()
        if not self._began:
            self._began, self._told = True, len(self._tokens)
            self._said = max(0, self._told - BESIDE)
            return
        self._tell(last=False)

    def end(self) -> None:
        """Whatever is left is said."""
        self._tell(last=True)

    def _tell(self, *, last: bool) -> None:
        before = spelled(self._tokenizer, self._tokens[self._said : self._told])
        whole = spelled(self._tokenizer, self._tokens[self._said :])
        if len(whole) > len(before) and (last or not whole.endswith("\ufffd")):
            self._say(whole[len(before) :])
            self._said, self._told = self._told, len(self._tokens)


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
        found: what was planned for it. The allocator is held to the card's budget, as where the model is loaded.
        adapter: whether to write with the run's adapter, or with the base model alone.
        begin: what is said first, once the prompt has been read.
        say: told the text piece by piece; ``read``: told how many tokens of the prompt have been read.

    Raises:
        PlanError: the device or the model is not here, the adapter does not fit, or memory was less than planned.
    """
    trained = read_adapter(run)
    session = GeneratingSession(plan)
    session.apply_choices()
    try:
        adapted, _, _ = session.adapted_model()
        put_on(adapted, trained, run)
        with nullcontext() if adapter else adapted.disable_adapter():
            return written(adapted, prompt, found, sampling, say, read, begin)
    except torch.OutOfMemoryError as error:
        budget, high = format_bytes(found.budget), format_bytes(found.high)
        why = f"takes more than the {high} that were planned, or than is free of the card's {budget}."
        nearest = "Close what else uses the card, or ask for --cache host or fewer tokens."
        raise PlanError("plan generate", why, nearest) from error


def written(
    adapted: PeftModel,
    prompt: Prompt,
    found: Generation,
    sampling: Sampling,
    say: Callable[[str], None],
    read: Callable[[int], None],
    begin: str | None = None,
) -> Written:
    """The same with a model that is there; see `write`."""
    base: Any = adapted.get_base_model()
    model: PreTrainedModel = base
    model.eval()
    device, total = model.device, found.prompt + found.new
    turn_alike(model, total)
    model._optimize_model_for_decode = nullcontext  # which takes another way to compute experts, and copies theirs
    if device.type == "cuda":
        torch.cuda.empty_cache()  # of loading, which is of other sizes
        torch.cuda.reset_peak_memory_stats(device)
    ids = torch.tensor([prompt.tokens], device=device)
    began = time.monotonic()
    cache, host = make_cache(model, found.keeping, total, found.chunk)
    try:
        read_into(cache, model, ids, found.chunk, read)
        _wait(device)
        between = time.monotonic()
        if begin is not None:
            say(begin)
        said: list[str] = []
        streamer = _Streamer(prompt.tokenizer, lambda text: (said.append(text), say(text))[0])
        torch.manual_seed(sampling.seed)
        config = _config(model, prompt.tokenizer, found.new, sampling)
        model.generation_config = GenerationConfig()  # what else a model suggests is not what was asked for
        with torch.no_grad():
            everything: Any = model.generate(  # type: ignore[operator]
                ids,
                attention_mask=torch.ones_like(ids),
                past_key_values=cache,
                generation_config=config,
                logits_processor=LogitsProcessorList([Numbers()]),
                streamer=streamer,
            )
        _wait(device)
        ended = time.monotonic()
        new: list[int] = everything[0, ids.shape[1] :].tolist()
    finally:
        if host is not None:
            host.close()
    return Written(
        text="".join(said),
        tokens=len(new),
        ended=new[-1] in (config.eos_token_id or ()),
        prompt_seconds=between - began,
        seconds=ended - between,
        allocated=torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
        reserved=torch.cuda.max_memory_reserved(device) if device.type == "cuda" else None,
    )


def read_into(cache: Cache, model: PreTrainedModel, ids: Tensor, chunk: int, read: Callable[[int], None]) -> None:
    """Read all of a prompt ``[1, S]`` but its last token, which whoever writes begins with, ``chunk`` at a time."""
    last = ids.shape[1] - 1
    with torch.no_grad():
        for start in range(0, last, chunk):
            stop = min(start + chunk, last)
            model(input_ids=ids[:, start:stop], past_key_values=cache, use_cache=True, logits_to_keep=1)
            read(stop)


def _config(model: PreTrainedModel, tokenizer: Any, new: int, sampling: Sampling) -> GenerationConfig:
    ends = [getattr(each, "eos_token_id", None) for each in (model.config, model.generation_config, tokenizer)]
    listed = sorted({one for end in ends if end is not None for one in (end if isinstance(end, list) else [end])})
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


def turn_alike(model: PreTrainedModel, total: int) -> None:
    """Let rotary embeddings whose frequencies go by the length of a sequence go by that of all there will be.

    Else what is kept of the first tokens would be turned otherwise than what comes after them.
    """
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        if not {*BY_LENGTH}.isdisjoint(kinds.values() if isinstance(kinds, dict) else (kinds,)):
            module.forward = partial(_with_last, module.forward, total)


def _with_last(own: Any, total: int, hidden: Tensor, position_ids: Tensor, *rest: Any, **more: Any) -> Any:
    """Cosines and sines of some positions ``[B, S]``, beside the last that there will be."""
    last = position_ids.new_full((len(position_ids), 1), total - 1)
    found = own(hidden, torch.cat([position_ids, last], dim=1), *rest, **more)
    return tuple(each[:, :-1] for each in found)


class Numbers(LogitsProcessor):
    """Refuses logits that are no numbers, of which the first token would be taken, whatever it is."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """The same scores."""
        if bool((scores.isnan() | scores.isposinf()).any()):
            raise PlanError("plan generate", "what the model computes is no number; the adapter may be broken.")
        return scores


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
