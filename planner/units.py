"""Quantities as people write them, read into plain numbers, and numbers written for people.

Inside the planner bytes, tokens and operations are numbers; only the borders see text. Reading is exact (no
binary floating point on the way) and refuses what has two readings instead of choosing one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from fractions import Fraction

from planner.errors import PlanError

KIB, MIB, GIB = 2**10, 2**20, 2**30
LARGEST = 2**60
"""Bytes or counts above this (1 EiB) are typing mistakes."""
LONGEST_SECONDS = 100 * 365 * 86_400

_BYTE_UNITS = {"b": 1} | {
    prefix + suffix: base**power
    for power, prefix in enumerate("kmgtp", start=1)
    for suffix, base in (("b", 1000), ("ib", 1024))
}
_COUNT_UNITS = {"k": KIB, "m": MIB}
_SECOND_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}
_DECIMAL_PREFIXES = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "p": 10**15, "e": 10**18}

# A comma is a thousands mark only where thousands marks stand: "7,5" is somebody's 7.5, never 75.
_NUMBER = r"(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+(?:_[0-9]+)*)(?:\.[0-9]+)?"
_QUANTITY = re.compile(rf"({_NUMBER})\s*([A-Za-z/ ]*)")
_DURATION_PART = re.compile(rf"({_NUMBER})\s*([A-Za-z]+)\s*")


def parse_bytes(text: str | int) -> int:
    """Read a size: ``"8GiB"`` is 8 x 2**30, ``"8GB"`` is 8 x 10**9, an int or a bare number is bytes.

    A part of a byte is dropped. Raises PlanError for a missing number, an unknown or ambiguous unit (``8G``),
    a negative size, and anything above 2**60.
    """
    if isinstance(text, int) and not isinstance(text, bool):
        return _within(text, str(text), "a size in bytes", "bytes")
    number, unit, asked = _split(text, "a size", "such as 8GiB, 8GB or 512MiB")
    if unit == "" and 0 < number < KIB:
        raise PlanError(asked, "without a unit is a number of bytes.", f"Write {asked}GiB, or {asked}B.")
    if unit in ("k", "m", "g", "t", "p"):
        digits, prefix = asked[: -len(unit)].strip(), unit.upper()
        decimal, binary = int(number * _BYTE_UNITS[unit + "b"]), int(number * _BYTE_UNITS[unit + "ib"])
        raise PlanError(
            asked,
            f"could be {digits} {prefix}B ({decimal:,} bytes) or {digits} {prefix}iB ({binary:,} bytes).",
            f"Write {digits}{prefix}B or {digits}{prefix}iB.",
        )
    if unit and unit not in _BYTE_UNITS:
        raise PlanError(asked, f"has the unit {unit!r}, which is not one of bytes.", "Write 8GiB or 8GB.")
    return _within(int(number * _BYTE_UNITS[unit or "b"]), asked, "a size in bytes", "bytes")


def format_bytes(count: int) -> str:
    """Write bytes for people: ``"7.45 GiB"``, with MiB, KiB and B for what is smaller than one GiB."""
    sign, size = ("-", -count) if count < 0 else ("", count)
    # The rounded figure decides: one byte less than a GiB is "1.00 GiB", never "1024.00 MiB".
    smaller = ((KIB, "KiB"), (MIB, "MiB"))
    unit, name = next((each for each in smaller if round(size / each[0], 2) < 1024), (GIB, "GiB"))
    return f"{sign}{size} B" if size < KIB else f"{sign}{size / unit:,.2f} {name}"


def parse_count(text: str | int) -> int:
    """Read a number of tokens or the like: ``"128K"`` is 131,072 (K is 1024, M is 2**20), ``"4,096"``, 4096.

    Raises PlanError for a fraction of one, a negative number, another suffix, and anything above 2**60.
    """
    if isinstance(text, int) and not isinstance(text, bool):
        return _within(text, str(text), "a count", "")
    number, unit, asked = _split(text, "a count", "such as 4096, 4,096 or 128K")
    if unit and unit not in _COUNT_UNITS:
        raise PlanError(asked, f"ends in {unit!r}; a count takes K (1,024) or M (1,048,576).", "Write 128K.")
    exact = number * _COUNT_UNITS.get(unit, 1)
    if exact.denominator != 1:
        raise PlanError(asked, "is not a whole number.", f"Write {int(exact)} or {int(exact) + 1}.")
    return _within(int(exact), asked, "a count", "")


def format_count(count: int) -> str:
    """Write a count with thousands marks: ``"131,072"``."""
    return f"{count:,}"


def parse_seconds(text: str | float) -> float:
    """Read a duration: ``"90s"``, ``"10m"`` (minutes), ``"24h"``, ``"1d"``, ``"1h30m"``; bare is seconds.

    Raises PlanError for what is no duration, is negative, or is above a hundred years.
    """
    shape = "such as 90s, 10m, 24h or 1d"
    if isinstance(text, (int, float)) and not isinstance(text, bool):
        if not 0 <= text <= LONGEST_SECONDS:  # false for NaN too
            raise PlanError(str(text), "is not a duration between 0 and 100 years.", f"Write one {shape}.")
        return float(text)
    asked = _text(text, "a duration", shape)
    if re.fullmatch(_NUMBER, asked):
        total = _number(asked)
    else:
        parts = list(_DURATION_PART.finditer(asked))
        if "".join(part.group(0) for part in parts) != asked:
            raise PlanError(asked, "is not a duration.", f"Write one {shape}.")
        units = [part.group(2).lower() for part in parts]
        for unit in units:
            if unit not in _SECOND_UNITS:
                raise PlanError(asked, f"has the unit {unit!r}; a duration takes s, m, h or d.", "Write 10m.")
        total = sum(
            (_number(part.group(1)) * _SECOND_UNITS[unit] for part, unit in zip(parts, units, strict=True)),
            Fraction(0),
        )
    if total > LONGEST_SECONDS:
        raise PlanError(asked, "is longer than 100 years.", f"Write one {shape}.")
    return float(total)


def format_seconds(seconds: float) -> str:
    """Write a duration with the two units that matter: ``"0.45 s"``, ``"9 min 5 s"``, ``"24 h"``."""
    if round(seconds, 2) < 10:
        return f"{seconds:.2f} s"
    if round(seconds, 1) < 60:
        return f"{seconds:.1f} s"
    # Rounded to the smaller unit before it is split, so that no part ever reads "60".
    if round(seconds) < 3600:
        return _two_units(round(seconds), 60, "min", "s")
    if round(seconds / 60) < 48 * 60:
        return _two_units(round(seconds / 60), 60, "h", "min")
    return _two_units(round(seconds / 3600), 24, "d", "h")


def parse_bandwidth(text: str) -> float:
    """Read ``"448 GB/s"`` (or GiB/s, TB/s ...) into bytes per second. Raises PlanError."""
    units = {f"{unit}/s": factor for unit, factor in _BYTE_UNITS.items()}
    if isinstance(text, str) and re.search(r"[KMGTP]i?b(it)?/s$", text.replace(" ", "")):
        raise PlanError(text, "could be bits or bytes a second.", f"Write {re.sub('b(it)?', 'B', text)} for bytes.")
    return _with_unit(text, units, "a bandwidth", "such as 448 GB/s")


def parse_flops(text: str) -> float:
    """Read ``"28.7 TFLOP/s"`` into operations per second, a multiply-add being two. Raises PlanError."""
    units = {f"{prefix}flop/s": factor for prefix, factor in _DECIMAL_PREFIXES.items()}
    return _with_unit(text, units, "a rate", "such as 28.7 TFLOP/s")


def parse_watts(text: str) -> float:
    """Read ``"175 W"`` into watts. Raises PlanError."""
    return _with_unit(text, {"w": 1}, "a power", "such as 175 W")


def format_rate(rate: float, unit: str) -> str:
    """Write a rate with three digits and a decimal prefix: ``"20.1 TFLOP/s"``, ``"448 GB/s"``."""
    short = "B/s" if unit == "bytes/s" else unit
    power = next((p for p in ("e", "p", "t", "g", "m", "k") if rate >= 0.9995 * _DECIMAL_PREFIXES[p]), "")
    return f"{float(f'{rate / _DECIMAL_PREFIXES[power]:.3g}'):g} {power.upper() if power != 'k' else 'k'}{short}"


def _two_units(smaller: int, ratio: int, large_name: str, small_name: str) -> str:
    large, small = divmod(smaller, ratio)
    return f"{large:,} {large_name}" + (f" {small} {small_name}" if small else "")


def _with_unit(text: str, units: Mapping[str, int], what: str, shape: str) -> float:
    number, unit, asked = _split(text, what, shape)
    if unit not in units:
        told = f"has the unit {unit!r}" if unit else "has no unit"
        raise PlanError(asked, f"{told}, so it is not {what}.", f"Write one {shape}.")
    return float(number * units[unit])


def _split(text: object, what: str, shape: str) -> tuple[Fraction, str, str]:
    """Number, lower-case unit without spaces, and the text as asked."""
    asked = _text(text, what, shape)
    match = _QUANTITY.fullmatch(asked)
    if match is None:
        raise PlanError(asked, f"is not {what}.", f"Write one {shape}.")
    return _number(match.group(1)), match.group(2).replace(" ", "").lower(), asked


def _text(text: object, what: str, shape: str) -> str:
    """The text without its outer spaces, once it is known to be a short, non-negative text."""
    if not isinstance(text, str):
        raise PlanError(repr(text), f"is not {what}.", f"Write one {shape}.")
    asked = text.strip()
    if not asked:
        raise PlanError(repr(text), f"is empty, not {what}.", f"Write one {shape}.")
    if len(asked) > 64:  # no quantity is this long, and reading endless digits is slow
        raise PlanError(asked[:20] + "...", f"is too long to be {what}.", f"Write one {shape}.")
    if asked[0] in "-\N{MINUS SIGN}" and asked[1:2].isdigit():
        raise PlanError(asked, f"is negative, which {what} cannot be.", f"Write one {shape}.")
    return asked


def _number(digits: str) -> Fraction:
    return Fraction(digits.replace(",", "").replace("_", ""))


def _within(value: int, asked: str, what: str, unit: str) -> int:
    if value < 0:
        raise PlanError(asked, f"is negative, which {what} cannot be.")
    if value > LARGEST:
        most = f"{LARGEST:,} {unit}".rstrip()
        raise PlanError(asked, f"is more than {what} can be here.", f"The most is {most}.")
    return value
