"""The one computed block of docs/decisions.md: what another spacing of checkpoints would take."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from planner.baseline_formulas import layer_inputs, norm_copies_of_layer
from planner.compose import compose
from planner.hardware import load_profile
from planner.ledger import Phase
from planner.markdown import table
from planner.model import load_model
from planner.optimizations.base import Situation
from reports.render.figures import CARD, MODEL

TOKENS, RANK, SPACINGS = 4096, 8, (1, 2, 4, 6, 8, 16, 32)
PLAIN = ("lora", "mixed_precision", "exact_attention", "gradient_checkpointing", "chunked_loss")


def backward_bytes(layers: int, ids: Sequence[str]) -> int:
    """Bytes of activations and checkpoints in the backward pass with one checkpoint for so many layers.

    The layers of a segment are recomputed together, so their saved tensors live together, and so do the inputs of
    all but the first of them.
    """
    situation = Situation(load_profile(CARD), load_model(MODEL), 0)
    configuration = compose(ids, {}, situation)
    letters = configuration.at(batch=1, total=TOKENS, target=TOKENS, workspace=0)
    letters.R, letters.A = RANK, layers
    total = -(-layer_inputs(letters) * letters.a // 8) + 4 * (layers - 1) * norm_copies_of_layer(letters)
    for term in configuration.ledger.terms.values():
        if Phase.BACKWARD in term.phases and term.name.startswith(("activations/", "attention/")):
            size = int(term.bytes(letters))
            if term.name == "activations/checkpoints":
                size = size // letters.L * -(-letters.L // layers)
            total += size
    return int(total)


def spacing() -> str:
    """A row for each spacing."""
    rows = (
        (
            f"{layers} {'layer' if layers == 1 else 'layers'}",
            f"{backward_bytes(layers, PLAIN) / 1e9:.2f} GB",
            f"{backward_bytes(layers, (*PLAIN, 'fused_activation')) / 1e9:.2f} GB",
        )
        for layers in SPACINGS
    )
    return table(("one checkpoint for", "activation as transformers has it>", "activation in one operation>"), rows)


BLOCKS: Mapping[str, Callable[[], str]] = {"spacing": spacing}
