"""Bytes of a streamed step on the card, pass by pass: the formulas against the executor itself on fake tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from test_memory_on_fake_tensors import CLOSE, TERABYTE, shortened

from planner.optimizations import all_optimizations
from planner.plan import Plan
from planner.planning import Request, make_plan
from trainer.fake_step import counted, predicted

BASE = ("lora", "nf4_weights", "mixed_precision", "chunked_loss", "streamed")
PASSES = ("attention", "loss", "backward", "attention_backward", "evaluate_loss")
"""What a step may have its peak in; a chunk's forward passes are told by a bound."""
MODELS = ("phi-2", "llama-3.2-1b", "qwen3-1.7b", "gemma-3-1b", "mistral-7b-v0.3", "qwen2.5-0.5b", "mixtral-8x7b",
          "granite-3.1-2b")  # fmt: skip


def planned(
    model: str,
    folder: Path,
    total: int,
    more: tuple[str, ...] = (),
    batch: int = 1,
    blocks: int | None = None,
    target: int | None = None,
    rows: int = 1024,
    without: tuple[str, ...] = (),
    **knobs: Any,
) -> Plan:
    """Three layers of a model, streamed, and nothing else than is asked for."""
    fused = ("fused_activation",) if model == "phi-2" else ()
    on = {*BASE, *more, *fused} - {*without}
    knobs = {"chunk": 1024, "heads": 4, "staging": "host", "kernel": "flash"} | knobs
    return make_plan(
        Request(
            gpu="h200-sxm",
            model=f"random:{shortened(model, 3, folder / model)}",
            total_tokens=total,
            target=target,
            required=tuple(sorted(on)),
            excluded=tuple(sorted(set(all_optimizations()) - on)),
            knobs={"lora": {"rank": 8}, "chunked_loss": {"rows": rows}, "streamed": knobs}
            | ({"sequence_blocks": {"tokens": blocks}} if blocks else {}),
            train={"batch": batch},
            host_bytes=TERABYTE,
            disk_bytes=TERABYTE if "checkpoint_disk" in on else 0,
        )
    )


def assert_each_pass_is_as_planned(plan: Plan) -> None:
    """Each pass within a hundredth of the peak; no other phase above its plan by as much."""
    # Layers take the same one by one, and the first alone would not do: nobody needs its input's gradient. Of layers
    # with a window and without, and where one input is kept for several, all three are run; so is the reference model,
    # which would show what grows from layer to layer.
    alike = not plan.model.id.startswith(("gemma", "phi-2")) and not plan.knobs("checkpoint_spacing")
    found, said = counted(plan, 2 if alike else None).phases, predicted(plan)
    peak = max(found.values())
    apart = {phase: (said[phase] - found[phase]) / peak for phase in PASSES}
    assert all(abs(share) <= CLOSE for share in apart.values()), apart
    for phase in ("forward", "evaluate"):
        assert found[phase] <= said[phase] + CLOSE * peak, phase


# Every family both ways, and all four ways that of the reference model and one with grouped heads.
FOUR_WAYS = [("host", 1), ("card", 4), ("host", 4), ("card", 1)]


@pytest.mark.parametrize(
    ("model", "staging", "heads"),
    [(model, *way) for model in MODELS for way in FOUR_WAYS[: 4 if model in ("phi-2", "llama-3.2-1b") else 2]],
)
def test_every_family(tmp_path: Path, model: str, staging: str, heads: int) -> None:
    # Three chunks and a bit of a fourth. A window's copies are told by a bound, which longer sequences hide.
    total, chunk = (16_384, 4096) if model == "gemma-3-1b" else (3100, 1024)
    assert_each_pass_is_as_planned(planned(model, tmp_path, total, staging=staging, heads=heads, chunk=chunk))


@pytest.mark.parametrize("model", ["phi-2", "qwen3-1.7b"])
@pytest.mark.parametrize("chunk", [1024, 2048, 4096, 8192])  # four chunks, two, one, more than there is
def test_any_chunk(tmp_path: Path, model: str, chunk: int) -> None:
    assert_each_pass_is_as_planned(planned(model, tmp_path, 4096, chunk=chunk))


@pytest.mark.parametrize("staging", ["host", "card"])
@pytest.mark.parametrize("more", [(), ("checkpoint_int8",)], ids=["exact", "coded"])
def test_two_chunks_of_which_the_second_is_shorter(tmp_path: Path, staging: str, more: tuple[str, ...]) -> None:
    assert_each_pass_is_as_planned(planned("phi-2", tmp_path, 4100, more, chunk=3000, staging=staging))


@pytest.mark.parametrize(("target", "rows"), [(600, 1024), (3000, 2048)])
def test_slices_that_end_with_their_chunk_take_no_more_than_is_planned(tmp_path: Path, target: int, rows: int) -> None:
    """Trained tokens in two chunks, fewer than a slice; and slices longer than a chunk: the loss is told too high."""
    plan = planned("phi-2", tmp_path, 4100, target=target, rows=rows)
    found, said = counted(plan).phases, predicted(plan)
    for phase in ("loss", "evaluate_loss"):
        assert 0.99 * found[phase] <= said[phase] <= 1.35 * found[phase], (phase, said[phase] / found[phase])


