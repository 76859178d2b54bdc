"""What does not go together of the claims' items: each pair is refused, warned of, or put in order, with a reason.

There is no table of pairs in the code: what is refused follows from what optimisations claim, make and need.
"""

from __future__ import annotations

import re
from typing import Any

import pytest

from planner.compose import problems
from planner.errors import PlanError
from planner.hardware import load_profile
from planner.model import load_model
from planner.optimizations import given_items
from planner.optimizations.base import Situation
from planner.plan import Plan
from planner.planning import Request, make_plan
from planner.units import GIB
from trainer.session import ResidentSession

PHI_2 = Situation(load_profile("rtx2060s"), load_model("phi-2"), 32 * GIB)


def _planned(*required: str, **given: Any) -> Plan:
    return make_plan(Request(required=required, **{"tier": 2} | given))


REFUSED: list[tuple[str, tuple[str, ...], str]] = [
    (
        "2 × 3: one optimiser, and on one card nothing to share out",
        ("adamw_8bit", "zero2"),
        "zero2: no plan switches it",
    ),
    ("35 × 39: gradients are sent between cards", ("streamed_weights", "powersgd"), "powersgd: no plan switches it"),
    ("40 × training: no cache", ("paged_cache",), "paged_cache: no plan switches it"),
    ("27 × training: no cache", ("windows",), "windows: no plan switches it"),
    ("36 × a model that has it not", ("grouped_heads",), "grouped_heads: no plan switches it"),
    ("12 × 29: one schedule", ("one_cycle", "polynomial_decay"), "both claim setting schedule"),
    ("29 × 29: one schedule", ("warmup_stable_decay", "polynomial_decay"), "both claim setting schedule"),
    ("8 × 21: one owner of the rate", ("batch_rate", "rate_range_test"), "both claim setting rate"),
    (
        "15 × 23: averages once",
        ("weight_averaging", "lookahead"),
        "averages/adapters is already made by weight_averaging",
    ),
    ("4 × 35: layers run whole or in passes", ("gradient_checkpointing", "streamed"), "both claim"),
    ("1 × 1: one kernel of attention", ("exact_attention", "streamed"), "both claim"),
    ("44 × 43: a row is cut, or made of several", ("context_stages", "sequence_packing"), "both claim setting rows"),
    ("38 × 38: one code", ("checkpoint_int8", "checkpoint_nf4"), "both claim letter b_c"),
    ("19 × compute capability 7.5: no Triton", ("compiled_layers",), "needs compute capability ≥ 8.0"),
    ("41 × Phi-2: no RMSNorm", ("fused_norm",), "phi-2 has LayerNorm"),
]


@pytest.mark.parametrize(("what", "names", "told"), REFUSED, ids=[what for what, *_ in REFUSED])
def test_it_is_refused_with_its_reason(what: str, names: tuple[str, ...], told: str) -> None:
    with pytest.raises(PlanError) as caught:
        _planned(*names)
    message = str(caught.value)
    assert told in message and any(name in message for name in names), f"{what}: {message}"


ON_AMPERE: list[tuple[str, str, tuple[str, ...], str]] = [
    ("19 × 43: lengths within a row", "llama-3.2-1b", ("compiled_layers", "sequence_packing"), "a graph of its own"),
    ("19 × 35 and 42: layers run in passes", "llama-3.2-1b", ("compiled_layers", "streamed"), "cut at their attention"),
    ("19 × 27: kernels by length", "mistral-7b-v0.1", ("compiled_layers",), "layers with a window"),
    (
        "19 × 6: the compiler keeps what is made of four bits",
        "llama-3.2-1b",
        ("compiled_layers", "nf4_weights"),
        "16-bit",
    ),
    ("19 × 41: norms once", "llama-3.2-1b", ("compiled_layers", "fused_norm"), "both claim letter Q"),
]


@pytest.mark.parametrize(("what", "model", "names", "told"), ON_AMPERE, ids=[what for what, *_ in ON_AMPERE])
def test_it_is_refused_on_a_card_that_could(what: str, model: str, names: tuple[str, ...], told: str) -> None:
    with pytest.raises(PlanError) as caught:
        make_plan(Request("rtx3090", model, total_tokens=4096, required=names))
    assert told in str(caught.value), f"{what}: {caught.value}"


def test_19_with_44_every_stage_runs_what_was_compiled() -> None:
    """Rows of any length run one code, so a run in stages may have it."""
    asked = ("compiled_layers", "context_stages")
    plan = make_plan(Request("rtx3090", "llama-3.2-1b", total_tokens=4096, required=asked, train={"steps": 30}))
    assert plan.verdict == "fits" and {*asked} <= {choice.id for choice in plan.choices} and len(plan.stages) > 1


