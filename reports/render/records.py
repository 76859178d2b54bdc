"""The records that are committed here, and what is said of them beyond what is said of anyone's."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from planner import measurements
from planner.measurements import Failure, Spread, read_failures, read_records, step_ratios

__all__ = ["Failure", "Record", "failures", "on_cards", "over_bound", "records", "step_ratios", "summary"]

FOLDER = Path(__file__).resolve().parents[1] / "validation"
DEMO = FOLDER / "demo-cpu.json"
CARDS = FOLDER / "cards"  # cards that runs are held to, which are no card of anyone's


def card_named(card: str) -> str:
    """What `--gpu` finds a record's card by: its file beside the records, or the id of one that comes along."""
    own = CARDS / f"{card}.yaml"
    return str(own) if own.is_file() else card


class Record(measurements.Record):
    """One of these runs."""

    @property
    def case(self) -> str:
        """The name without the card, which nearly every row of a table shares, and how much of the model ran."""
        run, layers = self.content["layers_run"], self.content["layers"]
        return self.name.removeprefix("h200-") + ("" if run == layers else f" ({run} of {layers} layers)")

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


def records(folder: Path = FOLDER) -> tuple[Record, ...]:
    """Every record, by model and length."""
    return tuple(Record(each.name, each.content) for each in read_records(folder))


def failures(folder: Path = FOLDER) -> tuple[Failure, ...]:
    """Every run that gave no record."""
    return read_failures(folder)


def on_cards(found: Sequence[Record]) -> tuple[Record, ...]:
    """Those of runs on a graphics card."""
    return tuple(record for record in found if record.content["environment"]["gpu"])


def summary(found: Sequence[measurements.Record]) -> Spread:
    """How far the predicted peaks of at least one record were off."""
    spread = Spread.of([(record.expected, record.allocated) for record in found])
    assert spread is not None, "there is no record"
    return spread


def over_bound(found: Sequence[measurements.Record]) -> int:
    """How many runs reserved more than the plan's bound."""
    return sum(record.over > 0 for record in found)
