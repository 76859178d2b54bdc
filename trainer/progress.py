"""What a run shows and writes while it trains: progress bars or lines, ``metrics.jsonl`` and TensorBoard."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate
from typing import Any, Self

from rich import progress as bars
from rich.console import Console
from rich.text import Text

from planner.stages import steps_in
from planner.units import format_bytes, format_seconds
from trainer.layer_progress import LayerDone
from trainer.output import RunFolder

QUIET_SECONDS = 30.0
"""Where no terminal shows bars, lines about layers are at least so far apart."""


class _Left(bars.ProgressColumn):
    """The time left as it was given; rich's own estimate forgets steps of more than half a minute."""

    def render(self, task: bars.Task) -> Text:
        left = task.fields.get("left")
        return Text("" if not left else f"{format_seconds(left)} left")


class Progress:
    """Takes one dictionary a step, from `trainer.training.train_steps`, and layers in between; a context manager.

    Attributes:
        done: steps shown so far.
        skipped: steps that float16 overflow cost.
    """

    def __init__(
        self,
        console: Console,
        folder: RunFolder,
        steps: int,
        clock: Callable[[], float] = time.perf_counter,
        stages: Sequence[float] = (1.0,),
    ) -> None:
        """``stages``: how long a step of each stage of the run is expected to take, in whatever unit."""
        self._console, self._folder, self._steps, self._clock = console, folder, steps, clock
        self._stages = stages
        self.done = self.skipped = 0
        self.losses: list[float] = []
        self.seconds: list[float] = []
        self._tensorboard: Any = None
        self._bar = bars.Progress(
            bars.TextColumn("{task.fields[unit]}"),
            bars.MofNCompleteColumn(),
            bars.BarColumn(),
            bars.TextColumn("{task.description}"),
            _Left(),
            console=console,
        )
        self._step_row = self._bar.add_task("", total=steps, unit="step", left=None)
        self._layer_row = self._bar.add_task("", total=1, unit="layer", left=None, visible=False)
        self._last_line = clock()

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.update(self._layer_row, visible=False)
        self._bar.stop()
        if self._tensorboard is not None:
            self._tensorboard.close()

    def go_on(self, steps: Iterable[dict[str, Any]]) -> None:
        """These steps were shown before the run was stopped."""
        for step in steps:
            self._count(step)
        self._bar.update(self._step_row, completed=self.done)

    def _count(self, step: dict[str, Any]) -> None:
        self.done = step["step"]
        self.losses.append(step["loss"])
        self.seconds.append(step["seconds"])
        self.skipped += not step["taken"] and "went_back_to" not in step

    def show(self, step: dict[str, Any]) -> None:
        """Write a step down and move the bar."""
        self._count(step)
        self._folder.log(**step)
        self._log_to_tensorboard(step)
        memory = f", {format_bytes(step['allocated_bytes'])}" if step["allocated_bytes"] else ""
        told = f"loss {step['loss']:.4f}, {step['tokens_per_second']:,.0f} tokens/s{memory}"
        if "went_back_to" in step:
            spike = f"Step {self.done}: loss {step['loss']:.4f} is a spike; going on from the state after step "
            self._console.print(f"{spike}{step['went_back_to']}.", highlight=False)
        left = time_left(self.seconds, self.done, self._steps, self._stages)
        self._bar.update(self._step_row, completed=self.done, description=told, left=left)
        if not self._console.is_terminal and (self.done % max(1, self._steps // 10) == 0 or self.done == self._steps):
            self._console.print(f"step {self.done}/{self._steps}: {told}", highlight=False)

    def show_layer(self, layer: LayerDone) -> None:
        """Move the bar of layers, or print a line now and then."""
        self._bar.update(
            self._layer_row,
            total=layer.count,
            completed=layer.done,
            description=f"{layer.speed} ({layer.what})",
            left=layer.seconds_left,
            visible=self._console.is_terminal,
        )
        if not self._console.is_terminal and self._clock() - self._last_line >= QUIET_SECONDS:
            self._last_line = self._clock()
            self._console.print(str(layer), highlight=False)

    def _log_to_tensorboard(self, step: dict[str, Any]) -> None:
        if self._tensorboard is None:
            try:
                from torch.utils.tensorboard import SummaryWriter

                self._tensorboard = SummaryWriter(str(self._folder.path / "tensorboard"))
            except ImportError:
                self._console.print("No TensorBoard log: the package tensorboard is not installed.", highlight=False)
                self._tensorboard = _NoTensorboard()
        for name in ("loss", "lr", "gradient_norm", "tokens_per_second"):
            if step[name] is not None:
                self._tensorboard.add_scalar(f"train/{name}", step[name], self.done)


def time_left(seconds: Sequence[float], done: int, steps: int, stages: Sequence[float]) -> float:
    """Seconds that the rest of a run takes if its steps go on like those before, each for its stage.

    Args:
        seconds: of the steps that are known; ``done``: the last of them, of ``steps``.
        stages: how long a step of each is expected to take, in whatever unit.
    """
    ends = [0, *accumulate(steps_in(steps, len(stages)))]

    def expected(first: int, last: int) -> float:
        return sum(
            each * max(0, min(last, end) - max(first, begin))
            for each, begin, end in zip(stages, ends[:-1], ends[1:], strict=True)
        )

    return sum(seconds) * expected(done, steps) / expected(done - len(seconds), done)


class _NoTensorboard:
    """Takes what nobody writes."""

    def add_scalar(self, *_: object) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""
