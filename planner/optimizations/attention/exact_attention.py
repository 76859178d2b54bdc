"""Compute attention exactly without ever holding the scores, by the best kernel the card has.

cuDNN's and the flash kernel need compute capability 8.0 and 16-bit numbers; the memory-efficient kernel runs from
5.0 on and is the one for Turing. Scores of all pairs of tokens are replaced by one float32 per query. Rows are
causal from their first token, so no mask is needed. Where layers have a window, a token's scores are computed for the
keys in it alone; where heads have a learned sink, it is added to the sum of each row, and the output shrinks by as
much.
"""

from __future__ import annotations

from planner.ledger import Ledger
from planner.optimizations.base import Evidence, Knob, Knobs, Optimization, Scalar, Situation
from planner.optimizations.item import Claimed
from planner.session import Session
from planner.symbols import Letters, Number, least, round_up


def grouped_inputs(x: Letters) -> Number:
    """Query, and key and value of their own heads: the kernel takes fewer of them as they are.

    Value is what its linear gave; where that is one tensor with query and key, all of it stays.
    """
    return x.A * x.B * x.S * ((x.H + 2 * x.K) * x.E + x.v + query_copy(x))


def query_copy(x: Letters) -> Number:
    """Where positions are learned nothing turns the query, so it lies in its linear's output, and is copied out."""
    return least(x.r, 1) * x.H * x.E


def repeated_inputs(x: Letters) -> Number:
    """Query, and key and value copied for every query head; where none is repeated, value as its linear gave it."""
    return x.A * x.B * x.S * (3 * x.H * x.E + (x.K // x.H) * x.v + query_copy(x))


def log_sum_exp(x: Letters) -> Number:
    """One value for each query and head; kernels pad a sequence, and each document of a row, to a multiple of 32."""
    return x.A * x.B * x.H * (round_up(x.S, 32) + 32 * (x.d_r - 1))


def float32(x: Letters) -> Number:
    """Bits of a float32 element."""
    return 32


def nothing(x: Letters) -> Number:
    """No element."""
    return 0


# The largest head of each kernel, forward and backward; the memory-efficient kernel takes any.
LARGEST_HEAD = {"cudnn": 128, "flash": 256}
# Kernels whose operators take a window (the CPU's takes rows with a mask) and whose log-sum-exp takes in a sink.
OWN_OPERATORS = frozenset({"flash", "efficient", "cpu"})

EAGER = ("attention/mask", "attention/eager", "attention/eager_forward", "attention/eager_evaluation")


def kernels(situation: Situation) -> tuple[Scalar, ...]:
    """The exact kernels that run on a card, the fastest first."""
    if situation.gpu.kind == "cpu":
        return ("cpu",)
    capability, head = situation.gpu.compute_capability or (0, 0), situation.model.head_size
    own = situation.model.sliding_window is not None or situation.model.attention_sinks
    if capability < (5, 0):
        return ()
    half = not situation.chosen or "mixed_precision" in situation.chosen  # the others take 16-bit numbers only
    # The fastest first: cuDNN has kernels made for Hopper; elsewhere flash is at least as fast.
    order = ("cudnn", "flash", "efficient") if (9, 0) <= capability < (12, 0) else ("flash", "cudnn", "efficient")
    able = capability >= (8, 0) and half and head % 8 == 0
    return tuple(
        name
        for name in order
        if name == "efficient" or (able and head <= LARGEST_HEAD[name] and (name in OWN_OPERATORS or not own))
    )


class _HasKernel:
    """Needs a card that at least one exact kernel runs on, and scores that kernels compute."""

    text = "a graphics card of compute capability ≥ 5.0, or the CPU; no soft-capped scores"

    def reasons(self, situation: Situation) -> tuple[str, ...]:
        """Names the capability, or what no kernel does."""
        if situation.model.attention_softcap is not None:
            cap = situation.model.attention_softcap
            return (
                f"no kernel soft-caps scores, which {situation.model.id} does at {cap:g}; blockwise_attention does",
            )
        if situation.gpu.kind == "gpu" and situation.gpu.compute_capability is None:
            return (f"which exact kernel runs on {situation.gpu.name} is unknown: its compute capability is",)
        if not kernels(situation):
            return (f"no exact kernel runs on {situation.gpu.name}: the oldest needs compute capability ≥ 5.0",)
        return ()


class ExactAttention(Optimization):
    """Exact attention that never holds the scores: memory linear in the sequence instead of quadratic."""

    id = "exact_attention"
    title = "exact attention without stored scores"
    claimed = (
        Claimed(
            1,
            "80 % of the memory of activations",
            "in part",
            "It takes off what grows with the square of the sequence: 75 % of a layer's activations at 2,048 "
            "tokens, 98 % at 32,768.",
        ),
    )
    claims = frozenset(
        {"attention/scores.count", "attention/scores.bits", "attention/qkv.count"}
        | {f"{name}.count" for name in EAGER}
        | {"letter e", "setting attention"}
    )
    requires = (_HasKernel(),)
    knobs = (Knob("kernel", "cudnn, flash, efficient or cpu", kernels, names=("cudnn", "flash", "efficient", "cpu")),)
    evidence = (
        Evidence(
            "exact attention in linear memory",
            "Dao 2023, arXiv 2307.08691; Rabe and Staats 2021, arXiv 2112.05682",
        ),
        Evidence(
            "windows and sinks by the kernels' own operators equal the scores written out, in float64",
            "tests/test_kernel_ops.py",
        ),
        Evidence(
            "which kernel runs on which card",
            "PyTorch 2.11 to 2.13, aten/native/transformers/cuda/sdp_utils.cpp",
        ),
    )

    def letters(self, situation: Situation, knobs: Knobs) -> dict[str, int]:
        """No scores are stored."""
        return {"e": 0}

    def settings(self, situation: Situation, knobs: Knobs) -> dict[str, str]:
        """The kernel that attention rates are looked up by."""
        return {"attention": str(knobs["kernel"])}

    def rewrite(self, ledger: Ledger, knobs: Knobs, situation: Situation) -> Ledger:
        """No scores; log-sum-exp instead; key and value repeated only where the kernel wants it."""
        ledger = ledger.claimed("attention/scores", count=log_sum_exp, bits=float32)
        for name in EAGER:
            ledger = ledger.claimed(name, count=nothing)
        inputs = repeated_inputs if knobs["kernel"] == "efficient" else grouped_inputs
        return ledger.claimed("attention/qkv", count=inputs)

    def apply(self, session: Session) -> None:
        """Use this kernel and no other."""
        session.attend_with(str(session.knob("kernel")))
