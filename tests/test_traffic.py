"""Bytes moved between products, and kernels launched: the formulas against the trainer's own step on fake tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from test_memory_on_fake_tensors import TERABYTE, shortened
from traffic import counted

from planner.explain_formulas import planned_run
from planner.launches import FOUR_BIT, FOUR_BIT_KERNELS
from planner.ledger import Resource
from planner.optimizations import all_optimizations
from planner.plan import Plan
from planner.planning import Request, make_plan

BASE = frozenset({"lora", "chunked_loss", "mixed_precision"})
LAYERS = {"gemma-3-1b": 6}  # one in six has no window
CLOSE = {"between": 0.06, "dequantise": 0.1, "kernels": 0.15}
"""What is done once a step, and in the first layer alone, counts for more in three layers than in all."""
KERNELS = frozenset({"kernels"})
LEAST = 100
"""Kernels below which one more or less is no small share."""


def planned(
    model: str,
    folder: Path,
    total: int,
    on: set[str],
    more: dict[str, dict[str, Any]] | None = None,
    batch: int = 1,
    **knobs: Any,
) -> Plan:
    """Some layers of a model, and exactly these optimisations beside the base."""
    on = on | BASE | ({"fused_activation"} if model == "phi-2" else set())
    return make_plan(
        Request(
            gpu="h200-sxm",
            model=f"random:{shortened(model, LAYERS.get(model, 3), folder / model)}",
            total_tokens=total,
            required=tuple(sorted(on)),
            excluded=tuple(sorted(set(all_optimizations()) - on)),
            knobs={"lora": {"rank": 8}} | ({"streamed": knobs} if knobs else {}) | (more or {}),
            train={"batch": batch},
            host_bytes=TERABYTE,
        )
    )


def assert_counted(plan: Plan, kinds: frozenset[str] = frozenset(CLOSE), **other: float) -> None:
    """Each phase has its bytes, of either kind, and its kernels; ``other``: how close where that differs."""
    found, run = counted(plan), planned_run(plan)
    said: dict[tuple[str, str], float] = {}
    for work in run.configuration.ledger.work.values():
        kind = {Resource.MEMORY: "between", Resource.LAUNCH: "kernels"}.get(work.resource)
        if kind is None:
            continue
        kind = "dequantise" if work.name.startswith("dequantise/") else kind
        place, amount = (work.phase.value, kind), float(work.amount(run.letters))
        if work.name.startswith("dequantise_launches"):  # a library's Python counts there as kernels that there are not
            amount *= FOUR_BIT_KERNELS / FOUR_BIT
        said[place] = said.get(place, 0.0) + amount
    true: dict[tuple[str, str], float] = {}
    for (place, kind), size in found.bytes.items():
        phase = (place.split()[0], kind)
        true[phase] = true.get(phase, 0.0) + size
    for place, kernels in found.kernels.items():
        phase = (place.split()[0], "kernels")
        true[phase] = true.get(phase, 0.0) + kernels
    apart = {
        place: said[place] / true[place]
        for place in true
        if place in said and place[1] in kinds and (place[1] != "kernels" or true[place] >= LEAST)
    }
    assert {kind for _, kind in apart} >= {"between", "kernels"} & kinds
    limits = CLOSE | other
    assert not {place: ratio for place, ratio in apart.items() if abs(ratio - 1) > limits[place[1]]}


@pytest.mark.parametrize("model", ["phi-2", "llama-3.2-1b", "qwen3-1.7b", "gemma-3-1b"])
@pytest.mark.parametrize("staging", ["host", "card"])
def test_layers_in_passes(tmp_path: Path, model: str, staging: str) -> None:
    total = 16_384 if model == "gemma-3-1b" else 4096
    assert_counted(planned(model, tmp_path, total, {"streamed"}, chunk=1024, heads=32, staging=staging, kernel="flash"))


@pytest.mark.parametrize("model", ["phi-2", "llama-3.2-1b", "qwen3-1.7b", "gemma-3-1b", "starcoder2-3b"])
@pytest.mark.parametrize("more", [(), ("gradient_checkpointing",)], ids=["kept", "checkpointed"])
def test_whole_sequences(tmp_path: Path, model: str, more: tuple[str, ...]) -> None:
    assert_counted(planned(model, tmp_path, 4096, {"exact_attention", *more}))


@pytest.mark.parametrize("model", ["llama-3.2-1b", "qwen3-1.7b"])
@pytest.mark.parametrize("more", [("exact_attention",), ("exact_attention", "gradient_checkpointing"), ("streamed",)])
def test_norms_in_one_operation(tmp_path: Path, model: str, more: tuple[str, ...]) -> None:
    knobs = {"chunk": 1024, "heads": 32, "staging": "card", "kernel": "flash"} if "streamed" in more else {}
    assert_counted(planned(model, tmp_path, 4096, {"fused_norm", *more}, **knobs))


@pytest.mark.parametrize("model", ["phi-2", "llama-3.2-1b", "qwen3-1.7b", "gemma-2-2b"])
@pytest.mark.parametrize("more", [(), ("gradient_checkpointing",)], ids=["kept", "checkpointed"])
def test_kernels_of_scores_that_are_written_out(tmp_path: Path, model: str, more: tuple[str, ...]) -> None:
    """Not what they move, which is in the rate of such attention."""
    assert_counted(planned(model, tmp_path, 1024, {*more}), KERNELS)


@pytest.mark.parametrize("total", [512, 2048, 3072])  # one block of queries, two, and five
@pytest.mark.parametrize("more", [(), ("gradient_checkpointing",)], ids=["kept", "checkpointed"])
def test_kernels_of_blocks_of_queries(tmp_path: Path, total: int, more: tuple[str, ...]) -> None:
    assert_counted(planned("gemma-2-2b", tmp_path, total, {"blockwise_attention", *more}), KERNELS)


def test_one_linear_for_query_key_and_value(tmp_path: Path) -> None:
    assert_counted(planned("pythia-1b", tmp_path, 2048, {"exact_attention", "gradient_checkpointing"}), between=0.1)


@pytest.mark.parametrize("model", ["phi-2", "llama-3.2-1b"])
@pytest.mark.parametrize("executor", ["streamed", "exact_attention"])
def test_weights_in_four_bits(tmp_path: Path, model: str, executor: str) -> None:
    more = {"gradient_checkpointing"} if executor != "streamed" else set()
    knobs = {"chunk": 1024, "heads": 32, "staging": "host", "kernel": "flash"} if executor == "streamed" else {}
    assert_counted(planned(model, tmp_path, 4096, {executor, "nf4_weights", *more}, **knobs))


@pytest.mark.parametrize("model", ["phi-2", "llama-3.2-1b", "gemma-3-1b"])
@pytest.mark.parametrize("staging", ["host", "card"])
def test_attention_by_blocks_of_the_row(tmp_path: Path, model: str, staging: str) -> None:
    total = 16_384 if model == "gemma-3-1b" else 8192
    knobs = {"streamed": {"chunk": 1024, "heads": 4, "staging": staging, "kernel": "flash"}}
    blocks = {"sequence_blocks": {"tokens": total // 4}}
    # Layers with a window copy less by blocks than is counted, which is as without them.
    other = {"between": 0.13} if model == "gemma-3-1b" else {}
    assert_counted(planned(model, tmp_path, total, {"streamed", "sequence_blocks"}, knobs | blocks), **other)


@pytest.mark.parametrize("rows", [2, 3])
def test_rows_of_a_batch_do_not_see_each_other_by_blocks(tmp_path: Path, rows: int) -> None:
    """Each row has pairs of its own blocks, not of all that lie behind each other."""
    knobs = {"streamed": {"chunk": 1024, "heads": 8, "staging": "host", "kernel": "flash"}}
    blocks = {"sequence_blocks": {"tokens": 1024}}
    assert_counted(planned("phi-2", tmp_path, 4096, {"streamed", "sequence_blocks"}, knobs | blocks, batch=rows))