NEEDS: list[tuple[str, str, tuple[str, ...], str]] = [
    (
        "37 × 4 on the card: more, not less",
        "checkpoint_spacing",
        ("gradient_checkpointing",),
        "saves nothing once layers",
    ),
    (
        "38 × 4 on the card",
        "checkpoint_int8",
        ("gradient_checkpointing",),
        "only streamed layers write their inputs down",
    ),
    ("26 × stock loss: whole logits", "label_smoothing", (), "loss/"),
    ("5 × phi-2 without exact attention: float16 overflows", "mixed_precision", (), "overflow float16"),
]


@pytest.mark.parametrize(("what", "name", "beside", "told"), NEEDS, ids=[what for what, *_ in NEEDS])
def test_it_needs_what_makes_it_worth_something(what: str, name: str, beside: tuple[str, ...], told: str) -> None:
    assert told in "; ".join(problems({"lora", name, *beside}, PHI_2)[name]), what


WARNED: list[tuple[str, tuple[str, ...], dict[str, Any], str]] = [
    ("20 × a falling rate", ("early_stopping",), {}, "early_stopping may end training while the learning rate is high"),
    ("20 × 12", ("early_stopping", "one_cycle"), {}, "by one_cycle it falls to the end"),
    ("20 × 29", ("early_stopping", "polynomial_decay"), {}, "by polynomial_decay it falls to the end"),
    ("22 × 29", ("weight_averaging", "polynomial_decay"), {"knobs": {"weight_averaging": {"kind": "swa"}}}, "(swa) is"),
    (
        "44 × 20: it may never come to the long stage",
        ("context_stages", "early_stopping"),
        {},
        "may end training before context_stages comes to whole rows",
    ),
    (
        "44 × few steps: some stages have none",
        ("context_stages",),
        {"train": {"steps": 2}},
        "Some of the 3 stages of context_stages have no step",
    ),
    (
        "34 × the norm",
        ("adaptive_clipping",),
        {"train": {"max_grad_norm": 0.5}},
        "adaptive_clipping clips the gradients",
    ),
    ("12 × train.schedule", ("one_cycle",), {"train": {"schedule": "linear"}}, "one_cycle schedules the learning rate"),
]


@pytest.mark.parametrize(("what", "names", "given", "told"), WARNED, ids=[what for what, *_ in WARNED])
def test_it_is_warned_of(what: str, names: tuple[str, ...], given: dict[str, Any], told: str) -> None:
    plan = _planned(*names, **given)
    assert plan.verdict == "fits" and any(told in warning for warning in plan.warnings), (what, plan.warnings)
    quiet = {"early_stopping", "weight_averaging"} & {*names}
    if quiet and "context_stages" not in names:
        steady = _planned(*quiet, train={"schedule": "constant"}, knobs=given.get("knobs", {}))
        assert not any(told in warning for warning in steady.warnings), "a steady rate is none of it"


@pytest.mark.parametrize(
    ("what", "names"),
    [
        ("44 × 12: as many steps as without, so a schedule is what it was", ("context_stages", "one_cycle")),
        ("13 × 29: a ratio goes with any schedule", ("lora_plus", "polynomial_decay")),
        ("13 × 21: and with a rate that is found", ("lora_plus", "rate_range_test")),
        ("8 × 8: rank and rows", ("rslora", "batch_rate")),
        ("15 × 6: of four-bit weights nothing is averaged", ("weight_averaging", "nf4_weights")),
        ("24 × 25 × 34: in one order", ("gradient_noise", "gradient_centralization", "adaptive_clipping")),
        ("24 × 17: a step that is taken back has none", ("gradient_noise", "spike_rewind")),
        ("26 × 41: inside the slices", ("label_smoothing", "chunked_loss")),
        ("42 × 43: each document is a call of its own", ("sequence_blocks", "sequence_packing", "streamed")),
        ("31 × 32: given back by measurement alone", ("cache_release",)),
        ("20 × 16: one evaluation for both", ("early_stopping", "kept_checkpoints")),
    ],
)  # fmt: skip
def test_these_go_together(what: str, names: tuple[str, ...]) -> None:
    plan = _planned(*names, gpu="rtx3090")
    assert plan.verdict == "fits" and {*names} <= {choice.id for choice in plan.choices}, what


def test_on_turing_16_bits_are_float16_with_a_scaler_and_adapters_in_float32() -> None:
    plan = _planned()
    assert plan.knobs("mixed_precision")["dtype"] == "float16"
    session = ResidentSession(plan)
    session.apply_choices()
    assert session._scale_loss and str(session.dtype) == "torch.float16"
    assert make_plan(Request(gpu="rtx3090", tier=2)).knobs("mixed_precision")["dtype"] == "bfloat16"


@pytest.mark.parametrize("name", ["zero2", "powersgd", "paged_cache", "windows", "grouped_heads"])
def test_what_one_card_or_a_model_has_not_gives_its_reason(name: str) -> None:
    state, why = given_items()[name].state(PHI_2)
    assert state == "never" and re.search("one card|no cache|key head", why)
