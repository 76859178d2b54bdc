"""As many optimisations as can be on together: planned, rehearsed on fake tensors, and run on the CPU."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
from run_folder import record
from test_memory_on_fake_tensors import CLOSE, TERABYTE, shortened
from trainer_tiny import make_plan as made_by_hand
from trainer_tiny import save_model, write_sources

from planner.compose import problems
from planner.hardware import load_profile
from planner.model import load_model
from planner.optimizations import all_optimizations
from planner.optimizations.base import Situation
from planner.planning import Request, make_plan
from planner.sets import largest_set
from trainer.fake_step import counted, predicted
from trainer.run import execute

CARDS = ("rtx2060s", "rtx3090", "rtx4090", "h200-sxm")
TOKENS = 8192


@cache
def situation(card: str) -> Situation:
    return Situation(load_profile(card), load_model("phi-2"), TERABYTE, disk_bytes=TERABYTE)


@pytest.mark.parametrize("card", CARDS)
def test_no_set_with_one_more_is_valid(card: str) -> None:
    ids = {*largest_set(situation(card))}
    assert not problems(ids, situation(card)) and len(ids) >= 28
    assert all(problems(ids | {name}, situation(card)) for name in set(all_optimizations()) - ids)
    # Nor is one with one less and two more.
    for left in ids - {"lora"}:
        fewer = ids - {left}
        more = [name for name in set(all_optimizations()) - ids if not problems(fewer | {name}, situation(card))]
        pairs = ((one, other) for one in more for other in more if one < other)
        assert not any(not problems(fewer | {*pair}, situation(card)) for pair in pairs), left


@pytest.mark.slow
@pytest.mark.parametrize("card", CARDS)
def test_it_takes_what_is_planned(tmp_path: Path, card: str) -> None:
    """Two layers of the reference model, as every layer takes the same; numbers of the row are 16 bytes a token."""
    ids = {*largest_set(situation(card))}
    knobs: dict[str, dict[str, Any]] = {
        "lora": {"rank": 8},
        "streamed": {"chunk": 2048, "heads": 4, "staging": "host"},
        "sequence_blocks": {"tokens": 2048},
        "sequence_packing": {"documents": 4},
        "chunked_loss": {"rows": 1024},
        "checkpoint_spacing": {"every": 2},
    }
    plan = make_plan(
        Request(
            gpu=card,
            model=f"random:{shortened('phi-2', 4, tmp_path / 'phi-2')}",
            total_tokens=TOKENS,
            required=tuple(sorted(ids)),
            excluded=tuple(sorted(set(all_optimizations()) - ids)),
            knobs=knobs,
            host_bytes=TERABYTE,
            disk_bytes=TERABYTE,
        )
    )
    assert plan.verdict == "fits" and {choice.id for choice in plan.choices} == ids
    found, said = counted(plan).phases, predicted(plan)
    peak = max(found.values())
    assert max(said.values()) == pytest.approx(peak, rel=CLOSE), (found, said)
    for phase, size in found.items():
        if phase in said:
            assert size <= said[phase] + CLOSE * peak + 16 * TOKENS, phase


def test_it_runs(tmp_path: Path) -> None:
    """All of them but what needs a card: the allocator's cache, and 16 bits, in which a CPU computes otherwise."""
    save_model("llama", tmp_path / "model")
    write_sources(tmp_path / "data", 12)
    (tmp_path / "scratch").mkdir()
    ids = {*largest_set(situation("rtx3090"))} - {"cache_release", "mixed_precision"}
    tiny = Situation(load_profile("rtx3090"), load_model(str(tmp_path / "model")), TERABYTE, disk_bytes=TERABYTE)
    ids -= {name for name, each in all_optimizations().items() if each.reasons(tiny)}
    known = all_optimizations()
    choices: dict[str, dict[str, Any]] = {
        name: {knob.name: knob.choices(tiny.choosing(ids))[0] for knob in known[name].knobs} for name in sorted(ids)
    }
    choices["lora"] = {"rank": 4, "alpha": 0}
    choices["streamed"] = {"kernel": "cpu", "chunk": 16, "heads": 1, "staging": "host"}
    choices["sequence_blocks"] = {"tokens": 16}
    choices["sequence_packing"] = {"documents": 3}
    choices["checkpoint_spacing"] = {"every": 2}
    choices["chunked_loss"] = {"rows": 8}
    choices["rate_range_test"] |= {"steps": 6, "low": 1e-4, "high": 1e-2}
    choices["spike_rewind"] |= {"window": 4, "every": 2}
    plan = made_by_hand(
        tmp_path / "model",
        choices=choices,
        executor="streamed",
        data=str(tmp_path / "data"),
        out=str(tmp_path / "run"),
        scratch=str(tmp_path / "scratch"),
        steps=10,
        accumulation=2,
        validation=0.25,
        evaluation_rows=3,
        evaluate_every=3,
        save_minutes=1e-9,
        total_tokens=48,
    )
    assert len(choices) >= 24
    assert execute(plan) == 0
    run = record(tmp_path / "run")
    assert len(run["losses"]) == 10 and all(loss is not None for loss in run["losses"])
    assert [step for step, _ in run["judged"]["losses"]] == [3, 6, 9, 10] and run["rate_search"]["curve"]
    assert run["evaluation"]["after"]["loss"] == min(loss for _, loss in run["judged"]["losses"])
