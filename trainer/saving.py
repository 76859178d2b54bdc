"""What a run needs to go on where it was stopped: between two steps, or between two layers of a backward pass.

Two files in the run's folder. ``state.pt`` holds adapters, optimiser, schedule, loss scale and random states as they
are between steps, and of a step that is under way the gradients so far, the micro-batch and the layer. The gradient
stream, which is as long as the sequence, lies beside it. Both are written under another name and then renamed, the
stream first, so that ``state.pt`` is always whole and always names a stream that is.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from planner.errors import PlanError
from planner.optimizations import later_knobs
from planner.plan import Plan
from planner.plan_file import load_plan
from planner.units import format_bytes
from trainer.built import BuiltRun
from trainer.data import AnyRow
from trainer.stored_files import put_state, put_stream, read_stream, write_synced
from trainer.streamed.loss import Halfway

FOLDER, STATE = "unfinished", "state.pt"
FORMAT = 1
BETWEEN = ("trained", "optimizer", "schedule", "scaler", "averages", "random")
"""Of what is stored, that which `between_steps` gives."""


@dataclass(frozen=True)
class Inside:
    """A step that is under way.

    Attributes:
        part: the micro-batch to go on with; ``layer``: the next to go back through, None: its forward pass is next.
        total: loss of the micro-batches before it; ``loss``: its own, where a layer is given.
        seconds: that the step has taken.
        gradients: of the adapters, so far.
        stream: file of the gradient of what that layer gives.
    """

    part: int
    layer: int | None
    total: Tensor
    loss: Tensor | None
    seconds: float
    gradients: Sequence[Tensor]
    stream: str | None


@dataclass(frozen=True)
class Saved:
    """What was stored of a run.

    Attributes:
        folder: that it lies in.
        step: steps that are done; ``inside``: of the next one, what is done.
        skips: the last steps, all without an update.
        rows: digest of what is trained on.
        about: what else the run wants to know again.
        elsewhere: whether it was another plan's, which had too little memory.
    """

    folder: Path
    step: int
    inside: Inside | None
    skips: int
    rows: str
    about: dict[str, Any]
    state: dict[str, Any]
    elsewhere: bool = False

    @property
    def where(self) -> str:
        """From where it goes on, in words."""
        return place(self.step, self.inside)

    def restore(self, built: BuiltRun) -> None:
        """Adapters, their gradients, optimiser, loss scale and random states as they were."""
        gradients = self.inside.gradients if self.inside else [None] * len(built.trained)
        with torch.no_grad():
            for parameter, value, gradient in zip(built.trained, self.state["trained"], gradients, strict=True):
                parameter.copy_(value)
                if gradient is not None:
                    assert parameter.grad is not None
                    parameter.grad.copy_(gradient)
        built.optimizer.load_state_dict(self.state["optimizer"])
        if built.scaler is not None:
            built.scaler.load_state_dict(self.state["scaler"])
        if built.averages is not None:
            built.averages.restore(self.state["averages"])
        torch.set_rng_state(self.state["random"]["cpu"])
        if built.device.type == "cuda":
            torch.cuda.set_rng_state(self.state["random"]["card"], built.device)

    def replanned(self, why: str, plan: Plan) -> None:
        """Note that so far it was this plan's, and why it is no longer."""
        beginning = self.about["beginning"]
        noted = {"steps": self.step, "why": why, "high_bytes": plan.memory.gpu.peak_bytes.high}
        beginning["replanned"] = [*beginning.get("replanned", ()), noted]

    def halfway(self, device: torch.device) -> Halfway | None:
        """The backward pass to go on with; None: none was under way."""
        inside = self.inside
        if inside is None or inside.layer is None:
            return None
        assert inside.loss is not None and inside.stream is not None
        file = self.folder / inside.stream
        return Halfway(inside.layer, inside.loss.to(device), lambda stream: read_stream(file, stream))


def place(step: int, inside: Inside | None) -> str:
    """A place in a run in words; ``step``: steps that are done."""
    if inside is None:
        return f"after step {step}"
    layer = f", layer {inside.layer + 1} backward" if inside.layer is not None else ""
    return f"in step {step + 1}, micro-batch {inside.part + 1}{layer}"


