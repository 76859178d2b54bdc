"""The folder of a run: refused if it is in use, checked for room, and no file in it is ever half there."""

from __future__ import annotations

import json
import math
import os
import shutil
from copy import copy
from pathlib import Path
from typing import Any, get_args

from planner.errors import PlanError
from planner.plan import Plan
from planner.rope_scaling import rope_told
from planner.session import Schedule
from planner.units import MIB, format_bytes
from trainer.built import BuiltRun
from trainer.optimizers import rates_told

_LOGS = 64 * MIB  # tokenizer, logs and records, generously


class RunFolder:
    """``plan.yaml``, ``metrics.jsonl``, ``measurement.json``, ``tensorboard/`` and ``adapter/`` of one run.

    Args:
        resume: the folder is that of a run that was stopped.

    Raises:
        PlanError: the folder holds something already, cannot be written, or lies on a disk without room; to resume in,
            it is none.
    """

    def __init__(self, plan: Plan, *, resume: bool = False) -> None:
        self._plan = plan
        self.path = Path(plan.train.out)
        self.rate: float | None = None  # the highest learning rate, where another was found than the plan's
        asked = f"output folder {self.path}"
        if resume:
            if not self.path.is_dir():
                raise PlanError(f"--resume with {asked}", "there is none.", "Without --resume the run begins.")
            return
        nearest = f"--set train.out={self.path}-2 names another, as train.out does in a plan file."
        if self.path.is_symlink() or (self.path.exists() and not self.path.is_dir()):
            raise PlanError(asked, "is something else than a folder.", nearest)
        if self.path.is_dir() and any(self.path.iterdir()):
            raise PlanError(asked, "is not empty, and nothing is overwritten.", nearest)
        place = next(parent for parent in [self.path.absolute(), *self.path.absolute().parents] if parent.exists())
        if not os.access(place, os.W_OK):
            raise PlanError(asked, f"cannot be made: {place} is not writable.", nearest)
        disk = plan.memory.disk  # what it trains with is asked for by ``trainer.disk_room``
        needed, free = sum(disk.terms.values()) - disk.training_bytes + _LOGS, shutil.disk_usage(place).free
        if free < needed:
            why = f"needs {format_bytes(needed)} on disk, and {format_bytes(free)} are free."
            raise PlanError(asked, why, "Free some, or name a folder on another disk with --set train.out=…")

    def begin(self) -> None:
        """Make the folder and put the plan into it."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._write("plan.yaml", self._plan.to_yaml())
        except OSError as error:
            raise PlanError(f"output folder {self.path}", f"cannot be written: {error.strerror}.") from error

    def replanned(self, plan: Plan, before: str | None) -> RunFolder:
        """The same folder for a plan that takes the place of the one there, which is kept under another name.

        Args:
            before: that name; None where training had not begun, so that there is no plan to keep.
        """
        folder = copy(self)
        folder._plan = plan
        if before is not None:
            try:
                if not (self.path / before).exists():  # else the plan that is there has trained nothing
                    self._write(before, (self.path / "plan.yaml").read_text(encoding="utf-8"))
            except OSError as error:
                raise PlanError(f"output folder {self.path}", f"cannot be written: {error.strerror}.") from error
            folder.begin()
        return folder

    def log(self, **values: Any) -> None:
        """One more line of ``metrics.jsonl``."""
        with (self.path / "metrics.jsonl").open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(finite(values)) + "\n")

    def go_back_to(self, step: int) -> list[dict[str, Any]]:
        """The lines of ``metrics.jsonl`` up to a step; what was logged after it is dropped, also from the file."""
        kept = []
        try:
            text = (self.path / "metrics.jsonl").read_text(encoding="utf-8")
        except OSError as error:
            if step == 0 and isinstance(error, FileNotFoundError):
                return []  # nothing was done, and nothing was there to be judged before
            raise PlanError(f"--resume with output folder {self.path}", f"metrics.jsonl: {error.strerror}.") from error
        for line in text.splitlines(keepends=True):
            if not line.endswith("\n"):
                break  # it was being written when the run was stopped
            values = json.loads(line)
            if values.get("step", 0) <= step and values.get("evaluation") != "after":
                kept.append(values)
        self._write("metrics.jsonl", "".join(json.dumps(values) + "\n" for values in kept))
        return kept

    def save_adapter(self, built: BuiltRun, step: int) -> Path:
        """Write the adapter, a PEFT folder with tokenizer and model card; an older one is replaced whole.

        Where the plan scales the rotary embedding, the base's config with that scaling lies beside it.
        """
        final, made = self.path / "adapter", self.path / ".adapter-being-written"
        shutil.rmtree(made, ignore_errors=True)
        self.write_adapter(built, step, made)
        if built.tokenizer is not None:
            built.tokenizer.save_pretrained(made)
        old = self.path / ".adapter-old"
        if final.exists():
            final.rename(old)
        made.rename(final)
        shutil.rmtree(old, ignore_errors=True)
        return final

    def write_adapter(self, built: BuiltRun, step: int, made: Path) -> None:
        """Write the adapter as it is now, without the tokenizer, into a folder that is not there yet."""
        # PEFT would otherwise ask the hub whether the vocabulary grew; it is never trained here.
        built.model.save_pretrained(str(made), safe_serialization=True, save_embedding_layers=False)
        if self._plan.rope.scaling != "none":
            built.config.save_pretrained(made)
        (made / "README.md").write_text(self._card(step, ""), encoding="utf-8")

    def complete_card(self, step: int, held_out: str) -> None:
        """Write the model card again, with what the evaluation gave."""
        self._write("adapter/README.md", self._card(step, held_out))

    def save_picture(self, name: str, drawn: str) -> None:
        """Write a picture."""
        self._write(name, drawn)

    def _card(self, step: int, held_out: str) -> str:
        return _card(self._plan, step, held_out, self.rate)

    def save_record(self, record: dict[str, Any]) -> Path:
        """Write ``measurement.json``."""
        self._write("measurement.json", json.dumps(finite(record), indent=2, ensure_ascii=False) + "\n")
        return self.path / "measurement.json"

    def _write(self, name: str, text: str) -> None:
        final = self.path / name
        half = final.with_name(f".{final.name}.being-written")
        half.write_text(text, encoding="utf-8")
        half.replace(final)


def finite(values: Any) -> Any:
    """The same with null for what is no number, which JSON has no word for."""
    if isinstance(values, dict):
        return {name: finite(value) for name, value in values.items()}
    if isinstance(values, list | tuple):
        return [finite(value) for value in values]
    return None if isinstance(values, float) and not math.isfinite(values) else values


def _card(plan: Plan, step: int, held_out: str, rate: float | None) -> str:
    train = plan.train
    choices = "\n".join(
        f"- {choice.id}" + "".join(f", {knob} {value}" for knob, value in choice.knobs.items())
        for choice in plan.choices
    )
    return f"""---
