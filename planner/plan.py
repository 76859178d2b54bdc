"""The plan: the one configuration of a run, complete, ordered for people, and strict.

``plan.yaml`` and ``--json`` are the same document. Every default is written out, a key that is not known is
refused, and equal inputs give equal bytes. ``planner.plan_file`` reads one back.
"""

from __future__ import annotations

import json
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationInfo, field_validator, model_validator

SCHEMA: Literal["tierplan/1"] = "tierplan/1"

Verdict = Literal["fits", "does-not-fit"]
Scalar = int | float | str | bool | None
Scaling = Literal["none", "linear", "dynamic", "yarn"]


class Strict(BaseModel):
    """A part of the plan: immutable, and without room for keys nobody reads."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Gpu(Strict):
    """The card that was planned for, as its profile gives it."""

    id: str
    name: str
    kind: Literal["gpu", "cpu"]
    compute_capability: str | None
    visible_bytes: int = Field(ge=0)
    context_bytes: int = Field(ge=0)
    context_basis: str
    measured_file: str | None = None
    """The profile that `plan measure` wrote and this plan rests on."""
    profile_file: str | None = None
    """The profile of the user's own that ``--gpu`` named, by which the card is found again."""


class Model(Strict):
    """The model that was planned for. ``source`` is what the trainer loads: a folder, a file or a hub id."""

    id: str
    source: str
    architecture: str
    parameters: int = Field(gt=0)
    layers: int = Field(gt=0)
    native_context: int = Field(gt=0)


class Choice(Strict):
    """An optimisation that is on, and why."""

    id: str
    reason: str
    knobs: dict[str, Scalar] = {}

    @field_validator("knobs")
    @classmethod
    def _later(cls, knobs: dict[str, Scalar], found: ValidationInfo) -> dict[str, Scalar]:
        from planner.optimizations import later_knobs  # here, as they know of plans

        return {**later_knobs(found.data.get("id", "")), **knobs}


ON_WHERE_ASKED = "on only where it is asked for"
"""How the reason begins why an optimisation is off that is on only where somebody asks for it."""


class Rejection(Strict):
    """An optimisation that is off, and why."""

    id: str
    reasons: list[str] = Field(min_length=1)


class Peak(Strict):
    """Peak bytes: the exact terms alone, what the allocator will hold, and the bound on what it reserves."""

    low: int = Field(ge=0)
    expected: int = Field(ge=0)
    high: int = Field(ge=0)


class GpuMemory(Strict):
    """Memory of the card: its budget, its peak, and every term alive in every phase."""

    budget_bytes: int
    peak_bytes: Peak
    peak_phase: str
    phases: dict[str, dict[str, int]]


class HostMemory(Strict):
    """Memory of the host: pinned and anonymous together.

    ``peak_bytes`` is a bound, and ``expected_bytes`` what a run is expected to take; plans from before have none.
    """

    budget_bytes: int = Field(ge=0)
    peak_bytes: int = Field(ge=0)
    expected_bytes: int | None = Field(default=None, ge=0)
    pinned_bytes: int = Field(ge=0)
    terms: dict[str, int]


class DiskMemory(Strict):
    """What a run puts on a disk: what it leaves there, and what lies there while it trains.

    ``budget_bytes`` is for the second alone, of which there are ``training_bytes``.
    """

    budget_bytes: int = Field(default=0, ge=0)
    training_bytes: int = Field(default=0, ge=0)
    peak_bytes: int = Field(default=0, ge=0)
    terms: dict[str, int] = {}


class Memory(Strict):
    """Memory by device."""

    gpu: GpuMemory
    host: HostMemory
    disk: DiskMemory = DiskMemory()


LAUNCH_BOUND = 0.9
"""A step waits for the host where the card alone would need less than this share of it."""


class Seconds(Strict):
    """A lower bound from peak rates, and an estimate; None where the card's rates are unknown.

    ``on_card`` is the estimate if launching kernels took the host no time: where it is much less, the step waits for
    the host. Plans of before have none.
    """

    bound: float | None
    estimate: float | None
    on_card: float | None = None

    @property
    def launch_bound(self) -> bool:
        """Whether the step is expected to wait for the host, which launches kernels more slowly than the card ends."""
        if self.estimate is None or self.on_card is None:
            return False
        return self.on_card < LAUNCH_BOUND * self.estimate


