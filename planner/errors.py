"""The one kind of error a user sees: what was asked, why it cannot be, the nearest thing that works."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from difflib import get_close_matches


class PlanError(ValueError):
    """A mistake in what the user gave, or a thing that cannot be done, told so that it can be mended.

    Args:
        asked: what the user asked for, as they wrote it.
        why: why that cannot be.
        nearest: the nearest thing that works; empty when nothing does.
    """

    def __init__(self, asked: str, why: str, nearest: str = "") -> None:
        self.asked, self.why, self.nearest = asked, why, nearest
        super().__init__(f"{asked}: {why}" + (f" {nearest}" if nearest else ""))


class PlanErrors(PlanError):
    """Several mistakes found in one look, reported together so that one round mends them all."""

    def __init__(self, errors: Sequence[PlanError]) -> None:
        assert errors
        self.errors = tuple(errors)
        ValueError.__init__(self, "\n".join(str(error) for error in errors))
        self.asked, self.why, self.nearest = errors[0].asked, errors[0].why, errors[0].nearest


def raise_all(errors: Sequence[PlanError]) -> None:
    """Raise nothing, the one error, or all of them together."""
    if len(errors) == 1:
        raise errors[0]
    if errors:
        raise PlanErrors(errors)


def did_you_mean(word: str, known: Iterable[str], listing: str = "") -> str:
    """Name the closest known words, else say where the list is (``listing`` is a command)."""
    close = get_close_matches(word, list(known), n=3, cutoff=0.5)
    if close:
        return f"Did you mean {' or '.join(close)}?"
    return f"`{listing}` lists what there is." if listing else ""