@pytest.mark.parametrize(
    "more",
    [
        ("checkpoint_spacing",),
        ("checkpoint_int8",),
        ("checkpoint_nf4",),
        ("checkpoint_nf4", "checkpoint_spacing"),
        ("checkpoint_disk",),
        ("kept_attention",),
        ("streamed_nf4_weights",),
        ("adamw_8bit", "weight_averaging"),
    ],
    ids="+".join,
)
@pytest.mark.parametrize("model", ["phi-2", "llama-3.2-1b"])
def test_what_streams_besides(tmp_path: Path, model: str, more: tuple[str, ...]) -> None:
    assert_each_pass_is_as_planned(planned(model, tmp_path, 3100, more))


@pytest.mark.parametrize("more", [(), ("streamed_weights",)], ids=["card", "host"])
@pytest.mark.parametrize("model", ["phi-2", "llama-3.2-1b"])
def test_weights_in_sixteen_bits_on_the_card_and_in_host_memory(
    tmp_path: Path, model: str, more: tuple[str, ...]
) -> None:
    assert_each_pass_is_as_planned(planned(model, tmp_path, 3100, more, without=("nf4_weights",)))


@pytest.mark.parametrize("model", ["phi-2", "llama-3.2-1b"])
def test_the_card_takes_no_more_for_a_longer_sequence_but_for_attention(tmp_path: Path, model: str) -> None:
    """Of twice the tokens a chunk is as large; their ids and positions, 40 bytes a token, are all that grows.

    Beside some numbers for each chunk by which it is seen to be finite.
    """
    short, long = (planned(model, tmp_path / str(total), total, chunk=2048) for total in (8192, 16_384))
    few, many = counted(short, 2).phases, counted(long, 2).phases
    for phase in ("forward", "loss", "backward"):
        assert 0 <= many[phase] - few[phase] - 40 * (16_384 - 8192) <= 512, phase
    for phase in ("attention", "attention_backward"):
        assert many[phase] > few[phase] + 40 * (16_384 - 8192), phase


# Each head with keys of its own; seven that share them, four or one at a time; windows.
BLOCKED = [("phi-2", "host", 4), ("phi-2", "card", 4), ("qwen2.5-0.5b", "host", 4), ("qwen2.5-0.5b", "host", 1),
           ("gemma-3-1b", "host", 4)]  # fmt: skip


@pytest.mark.parametrize(
    ("model", "staging", "heads", "chunk"), [*((*each, 4096) for each in BLOCKED), ("phi-2", "host", 8, 1024)]
)
def test_blocks_of_the_row(tmp_path: Path, model: str, staging: str, heads: int, chunk: int) -> None:
    """Six blocks: within a hundredth of what is planned, windows within a tenth; and above it by no more than 16 bytes
    a token, which numbers of the row are.
    """
    more = ("sequence_blocks",)
    plan = planned(model, tmp_path, 24_576, more, staging=staging, heads=heads, blocks=4096, chunk=chunk)
    layers = None if model == "gemma-3-1b" else 2
    found, said = counted(plan, layers).phases, predicted(plan)
    close = 10 * CLOSE if model == "gemma-3-1b" else CLOSE  # a window's copies are told by a bound
    for phase in ("attention", "attention_backward"):
        assert found[phase] - 16 * plan.total_tokens <= said[phase] <= (1 + close) * found[phase], phase
    for phase in ("loss", "backward"):
        assert abs(said[phase] - found[phase]) <= CLOSE * max(found.values()), phase


@pytest.mark.parametrize(("rows", "blocks"), [(2, 4096), (3, 4096), (2, 8192), (2, 16_384)])
def test_blocks_of_several_rows(tmp_path: Path, rows: int, blocks: int) -> None:
    """Each row has blocks of its own; one that is shorter than a block is one. Up to 16 bytes a token, as above."""
    plan = planned("phi-2", tmp_path, 8192, ("sequence_blocks",), batch=rows, blocks=blocks, chunk=4096)
    found, said = counted(plan, 2).phases, predicted(plan)
    for phase in ("attention", "attention_backward"):
        assert found[phase] <= said[phase] + 16 * rows * plan.total_tokens, phase
        assert said[phase] <= 1.2 * found[phase], phase


@pytest.mark.parametrize(("model", "staging", "heads"), BLOCKED)
@pytest.mark.parametrize("blocks", [16_384, 8192, 6144])
def test_few_blocks_take_no_more_than_is_planned(
    tmp_path: Path, model: str, staging: str, heads: int, blocks: int
) -> None:
    """One, two, and three of which the last is short; up to 16 bytes a token, which numbers of the row are."""
    more = ("sequence_blocks",)
    plan = planned(model, tmp_path, 16_384, more, staging=staging, heads=heads, blocks=blocks, chunk=4096)
    found, said = counted(plan, None if model == "gemma-3-1b" else 2).phases, predicted(plan)
    for phase in ("attention", "attention_backward"):
        assert found[phase] <= said[phase] + 16 * plan.total_tokens, phase