class PhaseWork(Strict):
    """One phase of an optimiser step: its expected time, its FLOPs, the bytes it moves each way and with a disk.

    ``kernels`` are those that the host launches; plans of before have none.
    """

    seconds: float | None
    flops: int = Field(ge=0)
    memory_bytes: int = Field(ge=0)
    to_host_bytes: int = Field(ge=0)
    to_device_bytes: int = Field(ge=0)
    disk_bytes: int = Field(default=0, ge=0)
    kernels: int = Field(default=0, ge=0)


class Rate(Strict):
    """What a kind of work is expected to reach, and how that is known.

    ``measured`` on this very machine, ``calibrated`` by runs on this kind of card, ``assumed`` otherwise.
    """

    per_second: float = Field(gt=0)
    unit: Literal["FLOP/s", "bytes/s", "kernels/s"]
    basis: Literal["measured", "calibrated", "assumed"]
    source: str


class Epoch(Strict):
    """The data once through.

    ``documents``, ``bytes`` and ``tokens`` are of all data; ``rows``, ``steps`` and ``hours`` of what is trained on,
    without evaluation. ``hours`` is None where the time of a step is unknown.
    """

    documents: int = Field(ge=1)
    validation_documents: int = Field(ge=0)
    bytes: int = Field(ge=1)
    tokens: int = Field(ge=0)
    tokens_basis: Literal["exact", "estimated"]
    rows: int = Field(ge=0)
    steps: int = Field(ge=0)
    hours: float | None
    basis: str


class Spending(Strict):
    """What something costs at the estimated time; None where a price or a power is not known.

    Attributes:
        kwh_at_most: energy of the card alone, were it at its rated power all the time.
        power_cost_at_most: that energy at the price of power.
        card_cost: the card's hours at their price.
    """

    kwh_at_most: float | None
    power_cost_at_most: float | None
    card_cost: float | None


class Cost(Strict):
    """Cost of a run, in whatever money the prices are given in."""

    price_per_hour: float | None = Field(default=None, ge=0)
    power_price_per_kwh: float | None = Field(default=None, ge=0)
    tdp_watts: float | None = Field(default=None, gt=0)
    step: Spending
    epoch: Spending | None = None
    basis: str


class Time(Strict):
    """Time of one optimiser step, of its phases, and of the data once through.

    Approximate: whether a step is within ``limit_seconds`` is judged without the optimiser's own milliseconds.
    """

    step_seconds: Seconds
    limit_seconds: float
    basis: str
    tokens_per_second: float | None = None
    phases: dict[str, PhaseWork] = {}
    rates: dict[str, Rate] = {}
    epoch: Epoch | None = None
    cost: Cost | None = None


class Stage(Strict):
    """One of the stages of a run whose rows grow, each of which has as many steps.

    Attributes:
        rows, total_tokens, target: its largest micro-batch: so many rows of as many tokens, ``target`` of each trained.
        peak_bytes: of the card; ``host_peak_bytes``: the bound for the host.
        step_seconds: the estimate for one step; None where the card's rates are unknown.
    """

    rows: int = Field(ge=1)
    total_tokens: int = Field(ge=1)
    target: int = Field(ge=1)
    peak_bytes: Peak
    host_peak_bytes: int = Field(ge=0)
    step_seconds: float | None


class Longest(Strict):
    """The longest sequence the card can train at the plan's rank with any valid set of optimisations.

    Once with as many trained tokens as the plan has, once with every token trained.
    """

    with_target: int | None
    all_trained: int | None


class Rope(Strict):
    """How positions are told apart.

    Attributes:
        model: kind of the model's own rotary embedding (``default``, ``llama3`` ...); ``none`` without one.
        scaling: what the plan puts on top of a ``default`` one; ``factor``: by how much, 1 for ``none``.
        parameters: what the model's ``rope_parameters`` get beside what they hold; empty for ``none``.
    """

    model: str = "default"
    scaling: Scaling = "none"
    factor: float = Field(default=1.0, ge=1, le=2**26)
    reason: str = ""
    parameters: dict[str, str | int | float] = {}


