"""Reads the fields of a config.json one by one, and keeps every complaint for one error that names them all."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from planner.errors import PlanError

LARGEST_SIZE = 2**31

ABSENT = object()  # tells a field that is not there from one that is null


class Fields:
    """Reads fields and keeps every complaint, so that one look at a file finds all that is wrong with it.

    A reader that complains gives 0, "" or False, which no later check takes for a mistake of its own.

    Fields are asked for by their usual name; ``names`` has those that the family calls otherwise, the name that
    counts first. Complaints use the name that stands in the file.
    """

    def __init__(
        self, config: Mapping[str, Any], where: str, names: Mapping[str, tuple[str, ...]] | None = None
    ) -> None:
        self.config, self.where, self.names = config, where, names or {}
        self.errors: list[PlanError] = []
        self.asked: set[str] = set()
        self.absent: set[str] = set()  # names of fields that were asked for and are there by none of them

    def refuse_misspelt(self) -> None:
        """Complain of what nothing asked for where it is but a letter off a field that is not there.

        Files hold much that no size depends on, and all of that is passed over.
        """
        for key in self.config.keys() - self.asked:
            if close := get_close_matches(key, sorted(self.absent), n=1, cutoff=0.93):
                self.errors.append(
                    PlanError(f"{self.where}: {key}", "is not a known field.", f"Did you mean {close[0]}?")
                )

    def called(self, name: str) -> str:
        """The name that this file has for a field, or would have."""
        known = self.names.get(name, (name,))
        self.asked.update(known)
        if not any(each in self.config for each in known):
            self.absent.update(known)
        return next((each for each in known if each in self.config), known[0])

    def value(self, name: str, absent: Any = ABSENT) -> Any:
        """What stands in the file, unchecked; ``absent`` where there is no such field."""
        return self.config.get(self.called(name), absent)

    def refuse(self, name: str, why: str, nearest: str = "") -> None:
        """Keep a complaint about a field."""
        self.errors.append(PlanError(f"{self.where}: {self.called(name)}", why, nearest))

    def whole(
        self,
        name: str,
        absent: int | None = None,
        null: int | None = None,
        least: int = 1,
        most: int = LARGEST_SIZE,
    ) -> int:
        """A whole number from ``least`` to ``most``; ``absent`` and ``null`` stand in where they are given."""
        value = self.value(name)
        if value is ABSENT and absent is not None:
            return absent
        if value is None and null is not None:
            return null
        if value is ABSENT:
            self.refuse(name, "is missing.")
        elif isinstance(value, bool) or not isinstance(value, int):
            self.refuse(name, f"is {shown(value)}, not a whole number.")
        elif not least <= value <= most:
            self.refuse(name, f"is {shown(value)}, outside {least} to {most}.")
        else:
            return value
        return 0

    def flag(self, name: str, absent: bool = False) -> bool:
        """true or false."""
        value = self.value(name, absent)
        if not isinstance(value, bool):
            self.refuse(name, f"is {shown(value)}, neither true nor false.")
            return False
        return value

    def rate(self, name: str | None, absent: float = 0.0) -> float:
        """A dropout rate, from 0 to below 1; 0 if the family has no such dropout (None)."""
        if name is None:
            return 0.0
        value = self.value(name, absent)
        if not (is_number(value) and 0 <= value < 1):
            self.refuse(name, f"is {shown(value)}, not a rate from 0 to below 1.")
            return 0.0
        return float(value)

    def positive(self, name: str, absent: float | None) -> float | None:
        """A number above 0, or None where the file says null, or says nothing and ``absent`` is None."""
        return None if self.value(name, absent) is None else self.number(name, absent or 1.0)

    def number(self, name: str, absent: float = 1.0) -> float:
        """A number above 0."""
        value = self.value(name, absent)
        if not (is_number(value) and value > 0):
            self.refuse(name, f"is {shown(value)}, not a positive number.")
            return 0.0
        return float(value)

    def text(self, name: str, absent: str) -> str:
        """A name."""
        value = self.value(name, absent)
        if not isinstance(value, str) or not value:
            self.refuse(name, f"is {shown(value)}, not a name.")
            return ""
        return value

    def choices(self, name: str, allowed: Sequence[Any], said: str) -> list[Any] | None:
        """A list that holds nothing but ``allowed``, which ``said`` gives in words; None if absent or null."""
        value = self.value(name, None)
        if value is None:
            return None
        if not isinstance(value, list) or not all(type(each) is type(allowed[0]) and each in allowed for each in value):
            self.refuse(name, f"may hold {said}, nothing else.")
            return None
        return value


def is_number(value: object) -> bool:
    """Whether it is a finite number of reasonable size; true and false are none."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return math.isfinite(value) if isinstance(value, float) else abs(value) < 2**63


def kind(value: object) -> str:
    """What JSON calls such a value."""
    names = {list: "a list", str: "a string", type(None): "null", bool: "true or false"}
    return names.get(type(value), "a number")


def shown(value: object) -> str:
    """A value as JSON would write it, cut where it is long."""
    text = json.dumps(value, default=repr)
    return text if len(text) <= 60 else text[:57] + "..."
