"""What a run has to train on and to judge by, told at its beginning and in its record."""

from __future__ import annotations

from typing import Any

from rich.console import Console

from planner.errors import PlanError
from trainer.built import BuiltRun
from trainer.data import Data


def data_counts(data: Data) -> dict[str, Any]:
    """Documents, rows and tokens of each part, for the record."""
    parts = {"train": data.train, "validation": data.validation}
    return {
        name: {
            "documents": part.documents,
            "rows": len(part.rows),
            "tokens": part.tokens,
            "lost": part.lost,
            "longest_row": part.longest,
        }
        for name, part in parts.items()
    } | {"skipped": {reason: len(names) for reason, names in data.reading.skipped.items()}}


def tell_data(console: Console, data: Data, built: BuiltRun) -> None:
    """What there is to train on.

    Raises:
        PlanError: the tokenizer knows tokens that the model does not.
    """
    for name, part in (("Training", data.train), ("Validation", data.validation)):
        console.print(
            f"{name}: {part.documents:,} documents, {part.tokens:,} tokens ({part.lost:,} of them never a "
            f"target), {len(part.rows):,} rows, the longest of {part.longest:,} tokens.",
            highlight=False,
        )
    for reason, names in data.reading.skipped.items():
        more = f" and {len(names) - 3:,} more" if len(names) > 3 else ""
        console.print(f"Left out, {reason}: {', '.join(names[:3])}{more}.", highlight=False)
    vocab, largest = (
        built.base.config.vocab_size,
        max(data.train.largest_token, data.validation.largest_token),
    )
    if largest >= vocab:
        why = f"gives token {largest:,}, and the model's vocabulary has {vocab:,} rows."
        raise PlanError("the tokenizer", why, "Tokenizer and model have to come from the same place.")
