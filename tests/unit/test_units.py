"""Sizes as people write and read them, and the three roundings."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cowslice.errors import BadOption
from cowslice.units import GiB, KiB, MiB, TiB, div_ceil, format_size, is_power_of_two, parse_size, round_up

SIZES = st.integers(0, (1 << 63) - 1)
POSITIVE = st.integers(1, 1 << 40)


@pytest.mark.parametrize(
    "text, size",
    [
        ("0", 0),
        ("4096", 4096),
        ("512b", 512),
        ("512B", 512),
        ("64k", 64 * KiB),
        ("64K", 64 * KiB),
        ("64KiB", 64 * KiB),
        ("64 KB", 64 * KiB),
        (" 1M ", MiB),
        ("1.5G", 3 * GiB // 2),
        ("0.5k", 512),
        ("2T", 2 * TiB),
        ("1P", 1024 * TiB),
        ("7E", 7 << 60),
        (4096, 4096),
    ],
)
def test_a_size_is_read_as_people_write_it(text: str | int, size: int) -> None:
    assert parse_size(text) == size


NO_SIZES = [
    *("", "k", "1.", ".5M", "1.5", "1.5b", "1,5M", "-1", "+1", "1 2", "1bb", "1bib", "1ib", "64kk", "1e3", "0x10"),
    *("nan", "8E", "9223372036854775808", "9" * 5000, "1." + "0" * 5000 + "k", "\u0663k", "1\n2"),
    *(True, -1, 1 << 63),
]


@pytest.mark.parametrize("text", NO_SIZES, ids=lambda text: ascii(text)[:24])
def test_what_is_no_size_is_refused_by_the_option_s_name(text: str | int) -> None:
    with pytest.raises(BadOption, match=r"^l2-cache-size is "):
        parse_size(text, "l2-cache-size")


@given(st.text(max_size=12))
def test_any_text_is_a_size_or_a_bad_option(text: str) -> None:
    try:
        assert 0 <= parse_size(text) < 1 << 63
    except BadOption as error:
        assert text in str(error)


@given(SIZES)
def test_a_number_written_out_is_itself(size: int) -> None:
    assert parse_size(str(size)) == parse_size(size) == size


@given(st.integers(0, 8191), st.sampled_from("kMGT"))
def test_a_suffix_multiplies(count: int, suffix: str) -> None:
    assert parse_size(f"{count}{suffix}") == count * 1024 ** ("kMGT".index(suffix) + 1)


@pytest.mark.parametrize(
    "size, text",
    [
        (0, "0 B"),
        (1, "1 B"),
        (999, "999 B"),
        (1023, "1023 B"),
        (1024, "1 KiB"),
        (1536, "1.5 KiB"),
        (65536, "64 KiB"),
        (1000 * KiB - 300, "999 KiB"),
        (1023 * KiB, "1023 KiB"),
        (MiB - 1, "1023 KiB"),
        (40 * GiB, "40 GiB"),
        (1610612736, "1.5 GiB"),
        ((1 << 63) - 1, "8 EiB"),
        (1 << 75, "32768 EiB"),
    ],
)
def test_a_size_is_shown_as_people_read_it(size: int, text: str) -> None:
    assert format_size(size) == text


@given(SIZES)
def test_a_shown_size_has_at_most_four_digits_and_is_within_one_percent(size: int) -> None:
    shown = format_size(size)
    assert re.fullmatch(r"\d{1,4}(\.\d{1,2})? ([KMGTPE]i)?B", shown)
    number, name = shown.split()
    back = float(number) * 1024 ** ("BKMGTPE".index(name[0]))
    assert abs(back - size) <= size / 100


@given(st.integers(0, 1 << 70), POSITIVE)
def test_div_ceil_is_the_least_count_that_covers(n: int, d: int) -> None:
    assert (div_ceil(n, d) - 1) * d < n <= div_ceil(n, d) * d


@given(st.integers(0, 1 << 70), POSITIVE)
def test_round_up_is_the_next_multiple(n: int, step: int) -> None:
    assert round_up(n, step) % step == 0
    assert n <= round_up(n, step) < n + step


@given(st.integers(-5, 1 << 20))
def test_a_power_of_two_has_one_bit(n: int) -> None:
    assert is_power_of_two(n) == (n > 0 and bin(n).count("1") == 1)
