"""Keys and values of all tokens while text is written, in memory that is taken once, before the first, and stays.

Taken as each layer comes, it would lie between tensors of a prompt's size, which go again, and leave gaps between them
that an allocator at its limit cannot give back.

Each kind is a layer of transformers' own `Cache`, which hands it the new tokens and attends to what it gives back. They
lie token by token, ``[tokens, B, K, E]``: what there is so far is one piece then, which copies as such between host and
card, and is as attention kernels have it best. Whoever attends is given views ``[B, K, tokens, E]``.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from math import prod
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin

from planner.generating import Keeping
from trainer.host_memory import Arena


def by_token(states: Tensor) -> Tensor:
    """``[B, K, q, E]`` seen as ``[q, B, K, E]``."""
    return states.permute(2, 0, 1, 3)


def by_head(kept: Tensor) -> Tensor:
    """``[q, B, K, E]`` seen as ``[B, K, q, E]``."""
    return kept.permute(1, 2, 0, 3)


class Kept(CacheLayerMixin):
    """Keys and values of one layer, as they are computed, on the device that computes."""

    is_compileable = is_sliding = is_croppable = False

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.tokens, self.seen = tokens, 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Take the memory, by what no tokens ``[B, K, 0, E]`` look like; transformers' name for it."""
        shape = self.shape_for(key_states)
        self.keys, self.values = key_states.new_empty(shape), value_states.new_empty(shape)
        self.is_initialized = True

    def shape_for(self, states: Tensor) -> tuple[int, int, int, int]:
        """Of its memory, ``[tokens, B, K, E]``, from a few tokens ``[B, K, q, E]``."""
        rows, heads, _, size = states.shape
        return self.tokens, rows, heads, size

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Keep new tokens ``[B, K, q, E]``; gives all of them, ``[B, K, k, E]``, as views."""
        stop = self.seen + key_states.shape[2]
        assert self.keys is not None and self.values is not None and stop <= self.tokens
        self.keys[self.seen : stop] = by_token(key_states)
        self.values[self.seen : stop] = by_token(value_states)
        self.seen = stop
        return by_head(self.keys[:stop]), by_head(self.values[:stop])

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of what is attended to."""
        return self.seen + query_length, 0

    def get_seq_length(self) -> int:
        """Tokens that it has been given."""
        return self.seen

    def get_max_length(self) -> int:
        """Tokens that it can be given."""
        return self.tokens

    get_max_cache_shape = get_max_length


class KeptWindow(Kept):
    """The same of a layer with a window: what the next token sees, and room for a chunk.

    Args:
        window: tokens that a token sees, itself among them.
        chunk: tokens that it is given at once, at most.
    """

    is_sliding = True

    def __init__(self, tokens: int, window: int, chunk: int) -> None:
        super().__init__(min(tokens, window + chunk))
        self._window, self._all, self._held = window, tokens, 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Keep new tokens; gives them with those that the first of them sees."""
        assert self.keys is not None and self.values is not None
        new = key_states.shape[2]
        if self._held + new > self.tokens:  # what is out of sight makes room
            stays = min(self._held, self._window - 1)
            for held in (self.keys, self.values):
                held[:stays] = held[self._held - stays : self._held].clone()  # the two overlap
            self._held = stays
        stop = self._held + new
        self.keys[self._held : stop] = by_token(key_states)
        self.values[self._held : stop] = by_token(value_states)
        first = max(0, self._held - (self._window - 1))
        self._held, self.seen = stop, self.seen + new
        return by_head(self.keys[first:stop]), by_head(self.values[first:stop])

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of what is attended to."""
        length = min(self.seen, self._window - 1) + query_length
        return length, self.seen + query_length - length

    def get_max_length(self) -> int:
        """Tokens that it can be given."""
        return self._all

    get_max_cache_shape = get_max_length


PIECE = 4096
"""Tokens whose codes are multiplied out at once without a card: the CPU copies them first, as wide as their scales."""


