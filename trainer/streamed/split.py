"""A transformers decoder taken apart at the attention call: what comes before it, and what comes after.

The layers' own code runs unmodified. Attention is registered with transformers as a function that takes query, key and
value out of the layer and ends its forward there; for the part after attention, the attention module is stood in for by
its output projection alone, which gets the attended values from outside. Embeddings with their scales, rotary tables of
each layer and the final norm come from the decoder's own forward, run with layers that do nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from planner.errors import PlanError
from planner.families import FAMILIES
from trainer.layers import layers_of

NAME = "tierplan_streamed"
"""What the capturing attention function is called in transformers' registry."""


@dataclass(frozen=True)
class Projected:
    """What a layer asks its attention for.

    Attributes:
        query: ``[C, H, E]``; key, value: ``[C, K, E]``; rotary embedding applied.
        scale: factor on the scores.
        window: keys that a query sees, itself included; None: all before it.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    scale: float
    window: int | None


class _Captured(Exception):
    def __init__(self, projected: Projected) -> None:
        self.projected = projected


class _AllSeen(Exception):
    pass


def register() -> str:
    """Make the capturing attention known to transformers, and return its name there."""

    def capture(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        dropout: float = 0.0,
        sliding_window: int | None = None,
        **others: Any,
    ) -> tuple[Tensor, None]:
        extras = [name for name in ("softcap", "s_aux", "sinks", "head_mask") if others.get(name) is not None]
        if extras or attention_mask is not None or dropout:
            what = ", ".join(
                [*extras, *(["a mask"] if attention_mask is not None else []), *(["dropout"] if dropout else [])]
            )
            raise PlanError(
                f"streaming {type(module).__name__}", f"its attention uses {what}, which no exact kernel has."
            )
        scale = scaling if scaling is not None else query.shape[-1] ** -0.5
        raise _Captured(
            Projected(*(each.squeeze(0).transpose(0, 1) for each in (query, key, value)), scale, sliding_window)
        )

    AttentionInterface.register(NAME, capture)
    return NAME


class Split:
    """A decoder whose layers can be run in two parts, on any range of tokens.

    Args:
        model: a causal language model loaded with ``attn_implementation=register()``; adapters may be on it.

    Raises:
        PlanError: its layers have no attention that can be taken out.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.decoder: Any = model.get_decoder()
        self.layers = layers_of(model)
        self.config = model.config
        self._attended: Tensor | None = None
        self._standing_in: Callable[[int, Tensor, dict[str, Any]], Tensor] | None = None
        family = FAMILIES.get(self.config.model_type)
        if family is None:
            self._refuse(type(self.decoder).__name__, "its family is not known")
        assert family is not None
        if self.config._attn_implementation != NAME:
            self._refuse(
                type(self.decoder).__name__, f"it was loaded with attention {self.config._attn_implementation}"
            )
        for layer in self.layers:
            self._take_attention_out(layer, family.attention[-1])
        for index, layer in enumerate(self.layers):
            layer.forward = self._layer_forward(index, layer.forward)

    def _refuse(self, what: str, why: str) -> None:
        raise PlanError(
            f"streaming {what}", f"{why}, so it cannot be cut at its attention.", "--without streamed plans without."
        )

    def _take_attention_out(self, layer: nn.Module, output: str) -> None:
        name = next((name for name in ("self_attn", "attention", "attn") if hasattr(layer, name)), None)
        attention = getattr(layer, name) if name else None
        if not isinstance(attention, nn.Module) or not hasattr(attention, output):
            self._refuse(
                type(layer).__name__, f"no attention module with an output projection {output} was found in it"
            )
        assert attention is not None
        own, project = attention.forward, getattr(attention, output)

        def forward(*args: Any, **kwargs: Any) -> Any:
            if self._attended is None:
                return own(*args, **kwargs)
            return project(self._attended), None

        attention.forward = forward

    def _layer_forward(self, index: int, own: Callable[..., Any]) -> Callable[..., Any]:
        names = list(signature(own).parameters)[1:]

        def forward(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
            kwargs |= dict(zip(names, args, strict=False))
            if self._standing_in is not None:
                return self._standing_in(index, hidden, kwargs)
            return own(hidden, **kwargs)

        return forward

    @contextmanager
    def _layers_replaced(self, by: Callable[[int, Tensor, dict[str, Any]], Tensor]) -> Iterator[None]:
        self._standing_in = by
        try:
            yield
        finally:
            self._standing_in = None

    def embed(self, tokens: Tensor, positions: Tensor, longest: int) -> tuple[Tensor, list[dict[str, Any]]]:
        """Input of the first layer, and for every layer what transformers hands it beside the hidden states.

        Args:
            tokens: ``[C]`` ids; positions: ``[C]``, of each within its document.
            longest: tokens of the longest document, which rotary embeddings of a kind that depends on it go by.
        """
        count, given = len(tokens), [dict[str, Any]() for _ in self.layers]
        # Rotary embeddings that depend on the length take it from the largest position they see.
        last = tokens.new_full((1,), longest - 1)
        tokens, positions = torch.cat([tokens, tokens[-1:]]), torch.cat([positions, last])
        first: list[Tensor] = []

        def note(index: int, hidden: Tensor, kwargs: dict[str, Any]) -> Tensor:
            if index == 0:
                first.append(hidden)
            given[index] = {name: _only(value, count) for name, value in kwargs.items()}
            if index == len(given) - 1:
                raise _AllSeen  # the final norm would follow, for nothing
            return hidden

        with self._layers_replaced(note), torch.no_grad(), suppress(_AllSeen):
            self.decoder(input_ids=tokens[None], position_ids=positions[None], use_cache=False)
        return first[0][0, :count], given

    def before(self, index: int, hidden: Tensor, given: dict[str, Any]) -> Projected:
        """From a layer's input ``[C, D]`` to query, key and value."""
        try:
            self.layers[index](hidden[None], **given)
        except _Captured as captured:
            return captured.projected
        raise PlanError(
            f"streaming {type(self.layers[index]).__name__}", "its forward ended without asking for attention."
        )

    def after(self, index: int, hidden: Tensor, attended: Tensor, given: dict[str, Any]) -> Tensor:
        """From a layer's input ``[C, D]`` and its attended values ``[C, H, E]`` to its output ``[C, D]``."""
        self._attended = attended.flatten(1)[None]
        try:
            result = self.layers[index](hidden[None], **given)
        finally:
            self._attended = None
        return (result[0] if isinstance(result, tuple) else result).squeeze(0)

    def final(self, hidden: Tensor) -> Tensor:
        """The final norm of the last layer's output ``[C, D]``."""
        last = len(self.layers) - 1

        def give(index: int, passed: Tensor, kwargs: dict[str, Any]) -> Tensor:
            return hidden[None] if index == last else passed

        device = hidden.device
        with self._layers_replaced(give):
            # What goes into the first layer is of no account, and only its length has to be right.
            one = torch.zeros(1, 1, dtype=torch.int64, device=device)
            last_hidden = self.decoder(input_ids=one, position_ids=one, use_cache=False).last_hidden_state
        return last_hidden.reshape(hidden.shape)  # GPT-2 takes the tokens for rows of one token each


def _only(value: Any, count: int) -> Any:
    """The first tokens of what goes with each token (``[1, C, …]``), alone or in a tuple."""
    if isinstance(value, tuple):
        return tuple(_only(each, count) for each in value)
    if isinstance(value, Tensor) and value.dim() >= 2 and value.shape[1] == count + 1:
        return value[:, :count]
    return value
