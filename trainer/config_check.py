"""Whether the model that is loaded is the one that was planned for."""

from __future__ import annotations

from transformers import PretrainedConfig

from planner.errors import PlanError
from planner.model import load_model as plan_shape
from planner.plan import Plan
from trainer.attention import BLOCKS, KERNEL_OPS
from trainer.layers import activation_field, mlp_width
from trainer.loading import RANDOM


def check_config(plan: Plan, config: PretrainedConfig, kernel: str | None, *, streaming: bool) -> None:
    """Compare a config with the shape that was planned for, and the attention kernel with what the model does.

    Args:
        kernel: that computes attention; None: that of transformers.
        streaming: whether layers run in passes.

    Raises:
        PlanError: the model is another one, or attends in a way that the kernel does not.
    """
    planned, asked = plan.model, f"model {plan.model.source}"
    shape = plan_shape(planned.source.removeprefix(RANDOM))
    again = "Plan again for this model."
    if (shape.parameters, shape.layers) != (planned.parameters, planned.layers):
        has = f"{shape.parameters:,} parameters in {shape.layers} layers"
        why = f"has {has}, and the plan was made for {planned.parameters:,} in {planned.layers}."
        raise PlanError(asked, why, again)
    for name, value in (
        ("layers", config.num_hidden_layers),
        ("width", config.hidden_size),
        ("mlp_width", mlp_width(config)),
        ("heads", config.num_attention_heads),
        ("kv_heads", getattr(config, "num_key_value_heads", None) or config.num_attention_heads),
        ("vocab", config.vocab_size),
        ("activation", getattr(config, activation_field(config))),
    ):
        if value != getattr(shape, name):
            why = f"has {name} {value} where it is loaded from, and {getattr(shape, name)} was planned for."
            raise PlanError(asked, why, again)
    window = getattr(config, "sliding_window", None)
    plain = kernel not in KERNEL_OPS and not streaming
    if kernel and plain and window and window < plan.total_tokens:
        why = f"attends within a window of {window:,} tokens; the {kernel} kernel has none."
        raise PlanError(asked, why, again)
    if kernel not in (None, BLOCKS) and shape.attention_softcap is not None:
        why = f"caps its scores at {shape.attention_softcap:g}, which the {kernel} kernel does not."
        raise PlanError(asked, why, again)