class Rooms:
    """Room on the card for whole layers, as they are attended to."""

    def __init__(self) -> None:
        self._taken = dict[int, tuple[Tensor, Tensor]]()

    def room(self, number: int, shape: tuple[int, ...], like: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of one room."""
        if number not in self._taken:
            self._taken[number] = like.new_empty(shape), like.new_empty(shape)
        return self._taken[number]


class KeptInEightBits(Kept):
    """Each token's keys of a head in int8, divided by the largest of them over 127, and its values likewise.

    New tokens are attended to as they are; from the next time on as they are kept.
    """

    def __init__(self, tokens: int, rooms: Rooms) -> None:
        super().__init__(tokens)
        self._rooms = rooms
        self._scales: tuple[Tensor, Tensor] | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Take the memory."""
        shape = self.shape_for(key_states)
        self.keys = key_states.new_empty(shape, dtype=torch.int8)
        self.values = key_states.new_empty(shape, dtype=torch.int8)
        wide = {"dtype": torch.float32, "device": key_states.device}
        self._scales = torch.empty(*shape[:3], 1, **wide), torch.empty(*shape[:3], 1, **wide)
        self._rooms.room(0, shape, key_states)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Keep new tokens; gives all of them in the room that layers share."""
        assert self.keys is not None and self.values is not None and self._scales is not None
        start, stop = self.seen, self.seen + key_states.shape[2]
        assert stop <= self.tokens
        rooms = self._rooms.room(0, tuple(self.keys.shape), key_states)
        step = PIECE if self.keys.device.type == "cpu" else max(start, 1)
        parts = zip(rooms, (self.keys, self.values), self._scales, (key_states, value_states), strict=True)
        for room, codes, scales, new in parts:
            for at in range(0, start, step):
                piece = slice(at, min(at + step, start))
                torch.mul(codes[piece], scales[piece], out=room[piece])
            room[start:stop] = by_token(new)
            wide = by_token(new).float()
            scales[start:stop] = wide.abs().amax(-1, keepdim=True).div_(127).clamp_(min=1e-30)
            codes[start:stop] = wide.div_(scales[start:stop]).round_().to(torch.int8)
        self.seen = stop
        return by_head(rooms[0][:stop]), by_head(rooms[1][:stop])


class KeptInHost(Kept):
    """The same as computed, in host memory: the next layer's comes to the card while one is attended to.

    Args:
        number: its own among the layers of its kind.
    """

    def __init__(self, tokens: int, number: int, host: Host) -> None:
        super().__init__(tokens)
        self._number, self._host = number, host

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Take the memory, pinned where there is a card."""
        shape = self.shape_for(key_states)
        self.keys, self.values = self._host.take(shape, key_states), self._host.take(shape, value_states)
        self._host.room(self._number % 2, shape, key_states)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Keep new tokens; gives all of them on the card."""
        assert self.keys is not None and self.values is not None
        start, stop = self.seen, self.seen + key_states.shape[2]
        assert stop <= self.tokens
        rooms = self._host.there(self._number, key_states)
        for room, new in zip(rooms, (key_states, value_states), strict=True):
            room[start:stop] = by_token(new)
        self._host.send(self._number, rooms, start, stop)
        self.seen = stop
        return by_head(rooms[0][:stop]), by_head(rooms[1][:stop])


class Host:
    """Copies between layers kept in host memory and two rooms on the card, beside the computation.

    A room is filled for the layer after the one that is attended to. On the CPU copies come in order.
    """

    def __init__(self, device: torch.device) -> None:
        self.arena = Arena(torch.device("cpu"), away=True, pinned=device.type == "cuda")
        self.layers: list[KeptInHost] = []
        self._rooms = Rooms()
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._coming: tuple[int, int, Any] | None = None  # a layer, the room it comes to, when it is there
        self._turn = 0

    def layer(self, tokens: int) -> KeptInHost:
        """One more layer."""
        self.layers.append(KeptInHost(tokens, len(self.layers), self))
        return self.layers[-1]

    def take(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """Host memory for keys or values of a layer."""
        return self.arena.take(prod(shape), like.dtype).view(shape)

    def there(self, number: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """The room of a layer, with what it holds come to it."""
        if self._coming is None or self._coming[0] != number:
            self._fetch(number, self._turn, like)
        assert self._coming is not None
        _, self._turn, event = self._coming
        self._coming = None
        if event is not None:
            torch.cuda.current_stream(like.device).wait_event(event)
        return self.room(self._turn, self.layers[number].shape_for(like), like)

    def send(self, number: int, rooms: tuple[Tensor, Tensor], start: int, stop: int) -> None:
        """New tokens of a room to the host, and then what the next layer holds to the other room.

        Nothing of that is attended to any more: the layer before was done with when this one began.
        """
        layer = self.layers[number]
        assert layer.keys is not None and layer.values is not None
        with self._beside(rooms[0].device):
            for room, kept in zip(rooms, (layer.keys, layer.values), strict=True):
                kept[start:stop].copy_(room[start:stop], non_blocking=True)
        if len(self.layers) > 1:
            self._fetch((number + 1) % len(self.layers), 1 - self._turn, rooms[0])

    def _fetch(self, number: int, turn: int, like: Tensor) -> None:
        layer = self.layers[number]
        if layer.seen:
            assert layer.keys is not None and layer.values is not None
            rooms = self.room(turn, layer.keys.shape, like)  # not in the stream of copies, which has its own memory
            with self._beside(like.device):
                for room, kept in zip(rooms, (layer.keys, layer.values), strict=True):
                    room[: layer.seen].copy_(kept[: layer.seen], non_blocking=True)
        # Also where nothing came: what left the same room two layers ago has to be out before it is written to.
        self._coming = number, turn, self._stream.record_event() if self._stream is not None else None

    def room(self, turn: int, shape: tuple[int, ...], like: Tensor) -> tuple[Tensor, Tensor]:
        """One of the two rooms."""
        return self._rooms.room(turn, shape, like)

    def _beside(self, device: torch.device) -> AbstractContextManager[Any]:
        """The stream of copies, once what was computed so far is there."""
        if self._stream is None:
            return nullcontext()
        self._stream.wait_stream(torch.cuda.current_stream(device))
        return torch.cuda.stream(self._stream)


def window_of(config: PretrainedConfig, layer: int) -> int | None:
    """The window of a layer, where it has one that is shorter than the context the model was made for."""
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if window is None or (kinds is not None and kinds[layer] != "sliding_attention"):
        return None
    return int(window) if window < config.max_position_embeddings else None


def make_cache(model: PreTrainedModel, keeping: Keeping, tokens: int, chunk: int) -> tuple[Cache, Arena | None]:
    """A model's cache for so many tokens of one text, in chunks of ``chunk`` at most; and its host memory, if any."""
    config, device = model.config, model.device
    host, rooms = Host(device), Rooms()
    layers: list[Any] = []
    for number in range(config.num_hidden_layers):
        window = window_of(config, number)
        if window is not None:
            layers.append(KeptWindow(tokens, window, chunk))
        elif keeping == "host":
            layers.append(host.layer(tokens))
        else:
            layers.append(KeptInEightBits(tokens, rooms) if keeping == "int8" else Kept(tokens))
    cache = Cache(layers=layers)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    try:
        cache.early_initialization(1, heads, size, model.dtype, device)
    except BaseException:
        host.arena.close()
        raise
    return cache, host.arena if host.layers else None
