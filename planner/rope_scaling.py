"""How a plan scales the rotary embedding where a sequence is longer than the model was made for, and what that means.

A rotary embedding turns queries and keys by angles that grow with the position. Beyond the longest position of
pre-training these are angles that the model never met. Scaling slows them down, so that a longer sequence stays among
those it knows. The parameters are those of transformers' ``rope_parameters`` (``modeling_rope_utils.py``).
"""

from __future__ import annotations

import math

from planner.errors import PlanError
from planner.families import FAMILIES
from planner.model_shape import ModelShape
from planner.plan import Rope, Scaling
from planner.units import format_count

MEANINGS: dict[Scaling, str] = {
    "none": "the rotary embedding stays as the model's config has it",
    "linear": "every position is divided by the factor (position interpolation, arXiv 2306.15595)",
    "dynamic": "up to the native context nothing changes; beyond, the base grows with the longest row of a batch",
    "yarn": "slow dimensions are divided by the factor, fast ones are not, and scores are scaled (arXiv 2309.00071)",
}
NAMES: dict[Scaling, str] = {"none": "no scaling", "linear": "linear", "dynamic": "dynamic NTK", "yarn": "YaRN"}
ROPE_SETTINGS = ("rope", "train.rope", "train.rope_factor")  # what `plan explain` finds this under
PUBLISHED = 32  # the largest factor of the YaRN paper, section 4: 4K to 128K tokens
BETA_FAST, BETA_SLOW = 32.0, 1.0  # turns within the native context: YaRN paper, section 3.2; defaults of transformers


def rope_mistakes(model: ModelShape, scaling: Scaling | None, factor: float | None) -> list[PlanError]:
    """What is wrong with a scaling that the user asks for, given the model; empty where nothing is."""
    if factor is not None and scaling == "none":
        asked = f"--set train.rope=none --set train.rope_factor={factor:g}"
        return [PlanError(asked, "gives a factor to no scaling.", "Drop one of them.")]
    if factor is None and scaling in (None, "none"):
        return []
    why = _not_scalable(model)
    if not why:
        return []
    asked = f"--set train.rope={scaling}" if scaling else f"--set train.rope_factor={factor:g}"
    return [PlanError(asked, f"cannot be had: {why}.", "--set train.rope=none, or leaving it out, plans without.")]


def rope_of(model: ModelShape, total: int, scaling: Scaling | None = None, factor: float | None = None) -> Rope:
    """The scaling of a plan for sequences of ``total`` tokens.

    Args:
        scaling, factor: as the user asks for them; None leaves them to the plan: YaRN by as many times as the
            sequence is longer than the native context, rounded up, wherever it is longer and scaling helps.
    """
    native, kind = model.native_context, model.rope_type
    within = f"{format_count(total)} tokens are within the {format_count(native)} that the model was made for"
    if scaling == "none":
        return Rope(model=kind, reason="asked for")
    asked = scaling is not None or factor is not None
    factor = factor or float(math.ceil(total / native))
    if factor == 1 or (total <= native and not asked):
        return Rope(model=kind, reason=within if total <= native else "asked for: a factor of 1 changes nothing")
    if asked:
        return _scaled(kind, native, scaling or "yarn", factor, "asked for")
    if why := _not_scalable(model) or _not_needed(model):
        return Rope(model=kind, reason=why)
    times = f"{format_count(total)} tokens are {total / native:.3g} times the {format_count(native)} that the model"
    return _scaled(kind, native, "yarn", factor, f"{times} was made for")


def _not_scalable(model: ModelShape) -> str:
    if model.rope_type == "none":
        return f"{model.id} has no rotary embedding"
    if model.rope_type != "default":
        return f"{model.id} comes with a scaling of its own ({model.rope_type}), which stays as it is"
    takes = FAMILIES[model.model_type].rope_kinds
    if takes and "yarn" not in takes:
        return f"models of the family {model.model_type} take no scaling but {' or '.join(set(takes) - {'default'})}"
    return ""


def _not_needed(model: ModelShape) -> str:
    """Only the distance of two positions counts, and a window bounds it."""
    if model.sliding_window is None or model.sliding_layers < model.layers:
        return ""
    return f"every layer of {model.id} sees {format_count(model.sliding_window)} tokens, so no distance is new to it"


def _scaled(kind: str, native: int, scaling: Scaling, factor: float, reason: str) -> Rope:
    parameters: dict[str, str | int | float] = {"rope_type": scaling, "factor": factor}
    if scaling == "yarn":
        parameters |= {
            "original_max_position_embeddings": native,
            "attention_factor": 0.1 * math.log(factor) + 1.0,  # YaRN paper, section 3.4
            "beta_fast": BETA_FAST,
            "beta_slow": BETA_SLOW,
        }
    return Rope(model=kind, scaling=scaling, factor=factor, reason=reason, parameters=parameters)


def rope_told(rope: Rope) -> str:
    """``YaRN ×4``, or that nothing is scaled."""
    return NAMES[rope.scaling] + (f" ×{rope.factor:g}" if rope.scaling != "none" else "")


def rope_warnings(model: ModelShape, total: int, rope: Rope) -> list[str]:
    """What the scaling, or its absence, means for who trains and for who uses the adapter; a few sentences each."""
    native, beyond = model.native_context, total > model.native_context
    made = f"{model.id} was made for {format_count(native)} tokens"
    end = "Context trained is not context used."
    if rope.scaling == "none":
        return [f"{made}{_unscaled(model)} {end}"] if beyond else []
    told = [f"{made}, and positions beyond are new to it."] if beyond else []
    told += [_scaling_told(model, total, rope), *([end] if beyond else [])]
    warnings = [" ".join(told)]
    if rope.scaling == "yarn" and rope.factor > PUBLISHED:
        warnings.append(
            f"YaRN was published for factors of up to {PUBLISHED} (arXiv 2309.00071); how well ×{rope.factor:g} serves "
            "is not known."
        )
    return warnings


def _unscaled(model: ModelShape) -> str:
    if why := _not_needed(model):
        return f"; {why}, and nothing is scaled."
    if why := _not_scalable(model):
        return f", and positions beyond are new to it: nothing is scaled, since {why}."
    return (
        ", and positions beyond are new to it: its rotary embedding is left as it is and turns them by angles that it "
        "never met. --set train.rope=yarn scales them."
    )


def _scaling_told(model: ModelShape, total: int, rope: Rope) -> str:
    native, reach = model.native_context, math.floor(model.native_context * rope.factor)
    whose = "Its rotary embedding" if model.rope_local_theta is None else "The rotary embedding of its full layers"
    told = f"{whose} is scaled by {rope_told(rope)}"
    if rope.scaling == "dynamic":
        told += (
            f": rows of up to {format_count(native)} tokens stay as they are, in a longer one every position changes "
            "with the row's length."
        )
    elif total > reach:
        told += (
            f", which reaches {format_count(reach)} tokens. What it computes changes at every length, short ones too."
        )
    else:
        told += ", so that they lie within what it knows" if total > native else ""
        told += ". What it computes changes at every length, short ones too."
    return f"{told} Such an adapter belongs to this scaling (adapter/config.json); --set train.rope=none leaves it off."
