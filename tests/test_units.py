"""Quantities in and out of text: exact where exact is possible, refused where there are two readings."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.errors import PlanError
from planner.units import (
    GIB,
    LARGEST,
    format_bytes,
    format_count,
    format_seconds,
    parse_bandwidth,
    parse_bytes,
    parse_count,
    parse_flops,
    parse_seconds,
    parse_watts,
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("8GiB", 8 * 2**30),
        ("8GB", 8 * 10**9),
        ("32 GiB", 32 * 2**30),
        ("512MiB", 512 * 2**20),
        ("1.5 gib", 3 * 2**29),
        ("7974 MiB", 7974 * 2**20),
        ("2 TiB", 2 * 2**40),
        ("1,024 KiB", 2**20),
        ("8589934592", 2**33),
        ("7B", 7),
        ("0", 0),
        (12, 12),
    ],
)
def test_sizes_are_read_as_written(text: str | int, expected: int) -> None:
    assert parse_bytes(text) == expected


@pytest.mark.parametrize("text", ["8G", "8 g", "512M", "1.5T", "3K"])
def test_a_unit_with_two_readings_is_refused_with_both(text: str) -> None:
    with pytest.raises(PlanError) as caught:
        parse_bytes(text)
    digits, letter = text[:-1].strip(), text[-1].upper()
    assert f"{digits} {letter}B" in caught.value.why
    assert f"{digits} {letter}iB" in caught.value.why
    assert parse_bytes(f"{digits}{letter}iB") > parse_bytes(f"{digits}{letter}B")


def test_the_ambiguous_8G_names_both_numbers_of_bytes() -> None:
    with pytest.raises(PlanError, match=r"8,000,000,000 bytes.*8,589,934,592 bytes"):
        parse_bytes("8G")


@pytest.mark.parametrize(
    "text",
    ["", "  ", "-1", "-3GiB", "GiB", "nan", "inf", "8 Gbit", "8e9", "7,5GiB", "1,23GB", "8 GiB 2", "9" * 500],
)
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(PlanError):
        parse_bytes(text)


@pytest.mark.parametrize("value", [-1, LARGEST + 1, f"{LARGEST + 1}", "2000000 TiB", True, None, 8.0, ["8GiB"]])
def test_sizes_out_of_range_or_of_another_type_are_refused(value: object) -> None:
    with pytest.raises(PlanError):
        parse_bytes(value)  # type: ignore[arg-type]
    assert parse_bytes(LARGEST) == LARGEST


def test_a_small_bare_number_is_surely_not_meant_as_bytes() -> None:
    with pytest.raises(PlanError, match="32GiB"):
        parse_bytes("32")


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (8 * 10**9, "7.45 GiB"),
        (GIB, "1.00 GiB"),
        (GIB - 1, "1.00 GiB"),
        (621 * 2**20, "621.00 MiB"),
        (2**20 - 1, "1.00 MiB"),
        (1024, "1.00 KiB"),
        (1023, "1023 B"),
        (0, "0 B"),
        (-8 * 10**9, "-7.45 GiB"),
        (2**42, "4,096.00 GiB"),
    ],
)
def test_sizes_are_printed_with_two_decimals(size: int, text: str) -> None:
    assert format_bytes(size) == text


@given(st.integers(min_value=1024, max_value=LARGEST))
def test_a_printed_size_reads_back_within_its_last_digit(size: int) -> None:
    unit = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30}[format_bytes(size)[-3:]]
    assert abs(parse_bytes(format_bytes(size)) - size) <= 0.00501 * unit + 1 + size * 2**-52


@given(st.integers(min_value=0, max_value=2**30), st.sampled_from(["KiB", "MiB", "GiB"]))
def test_a_size_in_units_is_exact(number: int, unit: str) -> None:
    power = {"KiB": 10, "MiB": 20, "GiB": 30}[unit]
    assert parse_bytes(f"{number} {unit}") == number << power
    assert parse_bytes(f"{number:,}{unit.lower()}") == number << power


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("128K", 131_072),
        ("128k", 131_072),
        ("1M", 2**20),
        ("0.5M", 2**19),
        ("4,096", 4096),
        ("4_096", 4096),
        (7, 7),
    ],
)
def test_counts(text: str | int, expected: int) -> None:
    assert parse_count(text) == expected


@pytest.mark.parametrize("text", ["", "-1", "1.5", "0.3M", "128KiB", "4,09", "1G", "twelve", "2" * 40, -1, LARGEST + 1])
def test_what_is_no_count_is_refused(text: str | int) -> None:
    with pytest.raises(PlanError):
        parse_count(text)


@given(st.integers(min_value=0, max_value=LARGEST))
def test_printed_counts_read_back(count: int) -> None:
    assert parse_count(format_count(count)) == count
    assert format_count(131_072) == "131,072"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("10m", 600),
        ("24h", 86_400),
        ("90s", 90),
        ("1d", 86_400),
        ("1h30m", 5400),
        ("1 h 30 m", 5400),
        ("0.5h", 1800),
        ("45", 45),
        (2.5, 2.5),
    ],
)
def test_durations(text: str | float, expected: float) -> None:
    assert parse_seconds(text) == expected


@pytest.mark.parametrize("text", ["", "m", "5x", "-5s", "10m later", "99999d", float("nan"), float("inf"), -1.0, True])
def test_what_is_no_duration_is_refused(text: str | float) -> None:
    with pytest.raises(PlanError):
        parse_seconds(text)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.446, "0.45 s"),
        (9.996, "10.0 s"),
        (59.96, "1 min"),
        (545, "9 min 5 s"),
        (3599.6, "1 h"),
        (7500, "2 h 5 min"),
        (86_399, "24 h"),
        (86_400, "24 h"),
        (266_400, "3 d 2 h"),
    ],
)
def test_durations_are_printed_without_carry_mistakes(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


@given(st.floats(min_value=0, max_value=1e8))
def test_no_printed_part_reaches_its_larger_unit(seconds: float) -> None:
    text = format_seconds(seconds)
    assert not any(part in f" {text}" for part in (" 60 s", " 60.0 s", " 60 min", " 48 h"))


def test_bandwidths_rates_and_power() -> None:
    assert parse_bandwidth("448 GB/s") == 448e9
    assert parse_bandwidth("15.75 GB/s") == 15.75e9
    assert parse_bandwidth("1 GiB/s") == 2**30
    assert parse_flops("28.7 TFLOP/s") == 28.7e12
    assert parse_watts("175 W") == 175


@pytest.mark.parametrize("text", ["448", "448 GB", "448 Gb/s", "448 Gbit/s", "28.7 TFLOPS", "-1 GB/s", "fast", 448])
def test_a_bandwidth_needs_its_unit(text: str) -> None:
    with pytest.raises(PlanError):
        parse_bandwidth(text)
