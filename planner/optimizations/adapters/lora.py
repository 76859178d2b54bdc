"""Train low-rank adapters beside frozen weights, on every linear of every layer (LoRA).

Each adapted linear gets two small matrices, inputs × R and R × outputs, held in float32 with their gradients and
optimiser states. Gradients keep their buffers from step to step: allocated once, they never fragment. Experts are no
linears in transformers: what a mixture of experts gets are adapters on attention.
"""

from __future__ import annotations

from planner import merging
from planner.adapter_matrices import adapter_letters
from planner.ledger import ALWAYS, Basis, Device, Ledger, Phase, Term
from planner.optimizations.base import Capability, Evidence, Knob, Knobs, Optimization, Situation
from planner.session import Session
from planner.symbols import Letters, Number

RANKS = (8, 4, 2, 16, 32, 64)
RSLORA_ALPHA = 6
"""Alpha where adapters are scaled by it over the root of their rank: at rank 8 about as strong as twice the rank is."""


def alpha_of(alpha: int, rank: int, *, by_root: bool) -> int:
    """What adapters are scaled by, over their rank or its root; 0 stands for what is usual."""
    return alpha or (RSLORA_ALPHA if by_root else 2 * rank)


def adapter_parameters(x: Letters) -> Number:
    """R × (inputs + outputs), summed over the adapted linears of all layers."""
    return x.L * x.R * x.U


def float32(x: Letters) -> Number:
    """Bits of a float32 element."""
    return 32


def two_float32(x: Letters) -> Number:
    """Bits of the two moments of AdamW."""
    return 64


def step_counters(x: Letters) -> Number:
    """AdamW counts the steps of every matrix in a float32 of its own."""
    return 2 * x.L * x.I


class _Experts:
    """Needs a card with grouped products, where a model has experts."""

    text = "where a model has experts, compute capability ≥ 8.0 or the CPU: torch's grouped products have no other"

    def reasons(self, situation: Situation) -> tuple[str, ...]:
        """Names the capability."""
        if not situation.model.experts or situation.gpu.kind == "cpu":
            return ()
        why = "experts are computed by grouped products"
        return tuple(f"{why}: {reason}" for reason in Capability((8, 0), why).reasons(situation))


class Lora(Optimization):
    """LoRA adapters on every linear of every layer: what is trained, its gradients and its optimiser states."""

    id = "lora"
    title = "LoRA adapters on all linears"
    makes = frozenset(
        {"adapters/weights", "gradients/adapters", "optimizer/state", "optimizer/counters"}
        | {"adapters/saving", "adapters/file"}
        | {term.name for term in merging.TERMS}
    )
    claims = frozenset({"letter R", "letter M_s", "letter M_b"})
    requires = (_Experts(),)
    knobs = (
        Knob("rank", "rank of the adapters", lambda situation: RANKS, letter="R", low=1, high=1024),
        Knob(
            "alpha",
            "adapters are scaled by alpha / rank; 0 stands for twice the rank, or for 6 over its root with rslora",
            lambda _: (0,),
            low=0,
            high=65536,
        ),
    )
    evidence = (
        Evidence("low-rank adapters", "Hu et al. 2021, arXiv 2106.09685"),
        Evidence("23,592,960 parameters for Phi-2 at rank 16", "PEFT; tests/test_model_against_transformers.py"),
    )
    exact = False
    effect = "updates are limited to the adapters' rank"

    def letters(self, situation: Situation, knobs: Knobs) -> dict[str, int]:
        """The rank, and what it makes of each matrix."""
        return adapter_letters(situation.model, int(knobs["rank"]))

    def rewrite(self, ledger: Ledger, knobs: Knobs, situation: Situation) -> Ledger:
        """Adapters, their gradients and two moments."""
        source = "PEFT's LoRA layers; torch.optim.AdamW(fused=True)"
        after_load = ALWAYS - {Phase.LOAD}  # the optimiser makes its state in the first step
        return ledger.with_terms(
            *merging.TERMS,
            Term(
                "adapters/weights",
                adapter_parameters,
                float32,
                ALWAYS,
                "adapter matrices",
                source,
                basis=Basis.EXACT,
            ),
            Term(
                "gradients/adapters",
                adapter_parameters,
                float32,
                ALWAYS,
                "their gradients",
                source,
                basis=Basis.EXACT,
            ),
            Term(
                "optimizer/state",
                adapter_parameters,
                two_float32,
                after_load,
                "two moments",
                source,
                basis=Basis.EXACT,
            ),
            Term(
                "adapters/saving",
                adapter_parameters,
                float32,
                frozenset({Phase.SAVE}),
                "adapters on their way into a file",
                "safetensors.torch.save_file copies all tensors to the host before it writes",
                device=Device.HOST,
            ),
            Term(
                "adapters/file",
                adapter_parameters,
                float32,
                frozenset({Phase.SAVE, Phase.MERGE}),
                "the saved adapter, its header left out",
                "PEFT's safetensors file, in float32 as the adapters are",
                device=Device.DISK,
            ),
            Term(
                "optimizer/counters",
                step_counters,
                float32,
                after_load,
                "step counters",
                source,
                basis=Basis.EXACT,
            ),
        )

    def apply(self, session: Session) -> None:
        """Put the adapters on."""
        session.adapt(rank=int(session.knob("rank")), alpha=int(session.knob("alpha")))