base_model: {json.dumps(plan.model.source, ensure_ascii=False)}
library_name: peft
pipeline_tag: text-generation
tags: [lora, tierplan]
---

# LoRA adapter for {plan.model.id}

Rank {plan.lora_rank} on every linear of every layer, trained for {step} steps on sequences of up to
{plan.total_tokens:,} tokens. {held_out}

| | |
|---|---|
| learning rate | {rates_told(plan, rate)}, {_schedule(plan)} |
| rows per step | {train.batch} × {train.accumulation} |
| seed | {train.seed} |
| planned for | {plan.gpu.name} |

What was switched on:

{choices}

{_how_to_load(plan)}

The context it was trained on is no promise of the context the model makes use of.
"""


def _schedule(plan: Plan) -> str:
    train, chosen = plan.train, [choice.id for choice in plan.choices if choice.id in get_args(Schedule)]
    warm_up = f", warm-up {train.warmup:g}"
    return (chosen[0] if chosen else train.schedule) + ("" if "one_cycle" in chosen else warm_up)


def _how_to_load(plan: Plan) -> str:
    if plan.rope.scaling == "none":
        return "Load it with `peft.PeftModel.from_pretrained(base_model, this_folder)`."
    return f"""The model was made for {plan.model.native_context:,} tokens. This adapter was trained with its rotary
embedding scaled by {rope_told(plan.rope)} and belongs to it: on the base model as it comes it computes something else.
`config.json` in this folder is the base model's with that scaling, and has to be handed over:

```python
config = transformers.AutoConfig.from_pretrained(this_folder)
base = transformers.AutoModelForCausalLM.from_pretrained(base_model, config=config)
model = peft.PeftModel.from_pretrained(base, this_folder)
```

A server that takes base and adapter apart has to be given the `rope_parameters` of that file."""
