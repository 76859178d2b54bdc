"""What each optimisation is for: on what runs it lowers what it is to lower, in every phase."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from drawing import NAMES, PATTERNS, Drawn, drawn, examples, repaired
from hypothesis import assume, given
from hypothesis import strategies as st

from planner.compose import problems
from planner.hardware import load_profile
from planner.ledger import Device, Phase
from planner.model import load_model
from planner.optimizations import all_optimizations
from planner.optimizations.base import Situation
from planner.symbols import Letters

# Others add memory, or hold what would be computed again; last resorts are for rows longer than are drawn here
# (tests/test_last_resorts.py).
HELPFUL = [
    name
    for name in NAMES
    if name not in ("lora", "kept_attention")
    and not (all_optimizations()[name].asked or all_optimizations()[name].last_resort)
]
PHI_2 = Situation(load_profile("rtx2060s"), load_model("phi-2"), 2**35)
# Where switching one on raises no phase on the card, read off the formulas; where nothing is said: everywhere.
# LoRA is left out: it is what is trained, and all it makes is more.
DOMAINS: dict[str, Callable[[Letters, tuple[str, ...]], bool]] = {
    # One float32 per query, padded to 32, instead of (64 - a) bits per pair: 32·32 ≤ 32·S² from S = 6 on. A single
    # key and value head is repeated without a copy where scores are stored, and by one kernel with a copy.
    # Where nothing turns query and key (GPT-2) they are no tensors of their own, and a kernel has copies of them.
    # Where value is a part of one tensor with query and key (Pythia), a kernel keeps all of that tensor.
    "exact_attention": lambda x, ids: x.S >= 6 and x.K > 1 and not x.r and not x.v,
    # min(C, T) rows of 64 - a bits and at most 2·T·D elements instead of S rows of 96 bits: true for D ≤ V.
    "chunked_loss": lambda x, ids: x.D <= x.V,
    # (L - 1)·layer ≥ (L + 1)·D, where a layer saves a norm's output, D, and a tensor of the MLP, F, at the least.
    # Experts go backward through whole layers' outputs of their own, which are there anew.
    "gradient_checkpointing": lambda x, ids: x.L >= 3 and x.F >= x.D and not x.d,
    # At most two hidden states pass through the card instead of L that lie there.
    "checkpoint_offload": lambda x, ids: x.L >= 2,
    # 4.13 bits a weight, and 1,092 bytes for each linear, instead of 16; while loading, the largest is there twice.
    "nf4_weights": lambda x, ids: x.L >= 2 and x.P >= 2048 * x.J,
    # Beside scores and logits in float32 comes a 16-bit copy: no scores, and a slice of logits below the embedding.
    # Casts of the adapters are less than the weights save, RMSNorm's copies of a layer less than two checkpoints.
    "mixed_precision": lambda x, ids: (
        "exact_attention" in ids
        and x.C <= x.D
        and x.R * x.U <= x.P
        and x.L >= 2
        and "nf4_weights" not in ids  # which leaves the weights nothing to save
    ),
    # Blocks of 512 queries at most instead of all pairs.
    "blockwise_attention": lambda x, ids: x.S >= 1024,
    # What waits for a pass and what is on its way is less than whole layers from some chunks on.
    "streamed": lambda x, ids: 4 * x.S_c <= x.S and x.L >= 3,
    # Of L inputs L/k and k - 1 stay; the latter are never coded. The former are counted in groups of 64 elements.
    # With a disk two are in the host anyway, and the disk is what it saves.
    "checkpoint_spacing": lambda x, ids: (
        x.L_s**2 <= x.L and not x.b_c and x.B * x.S * x.D >= 64 and "checkpoint_disk" not in ids
    ),
    # Two inputs instead of all, counted in groups of 64 elements.
    "checkpoint_disk": lambda x, ids: -(-x.L // x.L_s) > 2,
}
# What else is on, and what is off, in a run that the above does not pass over.
BESIDE: dict[str, tuple[frozenset[str], str]] = {
    "mixed_precision": (frozenset({"exact_attention"}), "nf4_weights streamed_nf4_weights streamed"),
    "checkpoint_spacing": (frozenset({"streamed"}), "checkpoint_int8 checkpoint_nf4 checkpoint_disk"),
    **dict.fromkeys(
        ("checkpoint_disk", "checkpoint_int8", "streamed_nf4_weights", "streamed_weights"),
        (frozenset({"streamed"}), ""),
    ),
}
# What these lower lies in host memory; on the card a coded input has its decoded one beside it.
IN_HOST = {"checkpoint_disk", "checkpoint_int8", "checkpoint_nf4", "checkpoint_spacing"}


def switched(run: Drawn, name: str) -> tuple[Drawn, Drawn]:
    """The run without the optimisation and what builds on it, and the same run with it alone added."""
    passes = "streamed" in {name, *run.ids}
    without = repaired({*run.ids} - {name}, run.situation, passes=passes)
    return replace(run, ids=without), replace(run, ids=tuple(sorted({*without, name})))


@pytest.mark.parametrize("name", HELPFUL)
@examples(50)
@given(data=st.data())
def test_no_phase_rises_where_an_optimisation_is_to_help(name: str, data: st.DataObject) -> None:
    run = data.draw(drawn(name, *BESIDE.get(name, ())))
    if name not in run.ids:  # perhaps for the model's sake
        run = replace(run, model=replace(run.model, activation="gelu_new", sliding_window=None))
    # Rows of many documents are as long as their documents to some, and to others as the row.
    run = replace(run, ids=tuple(each for each in run.ids if each != "sequence_packing"))
    off, on = switched(run, name)
    assume(not problems(on.ids, on.situation))
    assume(DOMAINS.get(name, lambda x, ids: True)(on.letters, on.ids))
    device = Device.PINNED if name in IN_HOST else Device.GPU
    before, after = off.phases(device), on.phases(device)
    if name == "streamed":  # which moves work from phase to phase, so that the highest moment counts
        assert max(after.values()) <= max(before.values()), (before, after, on)
        return
    assert all(after[phase] <= before[phase] for phase in Phase), (before, after, on)
    # Nor does any term that it claims, but for those that stand for more of a layer once layers are recomputed.
    large, small = (each.configuration.ledger.bytes(each.letters) for each in (off, on))
    claimed = {claim.rpartition(".")[0] for claim in all_optimizations()[name].claims} & large.keys()
    assert all(small[term] <= large[term] for term in claimed - {"activations/outputs", "activations/forward"})


@pytest.mark.parametrize("name", HELPFUL)
def test_each_optimisation_lowers_something_for_phi_2_on_8_gb(name: str) -> None:
    """On the card, or in host memory where that is what it lowers; passes lower the highest moment."""
    passes = name != "streamed" and any("streamed" in need for need in problems(["lora", name], PHI_2).get(name, ()))
    run = Drawn(PATTERNS[0], "rtx2060s", tuple(NAMES), {}, 1, 32_768 if name == "streamed" else 4608, 512)
    others = {each for each in NAMES if not all_optimizations()[each].claims & all_optimizations()[name].claims}
    others -= {"checkpoint_disk"} if name == "checkpoint_spacing" else set()  # beside which it saves disk instead
    off, on = switched(replace(run, ids=repaired({*others, name}, run.situation, passes=passes)), name)
    assert (name in on.ids and name not in off.ids) or all_optimizations()[name].reasons(run.situation)
    device = Device.PINNED if name in IN_HOST else Device.GPU
    before, after = off.phases(device), on.phases(device)
    if name == "streamed":
        assert max(after.values()) < max(before.values())
        return
    assert all(after[phase] <= before[phase] for phase in Phase)
    assert after != before or problems(on.ids, on.situation)
