"""Progress inside a step of the streamed executor: which layer, how fast, how long still, and the memory it takes.

A step of a long sequence lasts from minutes to hours. Layers are heard of when they are done; on a card each one's end
is awaited only after the next one has been enqueued, so that the card never runs dry for it.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from planner.ledger import Phase
from planner.plan import Plan
from planner.units import format_bytes, format_seconds
from trainer.measure import host_anonymous_bytes
from trainer.streamed.loss import Direction

USUAL_RATIO = 3.0
"""Seconds of a layer's backward pass to those of its forward pass: it computes the layer again, then gradients."""


@dataclass(frozen=True)
class LayerDone:
    """What there is to tell once a layer is done.

    Attributes:
        what: the step, or what else the layers are run for.
        done: layers of ``count`` that are done in this direction.
        tokens_per_second: of the whole pass, if the rest goes on as expected.
        seconds_left: of all passes of ``what``.
        card_bytes: reserved on the card; 0 without one.
    """

    what: str
    direction: Direction
    done: int
    count: int
    tokens_per_second: float
    seconds_left: float
    card_bytes: int
    host_bytes: int

    @property
    def speed(self) -> str:
        """Direction, speed and memory in words."""
        card = f", {format_bytes(self.card_bytes)} on the card" if self.card_bytes else ""
        host = f", {format_bytes(self.host_bytes)} in the host" if self.host_bytes else ""
        way = "backward" if self.direction == "backward" else "forward"
        return f"{way}, {self.tokens_per_second:,.0f} tokens/s{card}{host}"

    def __str__(self) -> str:
        return f"{self.what}, layer {self.done} of {self.count} {self.speed}, {format_seconds(self.seconds_left)} left"


class Pace:
    """How long the rest of a pass takes: forward through all layers and back, or forward alone.

    Layers differ, as some attend within a window. So a layer that is still to come is expected to take what it took
    in the last whole pass, times what the layers done by now in the same direction took longer than then. In the first
    pass a forward layer is expected to take the mean of those done, a backward layer ``ratio`` times its own forward.

    Args:
        ratio: seconds of a backward layer to those of a forward layer, until a backward layer shows it.
    """

    def __init__(self, ratio: float) -> None:
        self._ratio = ratio
        self._layers = self._places = 0
        self._now: dict[int, float] = {}  # seconds by place: forward layers in order, then backward ones from the last
        self._before: list[float] = []

    def begin(self, layers: int, *, backward: bool) -> None:
        """A pass begins; ``backward``: it comes back."""
        if layers != self._layers:
            self._before = []
        self._layers, self._places, self._now = layers, layers * (2 if backward else 1), {}

    def note(self, place: int, seconds: float) -> None:
        """A layer is done."""
        self._now[place] = seconds
        if len(self._now) == 2 * self._layers:
            self._before = [self._now[each] for each in range(2 * self._layers)]

    def left(self, place: int) -> float:
        """Seconds from the end of this layer to that of the pass."""
        weights = self._before or self._first_weights()
        turned = place >= self._layers
        done = [each for each in self._now if (each >= self._layers) == turned]
        scale = sum(self._now[each] for each in done) / max(1e-9, sum(weights[each] for each in done))
        return scale * sum(weights[place + 1 : self._places])

    def _first_weights(self) -> list[float]:
        known = [seconds for place, seconds in self._now.items() if place < self._layers]
        mean = sum(known) / len(known) if known else 1.0
        forward = [self._now.get(place, mean) for place in range(self._layers)]
        return forward + [self._ratio * seconds for seconds in reversed(forward)]


class LayerProgress:
    """A `trainer.streamed.loss.Tell`: hears of layers and tells ``show`` what there is to say of each.

    Args:
        ratio: see `Pace`.
        clock: seconds that only ever grow.
    """

    def __init__(
        self,
        device: torch.device,
        ratio: float,
        show: Callable[[LayerDone], None],
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._device, self._show, self._clock = device, show, clock
        self._pace = Pace(ratio)
        self._what, self._tokens, self._pass = "", (1,), -1
        self._began = self._last = clock()
        self._behind = 1 if device.type == "cuda" else 0
        self._told: deque[tuple[Direction, int, int, Any]] = deque()

    def begin(self, what: str, tokens: Sequence[int]) -> None:
        """Passes follow, over so many tokens each, that belong together."""
        self._finish()
        self._what, self._tokens, self._pass = what, tuple(tokens), -1

    def __call__(self, direction: Direction, done: int, count: int) -> None:
        """A layer was enqueued as the so many-th of all; with 0 a direction begins."""
        self._told.append((direction, done, count, self._event()))
        while len(self._told) > self._behind:
            self._note(*self._told.popleft())

    def _finish(self) -> None:
        while self._told:
            self._note(*self._told.popleft())

    def _event(self) -> Any:
        if self._device.type != "cuda":
            return None
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._device))
        return event

    def _note(self, direction: Direction, done: int, count: int, event: Any) -> None:
        if event is not None:
            event.synchronize()
        now = self._clock()
        seconds, self._last = now - self._last, now
        if not done:
            if direction != "backward":
                self._pace.begin(count, backward=direction == "forward")
                self._began, self._pass = now, self._pass + 1
            return
        place = done - 1 + (count if direction == "backward" else 0)
        self._pace.note(place, seconds)
        left = self._pace.left(place)
        whole = now - self._began + left
        own, later = self._tokens[self._pass], sum(self._tokens[self._pass + 1 :])
        self._show(
            LayerDone(
                what=self._what,
                direction=direction,
                done=done,
                count=count,
                tokens_per_second=own / max(1e-9, whole),
                seconds_left=left + whole * later / own,  # Approximate: as if time grew with tokens alone
                card_bytes=torch.cuda.memory_reserved(self._device) if event is not None else 0,
                host_bytes=host_anonymous_bytes(),
            )
        )


def planned_ratio(plan: Plan) -> float:
    """Seconds of a backward layer to those of a forward layer as the plan has them, or what is usual."""

    def seconds(*phases: Phase) -> float:
        return sum(plan.time.phases[phase].seconds or 0 for phase in phases if phase in plan.time.phases)

    forward = seconds(Phase.FORWARD, Phase.ATTENTION)
    backward = seconds(Phase.BACKWARD, Phase.ATTENTION_BACKWARD)
    return backward / forward if forward and backward else USUAL_RATIO