def load(out: Path, plan: Plan) -> Saved:
    """What a run in this folder stored.

    Raises:
        PlanError: nothing usable is there, or it is of another plan.
    """
    asked, folder = f"--resume with output folder {out}", out / FOLDER
    nearest = "Without --resume, and with another folder (--set train.out=…), the run starts from its first step."
    if not (folder / STATE).is_file():
        if (out / "measurement.json").is_file():
            raise PlanError(asked, "the run there is complete.", nearest)
        why = "nothing is stored there to go on from; --set train.save_minutes=15 stores it while a run is under way."
        raise PlanError(asked, why, nearest)
    try:
        state = torch.load(folder / STATE, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises what it meets: of pickle, of zip files, of the system
        raise PlanError(asked, f"{folder / STATE} cannot be read ({str(error).splitlines()[0]}).", nearest) from error
    if state.get("format") != FORMAT:
        raise PlanError(asked, "another version of tierplan stored it.", nearest)
    if state["plan"] != fingerprint(plan):
        why = "it was stored by a run of another plan."
        raise PlanError(asked, why, f"`plan --plan {_plan_of(state, out)} --execute --resume` goes on with that one.")
    inside = None if state["inside"] is None else Inside(**state["inside"])
    if inside is not None and inside.stream is not None and not (folder / inside.stream).is_file():
        raise PlanError(asked, f"{inside.stream} is missing beside {STATE}.", nearest)
    return Saved(folder, state["step"], inside, state["skips"], state["rows"], json.loads(state["about"]), state)


def _plan_of(state: dict[str, Any], out: Path) -> Path:
    """The file of the plan that was stored for: of a run that was planned again, it may be the one until then."""
    for file in sorted(out.glob("plan-until-step-*.yaml")):
        with suppress(PlanError):
            if fingerprint(load_plan(file)) == state["plan"]:
                return file
    return out / "plan.yaml"


def fingerprint(plan: Plan) -> str:
    """Digest of all that a run goes by, and neither of how it was asked for nor of where its scratch lies."""
    document = plan.model_copy(
        update={
            "provenance": plan.provenance.model_copy(update={"command": ""}),
            "train": plan.train.model_copy(update={"scratch": ""}),
        }
    )
    said = document.document()
    if said["time"]["step_seconds"]["on_card"] is None:  # a plan of before does not tell it
        del said["time"]["step_seconds"]["on_card"]
    if not said["train"]["evaluate_every"]:  # neither does it tell of this
        del said["train"]["evaluate_every"]
    for choice in said["choices"]:  # nor of knobs that there were not, which it has as everything was then
        before = later_knobs(choice["id"])
        choice["knobs"] = {
            name: value for name, value in choice["knobs"].items() if name not in before or value != before[name]
        }
    return hashlib.sha256(json.dumps(said, indent=2, ensure_ascii=False).encode()).hexdigest()


def digest(rows: Sequence[AnyRow]) -> str:
    """Digest of rows in their order: batches follow from them and the seed."""
    found = hashlib.sha256()
    for row in rows:
        found.update(f"{len(row.pieces)} pieces:".encode())
        for piece in row.pieces:
            found.update(f"{piece.inputs}/{piece.trained}:".encode())
            found.update(piece.tokens.contiguous().numpy().tobytes())
    return found.hexdigest()


def between_steps(built: BuiltRun, schedule: LambdaLR) -> dict[str, Any]:
    """Adapters, optimiser, schedule, loss scale, averages and random states: what `Saved.restore` puts back."""
    cuda = built.device.type == "cuda"
    return {
        "trained": [parameter.detach() for parameter in built.trained],
        "optimizer": built.optimizer.state_dict(),
        "schedule": schedule.state_dict(),
        "scaler": built.scaler.state_dict() if built.scaler is not None else None,
        "averages": built.averages.state() if built.averages is not None else None,
        "random": {
            "cpu": torch.get_rng_state(),
            "card": torch.cuda.get_rng_state(built.device) if cuda else None,
        },
    }


def store(saved: Saved, plan: Plan) -> None:
    """Store what a run had done between two steps, in its folder, after what it was built of is gone.

    Raises:
        PlanError: the disk does not take it.
    """
    state = {
        "format": FORMAT,
        "plan": fingerprint(plan),
        "rows": saved.rows,
        "step": saved.step,
        "skips": saved.skips,
        "about": json.dumps(saved.about),
        "inside": None,
        **{name: saved.state[name] for name in BETWEEN},
    }
    try:
        saved.folder.mkdir(exist_ok=True)
        write_synced(saved.folder / STATE, lambda file: put_state(state, file))
    except OSError as error:
        why = f"could not be stored ({error.strerror or error})."
        raise PlanError(f"the run after step {saved.step}", why) from error


class Saver:
    """Stores a run while it is under way: at once when it begins, then no more often than every so many minutes.

    Args:
        out: the run's folder.
        rows: `digest` of what is trained on.
        about: asked at each time for what else is to be stored: numbers, texts, lists and dictionaries of them.
        tell: hears of a time when it could not be stored; the run goes on, and what was stored before stays.

    Attributes:
        where: from where a run would go on that is stopped now, in words.
    """

    def __init__(
        self,
        out: Path,
        plan: Plan,
        built: BuiltRun,
        rows: str,
        about: Callable[[], dict[str, Any]],
        tell: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._folder, self._plan, self._built, self._rows = out / FOLDER, plan, built, rows
        self._about, self._tell, self._clock = about, tell, clock
        self._every, self._last = plan.train.save_minutes * 60, clock()
        self._step, self._skips, self._began = 0, 0, time.perf_counter()
        self._schedule: LambdaLR | None = None
        self.where = ""
        self._part, self._total, self._loss = 0, torch.zeros(()), torch.zeros(())
        if built.streamed is not None:
            built.streamed.after_layer = self._after_layer

    def check_room(self, terms: Mapping[str, int]) -> None:
        """Is there room on the disk? ``terms``: bytes of adapters, gradients and optimiser state.

        Raises:
            PlanError: no; twice the bytes are needed, as what was stored before stays until the new is whole.
        """
        stream = 0
        if self._built.streamed is not None:
            sizes = self._built.streamed.layers.sizes
            stream = sizes.tokens * sizes.width * sizes.dtype.itemsize
        averages = self._built.averages.tensors if self._built.averages is not None else []
        kept = sum(terms[group] for group in ("adapters", "gradients", "optimizer"))
        needed = 2 * (stream + kept + sum(average.nbytes for average in averages))
        place = next(each for each in [self._folder.absolute(), *self._folder.absolute().parents] if each.exists())
        free = shutil.disk_usage(place).free
        if free < needed:
            asked = f"train.save_minutes {self._plan.train.save_minutes:g}"
            why = (
                f"takes up to {format_bytes(needed)} on disk while a step is stored, and {format_bytes(free)} are free."
            )
            raise PlanError(asked, why, "Free some, or store nothing: --set train.save_minutes=0.")

    def begin(self, schedule: LambdaLR, step: int, skips: int, saved: Saved | None) -> None:
        """Training begins, which is stored at once, or goes on with what was stored after so many steps."""
        self._schedule = schedule
        self._step, self._skips = step, skips
        if saved is None or saved.elsewhere:
            self.save()  # what another plan stored is of no use any more
        else:
            self.where = saved.where

    def step_begins(self, began: float) -> None:
        """The next step is under way, since this moment of ``time.perf_counter``."""
        self._began, self._part = began, 0

    def step_done(self, step: int, skips: int) -> None:
        """A step is done, and what there is to tell of it is written down."""
        self._step, self._skips = step, skips
        if self._due():
            self.save()

    def part_begins(self, part: int, total: Tensor, loss: Tensor) -> None:
        """A micro-batch goes backward; ``total``: loss of those before it."""
        self._part, self._total, self._loss = part, total, loss

    def part_done(self, part: int, total: Tensor) -> None:
        """A micro-batch is done, and another follows."""
        if self._due():
            self.save(Inside(part + 1, None, total, None, self._seconds(), self._gradients(), None))

    def _after_layer(self, layer: int) -> None:
        if layer > 0 and self._schedule is not None and self._due():
            where = (self._part, layer - 1, self._total, self._loss, self._seconds(), self._gradients())
            self.save(Inside(*where, f"stream-{self._step + 1}-{self._part}-{layer - 1}.bin"))

    def _due(self) -> bool:
        return self._clock() - self._last >= self._every

    def _seconds(self) -> float:
        return time.perf_counter() - self._began

    def _gradients(self) -> list[Tensor]:
        return [parameter.grad for parameter in self._built.trained if parameter.grad is not None]

    def finish(self) -> None:
        """The run is complete, and nothing is left to go on with."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def save(self, inside: Inside | None = None) -> None:
        """Store everything now."""
        built, cuda = self._built, self._built.device.type == "cuda"
        assert self._schedule is not None
        state = {
            "format": FORMAT,
            "plan": fingerprint(self._plan),
            "rows": self._rows,
            "step": self._step,
            "skips": self._skips,
            "about": json.dumps(self._about()),
            "inside": None if inside is None else vars(inside) | {"gradients": list(inside.gradients)},
            **between_steps(built, self._schedule),
        }
        try:
            self._folder.mkdir(exist_ok=True)
            if inside is not None and inside.stream is not None:
                assert built.streamed is not None
                layers = built.streamed.layers
                layers.transfers.arrive()
                if cuda:
                    torch.cuda.synchronize(built.device)
                stream, tokens = layers.arrays.stream, len(layers.row)
                write_synced(self._folder / inside.stream, lambda file: put_stream(file, stream, tokens))
            write_synced(self._folder / STATE, lambda file: put_state(state, file))
            keep = {STATE, inside.stream if inside is not None else None}
            for other in self._folder.iterdir():
                if other.name not in keep:
                    other.unlink()
            self.where = place(self._step, inside)
        except OSError as error:
            self._tell(f"The run could not be stored ({error.strerror or error}); what was stored before stays.")
        self._last = self._clock()
