"""Evaluations while a run trains: which is the best, when to stop, and which adapters are kept on disk.

At each of them the adapters that were judged are written to ``checkpoints/step-N``, a folder that PEFT loads, where
anything goes by them. Then those are deleted that are neither the best nor among the newest.
"""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft import PeftModel, load_peft_weights, set_peft_model_state_dict

from planner.errors import PlanError
from planner.plan import Train
from planner.units import format_bytes

FOLDER = "checkpoints"
OURS = re.compile(r"step-\d+|\.being-written")
"""What is deleted there, of which anything else is somebody's own."""
TIMES = 10
"""So often is judged in a run where something goes by evaluations and ``train.evaluate_every`` does not say."""


@dataclass
class Judging:
    """What a plan's hooks ask of evaluations.

    Attributes:
        stopping: stop after so many evaluations that were not better by this share of the best loss; None: never.
        keeping: how many of the newest adapters are kept, and how many bytes all may take, 0 for any; None: none.
    """

    stopping: tuple[int, float] | None = None
    keeping: tuple[int, int] | None = None

    def every(self, train: Train, steps: int) -> int:
        """Steps between two evaluations; 0 for none."""
        if train.evaluate_every or not (self.stopping or self.keeping):
            return train.evaluate_every
        return max(1, steps // TIMES)


@dataclass
class Judged:
    """What evaluations have given so far, which is stored with a run.

    Attributes:
        losses: steps that were done, and the loss then, one after the other.
        best: the step with the least loss, and that loss.
        worse: evaluations since one was better by the threshold; ``mark``: the loss that it was better than.
        kept: steps whose adapters are on disk, in order.
        stopped: after which step training was ended; None: it was not.
    """

    losses: list[tuple[int, float]] = field(default_factory=list)
    best: tuple[int, float] | None = None
    mark: float | None = None
    worse: int = 0
    kept: list[int] = field(default_factory=list)
    stopped: int | None = None

    def document(self) -> dict[str, Any]:
        """As plain data."""
        listed = {"losses": [list(each) for each in self.losses], "best": self.best and list(self.best)}
        return vars(self) | listed | {"kept": list(self.kept)}

    @staticmethod
    def of(stored: dict[str, Any] | None) -> Judged:
        """What was stored; from a run that stored nothing of it, nothing."""
        if stored is None:
            return Judged()
        losses = [(int(step), float(loss)) for step, loss in stored["losses"]]
        best = stored["best"] and (int(stored["best"][0]), float(stored["best"][1]))
        return Judged(losses, best, stored["mark"], stored["worse"], list(stored["kept"]), stored["stopped"])


class Judge:
    """Goes by the evaluations of one run.

    Args:
        out: the run's folder.
        every: steps between two evaluations; 0 for none.
        judged: what they have given before, of a run that goes on.
    """

    def __init__(self, judging: Judging, out: Path, every: int, judged: Judged | None = None) -> None:
        self._judging, self._folder, self._every = judging, out / FOLDER, every
        self.judged = judged or Judged()
        if judged is not None:
            self._drop_all_but({*judged.kept})  # what was written after the moment that the run goes on from
            judged.kept = [step for step in judged.kept if self._place(step).is_dir()]
            if judged.best is not None and (judging.stopping or judging.keeping) and judged.best[0] not in judged.kept:
                judged.best = None  # a better one had taken its place by then, and will again

    def due(self, step: int, steps: int) -> bool:
        """Whether to judge after this step; the last one is judged when all is done."""
        return bool(self._every) and step % self._every == 0 and step < steps

    def after(self, step: int, loss: float | None, save: Callable[[Path], None]) -> str | None:
        """Take in an evaluation, or None where nothing is held out; says why to stop, if it is time to.

        Args:
            save: writes the adapters that were judged into a folder.
        """
        found, judging = self.judged, self._judging
        if loss is not None:
            found.losses.append((step, loss))
            number = math.isfinite(loss)  # one that is none is worse than any
            if number and (found.best is None or loss < found.best[1]):
                found.best = (step, loss)
            threshold = judging.stopping[1] if judging.stopping else 0.0
            if number and (found.mark is None or loss < found.mark * (1 - threshold)):
                found.mark, found.worse = loss, 0
            else:
                found.worse += 1
        if judging.keeping or (judging.stopping and found.best is not None and found.best[0] == step):
            self._keep(step, save)
        if judging.stopping and found.worse >= judging.stopping[0]:
            return (
                f"the held-out loss has not fallen by {100 * judging.stopping[1]:g} % in {found.worse} evaluations, "
                f"and was least after step {found.best[0] if found.best else step}"
            )
        return None

    @property
    def goes_by_best(self) -> bool:
        """Whether the best adapters are what is saved in the end."""
        return self._judging.stopping is not None

    def put_best(self, model: PeftModel) -> int | None:
        """The best adapters in place of the last ones, where training goes by that; gives their step."""
        best = self.judged.best
        if not self.goes_by_best or best is None or best[0] not in self.judged.kept:
            return None
        set_peft_model_state_dict(model, load_peft_weights(str(self._place(best[0])), device="cpu"))
        return best[0]

    def _place(self, step: int) -> Path:
        return self._folder / f"step-{step}"

    def _keep(self, step: int, save: Callable[[Path], None]) -> None:
        """Write adapters down whole, then delete what is neither the best nor new enough nor within the bytes."""
        found, half = self.judged, self._folder / ".being-written"
        try:
            shutil.rmtree(half, ignore_errors=True)
            self._folder.mkdir(parents=True, exist_ok=True)
            save(half)
            shutil.rmtree(self._place(step), ignore_errors=True)
            half.rename(self._place(step))
        except OSError as error:
            why = f"cannot be written: {error.strerror or error}."
            raise PlanError(f"checkpoint {self._place(step)}", why, "Free some of the disk, and --resume.") from error
        found.kept.append(step)
        newest, most = self._judging.keeping or (0, 0)
        best = found.best[0] if found.best else None
        keep = {*found.kept[max(0, len(found.kept) - newest) :]} if newest else set()
        if best in found.kept:
            keep.add(best)
        size = _bytes_of(self._place(step))
        while most and len(keep) * size > most and len(keep) > 1:
            keep.remove(min(each for each in keep if each != best))
        self._drop_all_but(keep)

    def _drop_all_but(self, keep: set[int]) -> None:
        if self._folder.is_dir():
            ours = [place for place in self._folder.iterdir() if OURS.fullmatch(place.name)]
            for place in ours:
                if place.name not in {f"step-{step}" for step in keep}:
                    shutil.rmtree(place, ignore_errors=True)
        self.judged.kept = [step for step in self.judged.kept if step in keep]

    def told(self) -> str:
        """What is kept, in words; empty where nothing is."""
        kept = self.judged.kept
        if not kept:
            return ""
        size = sum(_bytes_of(self._place(step)) for step in kept)
        return f"Checkpoints: {self._folder}, after steps {', '.join(map(str, kept))} ({format_bytes(size)})"


def _bytes_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir() if file.is_file())
