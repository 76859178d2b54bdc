"""Records of measured runs, one JSON document each, and what can be said of several together.

``trainer.record`` writes them; reading one needs nothing but this.
"""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from planner.errors import PlanError
from planner.units import parse_bytes

STANDING = ("weights", "adapters", "gradients", "optimizer")
"""Groups of terms that a run counts by name after a step."""


@dataclass(frozen=True)
class Record:
    """One measured run: the name of its file, and the file's content."""

    name: str
    content: dict[str, Any]

    @property
    def tokens(self) -> int:
        """Tokens of one sequence."""
        return int(self.content["total_tokens"])

    @property
    def predicted(self) -> dict[str, int]:
        """``low_bytes``, ``expected_bytes`` and ``high_bytes`` as the plan had them before the run."""
        return dict(self.content["predicted"]["gpu"])

    @property
    def measured(self) -> dict[str, int | None]:
        """``allocated_bytes``, ``reserved_bytes`` and ``driver_bytes``; None where the machine does not tell."""
        return dict(self.content["measured"]["gpu"])

    @property
    def allocated(self) -> int:
        """Measured peak of what tensors took."""
        size = self.measured["allocated_bytes"]
        assert size is not None, f"{self.name} has no measured peak"
        return size

    @property
    def how(self) -> str:
        """``run``, ``rehearsed`` on another card, or ``counted``; before this was told, all were run."""
        return str(self.content.get("how", "run"))

    @property
    def expected(self) -> int:
        """The plan's expected peak; where bytes were counted, as much of it as can be seen so."""
        return int(self.content.get("counted", {}).get("expected_bytes", self.predicted["expected_bytes"]))

    @property
    def error(self) -> float:
        """By what share of the measured peak the prediction was off; negative where it was too small."""
        return self.expected / self.allocated - 1

    @property
    def held_to_bound(self) -> bool:
        """Whether the run had no more memory than its plan's bound."""
        return bool(self.content["limit_bytes"] <= self.predicted["high_bytes"])

    @property
    def reserved(self) -> int:
        """What the bound has to hold: the reserved peak, or the allocated one where nothing reserves."""
        reserved = self.measured["reserved_bytes"]
        return self.allocated if reserved is None else reserved

    @property
    def over(self) -> int:
        """Bytes by which the run went over the plan's bound; negative where it stayed below.

        What counting does not see is taken to be what the plan says of it.
        """
        return self.reserved + self.predicted["expected_bytes"] - self.expected - self.predicted["high_bytes"]

    @property
    def before_held(self) -> dict[str, Any] | None:
        """Of steps that had the card's whole budget, before the rest was held to the bound; None if none had it.

        ``steps``: how many; ``reserved_bytes``, ``driver_bytes`` and ``retries`` are of these. What is measured besides
        is of the rest, but for seconds, which are of these alone, and for peaks of tensors, which are of all steps.
        """
        found = self.content["measured"].get("before_held")
        return dict(found) if found else None

    @property
    def over_before_held(self) -> int | None:
        """Bytes that the allocator took above the bound while it had the whole budget; negative where it stayed below.

        None where no step had it, or nothing reserves.
        """
        before = self.before_held
        if before is None or before["reserved_bytes"] is None:
            return None
        return int(before["reserved_bytes"]) - self.predicted["high_bytes"]

    @property
    def context(self) -> int | None:
        """What the driver counted beyond the reserved peak; None where it does not tell."""
        driver = self.measured["driver_bytes"]
        return None if driver is None else driver - self.reserved

    @property
    def host_measured(self) -> int:
        """Host memory, pinned and anonymous together; where bytes were counted, pinned alone."""
        host = self.content["measured"]["host"]
        return int(host["anonymous_bytes"] or 0) + int(host["pinned_bytes"])

    @property
    def host_over(self) -> int:
        """Bytes by which host memory went over what the plan had for it; negative where it stayed below."""
        return self.host_measured - int(self.content["predicted"]["host"]["peak_bytes"])

    @property
    def within(self) -> bool:
        """Whether card and host held as much as was planned at most."""
        return self.over <= 0 and self.host_over <= 0

    @property
    def step(self) -> tuple[float | None, float | None]:
        """Seconds of the median step, measured and as the plan estimated them; of a part of a model no estimate is."""
        whole = self.content["layers_run"] == self.content["layers"]
        estimate = self.content["predicted"]["step_seconds"]
        return self.content["step_seconds"]["median"], estimate if whole else None

    @property
    def retries(self) -> int:
        """How often the allocator gave memory back at its limit and asked again; 0 where there is none to ask."""
        return int((self.content["environment"].get("allocator") or {}).get("retries") or 0)

    @property
    def alone(self) -> bool:
        """Whether its seconds are its own: of the planned card, and no other run shared that card meanwhile."""
        return self.how == "run" and not self.content.get("beside")

    @property
    def shows_the_peak(self) -> bool:
        """Whether enough ran for the peak: of layers that run one by one two, as one fetches what the next needs."""
        return bool(self.content["layers_run"] >= min(2, self.content["layers"]))

    @property
    def standing(self) -> dict[str, tuple[int, int]]:
        """By group of terms that stay from step to step, bytes as planned and as counted on the card after a step."""
        terms = self.content["plan"]["memory"]["gpu"].get("phases", {}).get("optimizer", {})
        planned = {
            group: sum(size for name, size in terms.items() if name.partition("/")[0] == group) for group in STANDING
        }
        planned["weights"] += terms.get("buffers/weights", 0)  # where weights in host memory lie meanwhile
        found = self.content["measured"].get("terms", {})
        return {group: (size, found[group]) for group, size in planned.items() if group in found}

    @property
    def phases(self) -> dict[str, tuple[int, int]]:
        """By phase, the peak as planned and as measured."""
        planned, found = (self.content[side].get("phases", {}) for side in ("predicted", "measured"))
        return {name: (size, found[name]["allocated_bytes"]) for name, size in planned.items() if name in found}

    @property
    def machine(self) -> str:
        """Machine and versions, in one line."""
        found = self.content["environment"]
        gpu, packages = found["gpu"], found["packages"]
        device = f"{gpu['name']}, driver {gpu['driver']}, CUDA {gpu['cuda']}" if gpu else f"CPU: {found['cpu']}"
        names = ("torch", "transformers", "peft", "bitsandbytes")
        versions = ", ".join(f"{name} {packages[name]}" for name in names if packages.get(name))
        return f"{device}; Python {found['python']}, {versions}"


