"""A plan made by hand, for tests of what is done with plans once they exist."""

from __future__ import annotations

from typing import Any

from planner.plan import Plan
from planner.units import GIB, MIB

PHASES = ("load", "forward", "loss", "backward", "optimizer", "evaluate", "save")
WEIGHTS = {
    "weights/linear": 1200 * MIB,
    "weights/embedding": 250 * MIB,
    "weights/head": 250 * MIB,
    "weights/norms": MIB,
}
TRAINED = {"adapters/weights": 68 * MIB, "gradients/adapters": 68 * MIB, "optimizer/state": 135 * MIB}
PASSING = {
    "forward": {"activations/checkpoints": 2880 * MIB, "activations/forward": 900 * MIB},
    "loss": {"activations/checkpoints": 2880 * MIB, "loss/logits": 400 * MIB, "loss/hidden": 180 * MIB},
    "backward": {
        "activations/checkpoints": 2880 * MIB,
        "activations/mlp": 1800 * MIB,
        "attention/qkv": 270 * MIB,
        "attention/output": 90 * MIB,
    },
    "evaluate": {"loss/logits": 400 * MIB},
}


def phases() -> dict[str, dict[str, int]]:
    """Every term alive in every phase."""
    return {phase: WEIGHTS | ({} if phase == "load" else TRAINED) | PASSING.get(phase, {}) for phase in PHASES}


def document(**changes: Any) -> dict[str, Any]:
    """The plan as plain data; ``changes`` replace top-level keys."""
    peak = sum(phases()["backward"].values())
    made: dict[str, Any] = {
        "schema": "tierplan/1",
        "verdict": "fits",
        "summary": "tier 3, 18,432 tokens in one sequence.",
        "gpu": {
            "id": "rtx2060s",
            "name": "NVIDIA GeForce RTX 2060 SUPER",
            "kind": "gpu",
            "compute_capability": "7.5",
            "visible_bytes": 7974 * MIB,
            "context_bytes": 621 * MIB,
            "context_basis": "assumed",
        },
        "model": {
            "id": "phi-2",
            "source": "microsoft/phi-2",
            "architecture": "PhiForCausalLM",
            "parameters": 2779683840,
            "layers": 32,
            "native_context": 2048,
        },
        "executor": "resident",
        "objective": "context",
        "tier": 3,
        "context": 16384,
        "target": 2048,
        "total_tokens": 18432,
        "lora_rank": 24,
        "longest": {"with_target": 19712, "all_trained": 17152},
        "choices": [
            {
                "id": "chunked_loss",
                "reason": "1,024 rows of logits at a time instead of 18,432",
                "knobs": {"rows": 1024},
            },
            {
                "id": "exact_attention",
                "reason": "the scores would take 40 GiB",
                "knobs": {"kernel": "efficient"},
            },
            {"id": "lora", "reason": "something has to be trained", "knobs": {"rank": 24, "alpha": 48}},
        ],
        "rejected": [
            {"id": "nf4_weights", "reasons": ["needs compute capability ≥ 8.0; RTX 2060 SUPER has 7.5"]},
            {"id": "checkpoint_offload", "reasons": ["not needed", "it would cost 2.1 s a step"]},
        ],
        "memory": {
            "gpu": {
                "budget_bytes": 7353 * MIB,
                "peak_bytes": {"low": 2000 * MIB, "expected": peak, "high": peak + 200 * MIB},
                "peak_phase": "backward",
                "phases": phases(),
            },
            "host": {
                "budget_bytes": 32 * GIB,
                "peak_bytes": 3 * GIB,
                "pinned_bytes": 0,
                "terms": {},
            },
        },
        "time": {
            "step_seconds": {"bound": 18.4, "estimate": 31.2},
            "limit_seconds": 86400.0,
            "basis": "assumed shares of the card's peak rates",
        },
        "train": {},
        "nearest": [],
        "warnings": ["No run on this card has been measured."],
        "not_modelled": ["Other programs that use the card."],
        "provenance": {
            "tierplan": "0.1.0",
            "command": "plan --gpu rtx2060s",
            "profile_sha256": "a" * 64,
            "model_sha256": "b" * 64,
            "calibration_sha256": "c" * 64,
        },
    }
    return made | changes


def example_plan(**changes: Any) -> Plan:
    """The plan itself."""
    return Plan.model_validate(document(**changes))


def too_long_plan() -> Plan:
    """A plan that does not fit, with what would."""
    made = document()
    gpu = made["memory"]["gpu"]
    high = gpu["budget_bytes"] + 900 * MIB
    more = high - 300 * MIB - gpu["peak_bytes"]["expected"]
    highest = gpu["phases"][gpu["peak_phase"]]
    larger = highest | {"activations/mlp": highest.get("activations/mlp", 0) + more}
    peak = {"low": 2000 * MIB, "expected": high - 300 * MIB, "high": high}
    phases = gpu["phases"] | {gpu["peak_phase"]: larger}
    memory = made["memory"] | {"gpu": gpu | {"peak_bytes": peak, "phases": phases}}
    return example_plan(
        verdict="does-not-fit",
        summary="tier 3 needs 0.88 GiB more than the card has.",
        memory=memory,
        nearest=["tier 2 (10,240 tokens) fits", "rank 8 at 17,000 tokens fits"],
    )