class Train(Strict):
    """Everything a run needs that is not memory."""

    data: str | None = None
    steps: int | None = Field(default=None, ge=1, le=1_000_000_000)
    epochs: float = Field(default=1.0, gt=0)
    batch: int = Field(default=1, ge=1, le=4096)
    lr: float = Field(default=2e-4, gt=0)
    warmup: float = Field(default=0.03, ge=0, lt=1)
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    weight_decay: float = Field(default=0.0, ge=0)
    max_grad_norm: float = Field(default=1.0, gt=0)
    accumulation: int = Field(default=1, ge=1, le=65_536)
    seed: int = Field(default=0, ge=0)
    validation: float = Field(default=0.1, ge=0, lt=1)
    evaluation_rows: int = Field(default=64, ge=1, le=1_000_000)
    evaluate_every: int = Field(default=0, ge=0, le=1_000_000_000)
    """Steps between two evaluations while it trains; 0: none, or ten where an optimisation goes by them."""
    save_minutes: float = Field(default=0.0, ge=0, le=100_000)
    """Minutes between two times that what `--resume` needs is stored, at the least; 0: never."""
    merge: bool = False
    """Whether a 16-bit model with the adapters merged into its weights is written beside them."""
    scratch: str = ""
    """The folder on whose disk lies what is there only while it trains; empty: that of ``out``."""
    out: str = "run"


class Provenance(Strict):
    """What the plan was made from, so that it can be made again and a change noticed."""

    tierplan: str
    command: str
    profile_sha256: str
    model_sha256: str
    calibration_sha256: str


class Plan(Strict):
    """A whole plan; see the module's docstring."""

    schema_: Literal["tierplan/1"] = Field(default=SCHEMA, alias="schema")
    verdict: Verdict
    summary: str
    gpu: Gpu
    model: Model
    executor: Literal["resident", "streamed"] = "resident"
    objective: Literal["context", "speed", "memory"]
    tier: int | None
    context: int = Field(ge=0)
    target: int = Field(ge=1)
    total_tokens: int = Field(ge=1)
    lora_rank: int = Field(ge=1)
    longest: Longest
    choices: list[Choice]
    rejected: list[Rejection]
    memory: Memory
    time: Time
    stages: list[Stage] = []
    """Of a run whose rows grow; the last one is what all the rest of the plan is about."""
    rope: Rope = Rope()
    train: Train
    nearest: list[str] = []
    warnings: list[str] = []
    not_modelled: list[str] = []
    provenance: Provenance

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)

    @model_validator(mode="after")
    def _adds_up(self) -> Plan:
        if self.context + self.target != self.total_tokens:
            raise ValueError(f"context {self.context} + target {self.target} is not total_tokens {self.total_tokens}")
        return self

    def knobs(self, choice: str) -> dict[str, Scalar]:
        """The knobs of one choice, by short name; empty where the choice is off or has none."""
        return next((dict(made.knobs) for made in self.choices if made.id == choice), {})

    def document(self) -> dict[str, Any]:
        """The plan as plain data, in reading order."""
        return self.model_dump(mode="json", by_alias=True)

    def to_json(self) -> str:
        """The plan as one JSON object."""
        return json.dumps(self.document(), indent=2, ensure_ascii=False)

    def to_yaml(self) -> str:
        """The plan as YAML; equal plans give equal bytes."""
        return yaml.safe_dump(self.document(), sort_keys=False, allow_unicode=True, width=110)


class Mistake(Strict):
    """One thing that was asked and cannot be answered, and the nearest that can, empty where there is none."""

    asked: str
    why: str
    nearest: str


class Unknown(Strict):
    """What ``--json`` prints where there is no plan: bad input, or a fact that is not known."""

    schema_: Literal["tierplan/1"] = Field(default=SCHEMA, alias="schema")
    verdict: Literal["unknown"] = "unknown"
    errors: list[Mistake] = Field(min_length=1)

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)

    def to_json(self) -> str:
        """One JSON object."""
        return json.dumps(self.model_dump(mode="json", by_alias=True), indent=2, ensure_ascii=False)


def json_schema() -> dict[str, Any]:
    """The JSON Schema of the plan file and of ``--json``: a plan, or why there is none."""
    answer: TypeAdapter[Plan | Unknown] = TypeAdapter(Plan | Unknown)
    return answer.json_schema(by_alias=True, mode="serialization")