@dataclass(frozen=True)
class Failure:
    """A run that gave no record, and the last line it wrote."""

    name: str
    told: str

    @property
    def out_of_memory(self) -> bool:
        """Whether it had too little of the card's memory: its bound was too low."""
        return "out of memory" in self.told and not self.held_to_less

    @property
    def held_to_less(self) -> bool:
        """Whether it was held to less than its bound, to see whether it goes without more: that it ended says nothing.

        Read from what `trainer.out_of_memory` tells of it, in sizes that are rounded for people.
        """
        found = _HELD.search(self.told)
        return found is not None and parse_bytes(found["allowed"]) < parse_bytes(found["bound"])


def read_records(folder: Path) -> tuple[Record, ...]:
    """Every record in a folder, by the model's name and length.

    Raises:
        PlanError: a file is no record of a run.
    """
    found = [read_record(path) for path in sorted(folder.glob("*.json"))]
    return tuple(sorted(found, key=lambda one: (one.content["model"]["id"], one.tokens, one.name)))


NEEDED = (
    "model.id",
    "card",
    "executor",
    "total_tokens",
    "limit_bytes",
    "layers",
    "layers_run",
    "plan.gpu",
    "plan.model",
    "plan.memory.gpu.peak_bytes",
    "plan.memory.host.peak_bytes",
    "predicted.gpu.expected_bytes",
    "predicted.gpu.high_bytes",
    "predicted.host.peak_bytes",
    "predicted.host.pinned_bytes",
    "predicted.step_seconds",
    "measured.gpu.allocated_bytes",
    "measured.gpu.reserved_bytes",
    "measured.gpu.driver_bytes",
    "measured.host.anonymous_bytes",
    "measured.host.pinned_bytes",
    "step_seconds.median",
    "environment.packages",
    "environment.gpu",
)
"""What every record has, though it may be null."""


def read_record(path: Path) -> Record:
    """One record.

    Raises:
        PlanError: the file is no record of a run.
    """
    nearest = "`plan validate` writes such records, and so does a run, as measurement.json."
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise PlanError(str(path), f"cannot be read: {error}.", nearest) from error
    if lacking := [name for name in NEEDED if not _has(content, name.split("."))]:
        raise PlanError(str(path), f"is no record of a run: it has no {lacking[0]}.", nearest)
    if not isinstance(content["measured"]["gpu"]["allocated_bytes"], int):
        raise PlanError(str(path), "is the record of a run that ended before anything was measured.", nearest)
    return Record(path.stem, content)


def _has(content: object, names: Sequence[str]) -> bool:
    for name in names:
        if not isinstance(content, dict) or name not in content:
            return False
        content = content[name]
    return True


_SIZE = r"[\d,.]+ (?:[KMGT]iB|B)"
_HELD = re.compile(rf"the plan's bound is (?P<bound>{_SIZE}): .* of (?P<allowed>{_SIZE}) allowed\.")


def read_failures(folder: Path) -> tuple[Failure, ...]:
    """Every run that gave no record."""
    return tuple(
        Failure(path.name.removesuffix(".failed.txt"), told(path.read_text(encoding="utf-8", errors="replace")))
        for path in sorted(folder.glob("*.failed.txt"))
    )


_CARD = re.compile(r" GPU \d+ has a total capacity of .*", re.DOTALL)


def told(output: str) -> str:
    """Of all that a run without a record said, what it said last: its mistakes, or one line.

    What torch tells of the whole card, and what it advises, is left out: a record's file has it.
    """
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [_CARD.sub("", line.removeprefix("error: ")) for line in lines if line.startswith("error: ")]
    return " ".join(errors) or (lines[-1] if lines else "it said nothing")


@dataclass(frozen=True)
class Spread:
    """How far predictions were off, as shares of what was measured.

    Attributes:
        count: of how many runs; ``under``: in how many of them more was measured than predicted.
        median, percentile_95, largest: of the errors without their sign; the 95th by nearest rank.
    """

    count: int
    under: int
    median: float
    percentile_95: float
    largest: float

    @classmethod
    def of(cls, pairs: Sequence[tuple[float, float]]) -> Spread | None:
        """Of pairs of what was predicted and what was measured; None of no pair."""
        if not pairs:
            return None
        errors = sorted(abs(predicted / measured - 1) for predicted, measured in pairs)
        return cls(
            count=len(errors),
            under=sum(predicted < measured for predicted, measured in pairs),
            median=statistics.median(errors),
            percentile_95=errors[math.ceil(0.95 * len(errors)) - 1],
            largest=errors[-1],
        )


def step_ratios(found: Sequence[Record]) -> list[float]:
    """Measured over estimated seconds of a step, smallest first, where both are known."""
    pairs = [record.step for record in found]
    return sorted(measured / estimated for measured, estimated in pairs if measured and estimated)
