"""Rotary embeddings: the plan's scaling in a model's config, and scaling by length that forgets earlier batches."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from planner.errors import PlanError
from planner.plan import Rope

GLOBAL = "full_attention"
"""Of a config that tells kinds of layers apart: those that see everything. Others see no distance that is new."""


def scale(config: PretrainedConfig, rope: Rope) -> None:
    """Put the plan's scaling into a config, as transformers reads it when the model is built.

    ``max_position_embeddings`` stays: scaling by length counts from it, and servers multiply it by the factor.

    Raises:
        PlanError: the model cannot have it, or has one already.
    """
    if rope.scaling == "none":
        return
    asked, kinds = f"rotary scaling {rope.scaling}", getattr(config, "rope_parameters", None)
    if not kinds:
        raise PlanError(asked, f"is planned for, and a model of type {config.model_type} has no rotary embedding.")
    by_layer = isinstance(kinds.get(GLOBAL), dict)
    own: dict[str, Any] = kinds[GLOBAL] if by_layer else kinds
    kind = own.get("rope_type", "default")
    if kind != "default":
        why = f"is planned for, and where the model is loaded from it has a scaling of its own ({kind})."
        raise PlanError(asked, why, "Plan again for this model.")
    scaled = own | rope.parameters
    config.rope_parameters = kinds | {GLOBAL: scaled} if by_layer else scaled
    if getattr(config, "head_dim", 0) is None:  # as Mixtral's is, which scaled frequencies would be computed from
        config.head_dim = config.hidden_size // config.num_attention_heads
    config.validate_rope()


def go_by_batch(model: PreTrainedModel) -> None:
    """Let rotary embeddings of kind ``dynamic`` go by the longest position of each batch alone.

    transformers keeps the frequencies of the longest sequence it has met until one is within the native context, so
    the same row would be computed differently before and after another. A model that is used on one sequence computes
    what is trained here. The two sets of frequencies also stay two tensors, whatever was seen.
    """
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        if "dynamic" in (kinds.values() if isinstance(kinds, dict) else (kinds,)):
            module.register_forward_pre_hook(_as_first_computed)
            module.register_forward_hook(_forget_length)


def frequencies_beside_buffers(model: nn.Module) -> list[Tensor]:
    """What rotary embeddings hold without having registered it: LongRoPE's frequencies for long rows."""
    rotary = [module for module in model.modules() if hasattr(module, "rope_type")]
    return [value for module in rotary for value in vars(module).values() if isinstance(value, Tensor)]


def _as_first_computed(module: Any, *_: Any) -> None:
    for name, original in list(module.named_buffers(recurse=False)):
        if name.endswith("original_inv_freq"):
            getattr(module, name.replace("original_", "")).copy_(original)


def _forget_length(module: nn.Module, *_: Any) -> None:
    for name in [each for each in vars(module) if each.endswith("max_seq_len_cached")]:
        setattr(module, name, module.original_max_seq_len)
