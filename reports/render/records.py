"""The committed records of measured runs, and what can be said of all of them together."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parents[1] / "validation"
DEMO = FOLDER / "demo-cpu.json"
CARDS = FOLDER / "cards"  # cards that runs are held to, which are no card of anyone's


def card_named(card: str) -> str:
    """What `--gpu` finds a record's card by: its file beside the records, or the id of one that comes along."""
    own = CARDS / f"{card}.yaml"
    return str(own) if own.is_file() else card


@dataclass(frozen=True)
class Record:
    """One measured run: the name of its file, and the file's content."""

    name: str
    content: dict[str, Any]

    @property
    def case(self) -> str:
        """The name without the card, which nearly every row of a table shares, and how much of the model ran."""
        run, layers = self.content["layers_run"], self.content["layers"]
        return self.name.removeprefix("h200-") + ("" if run == layers else f" ({run} of {layers} layers)")

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
    def error(self) -> float:
        """By what share of the measured peak the prediction was off; negative where it was too small."""
        return self.predicted["expected_bytes"] / self.allocated - 1

    @property
    def error_today(self) -> float:
        """The same for what is planned today with the record's own settings: formulas improve after a run."""
        from planner.cli_check import same_settings
        from planner.plan import Plan
        from planner.planning import make_plan

        plan = Plan.model_validate_json(json.dumps(self.content["plan"]))
        return (
            make_plan(same_settings(plan, card_named(plan.gpu.id))).memory.gpu.peak_bytes.expected / self.allocated - 1
        )

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
        """Bytes by which the run went over the plan's bound; negative where it stayed below."""
        return self.reserved - self.predicted["high_bytes"]

    @property
    def context(self) -> int | None:
        """What the driver counted beyond the reserved peak; None where it does not tell."""
        driver = self.measured["driver_bytes"]
        return None if driver is None else driver - self.reserved

    @property
    def host_measured(self) -> int:
        """Host memory, pinned and anonymous together."""
        host = self.content["measured"]["host"]
        return int(host["anonymous_bytes"]) + int(host["pinned_bytes"])

    @property
    def host_over(self) -> int:
        """Bytes by which host memory went over what the plan had for it; negative where it stayed below."""
        return self.host_measured - int(self.content["predicted"]["host"]["peak_bytes"])

    @property
    def step(self) -> tuple[float | None, float | None]:
        """Seconds of the median step, measured and as the plan estimated them; of a part of a model no estimate is."""
        whole = self.content["layers_run"] == self.content["layers"]
        estimate = self.content["predicted"]["step_seconds"]
        return self.content["step_seconds"]["median"], estimate if whole else None

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


def records(folder: Path = FOLDER) -> tuple[Record, ...]:
    """Every record, by model and length."""
    found = [Record(path.stem, json.loads(path.read_text(encoding="utf-8"))) for path in sorted(folder.glob("*.json"))]
    return tuple(sorted(found, key=lambda one: (one.content["model"]["id"], one.tokens, one.name)))


def on_cards(found: Sequence[Record]) -> tuple[Record, ...]:
    """Those of runs on a graphics card."""
    return tuple(record for record in found if record.content["environment"]["gpu"])


def failures(folder: Path = FOLDER) -> tuple[Failure, ...]:
    """Every run that gave no record."""
    texts = {path: path.read_text(encoding="utf-8").strip() for path in sorted(folder.glob("*.failed.txt"))}
    return tuple(
        Failure(path.name.removesuffix(".failed.txt"), text.splitlines()[-1] if text else "it said nothing")
        for path, text in texts.items()
    )


@dataclass(frozen=True)
class Summary:
    """Errors of the predicted against the allocated peak, in absolute value, and counts.

    Attributes:
        percentile_95: the least error that 95 of 100 runs do not exceed (nearest rank).
        under: runs that took more than was predicted.
        over_bound: runs that reserved more than the plan's bound.
    """

    runs: int
    median: float
    percentile_95: float
    largest: float
    under: int
    over_bound: int


def summary(found: Sequence[Record]) -> Summary:
    """What can be said of at least one record."""
    errors = sorted(abs(record.error) for record in found)
    return Summary(
        runs=len(errors),
        median=statistics.median(errors),
        percentile_95=errors[math.ceil(0.95 * len(errors)) - 1],
        largest=errors[-1],
        under=sum(record.error < 0 for record in found),
        over_bound=sum(record.over > 0 for record in found),
    )


def step_ratios(found: Sequence[Record]) -> list[float]:
    """Measured over estimated seconds of a step, smallest first, where both are known."""
    pairs = [record.step for record in found]
    return sorted(measured / estimated for measured, estimated in pairs if measured and estimated)
