"""What a run shows and writes while it trains: a progress bar, ``metrics.jsonl`` and TensorBoard."""

from __future__ import annotations

from typing import Any, Self

from rich import progress as bars
from rich.console import Console

from planner.units import format_bytes
from trainer.output import RunFolder


class Progress:
    """Takes one dictionary a step, from `trainer.run.train_steps`. Use it as a context manager.

    Attributes:
        done: steps shown so far.
        skipped: steps that float16 overflow cost.
    """

    def __init__(self, console: Console, folder: RunFolder, steps: int) -> None:
        self._console, self._folder, self._steps = console, folder, steps
        self.done = self.skipped = 0
        self.losses: list[float] = []
        self.seconds: list[float] = []
        self._tensorboard: Any = None
        self._bar = bars.Progress(
            bars.TextColumn("step"),
            bars.MofNCompleteColumn(),
            bars.BarColumn(),
            bars.TextColumn("{task.description}"),
            bars.TimeRemainingColumn(),
            console=console,
        )
        self._task = self._bar.add_task("", total=steps)

    def __enter__(self) -> Self:
        self._tensorboard = self._open_tensorboard()
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()
        if self._tensorboard is not None:
            self._tensorboard.close()

    def show(self, step: dict[str, Any]) -> None:
        """Write a step down and move the bar."""
        self.done = step["step"]
        self.losses.append(step["loss"])
        self.seconds.append(step["seconds"])
        self.skipped += not step["taken"]
        self._folder.log(**step)
        if self._tensorboard is not None:
            for name in ("loss", "lr", "gradient_norm", "tokens_per_second"):
                self._tensorboard.add_scalar(f"train/{name}", step[name], self.done)
        memory = f", {format_bytes(step['allocated_bytes'])}" if step["allocated_bytes"] else ""
        told = f"loss {step['loss']:.4f}, {step['tokens_per_second']:,.0f} tokens/s{memory}"
        self._bar.update(self._task, completed=self.done, description=told)
        if not self._console.is_terminal and (self.done % max(1, self._steps // 10) == 0 or self.done == self._steps):
            self._console.print(f"step {self.done}/{self._steps}: {told}", highlight=False)

    def _open_tensorboard(self) -> Any:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            self._console.print("No TensorBoard log: the package tensorboard is not installed.", highlight=False)
            return None
        return SummaryWriter(str(self._folder.path / "tensorboard"))
