"""Which runs constants may be fitted to, and which are held out: whole models, and the longest of every other one.

A run's set follows from its model and its length alone, whatever it is called; `fit` asks here. Constants that are
shipped were fitted to nothing that is held out. Six runs that are older than this rule had been in fits, and formulas
were made with them at hand; constants were then fitted again without them. No run of the grid had been seen by then;
formulas that were changed after some of them are told of in reports/validation.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

Set = Literal["calibration", "holdout"]

CALIBRATED_UP_TO: Mapping[str, int] = {
    "gemma-3-1b": 65_536,
    "llama-3.1-8b": 131_072,
    "llama-3.2-1b": 65_536,
    "mistral-7b-v0.3": 16_384,
    "phi-2": 262_144,
    "qwen2.5-0.5b": 65_536,
    "qwen3-1.7b": 16_384,
    "smollm2-135m": 8_192,
}
"""By model, the longest sequence, in tokens, that constants may be fitted to. A model that is not here is held out."""


def set_of(model: str, tokens: int) -> Set:
    """The set of a run, by the id of its model and the tokens of one of its sequences."""
    return "calibration" if tokens <= CALIBRATED_UP_TO.get(model, 0) else "holdout"


def set_of_record(content: Mapping[str, Any]) -> Set:
    """The set of a run by its record."""
    return set_of(content["model"]["id"], content["total_tokens"])
