"""Zeros and differences are found where a few lines of Python find them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cowslice.ops.bytescan import data_runs, first_difference, is_zero

sparse_bytes = st.lists(
    st.one_of(st.integers(0, 700).map(bytes), st.binary(max_size=300)), max_size=6).map(b"".join)


@given(sparse_bytes)
def test_zero_means_no_other_byte(data: bytes) -> None:
    assert is_zero(data) == (not data.strip(b"\0"))


@given(sparse_bytes, st.integers(1, 700))
def test_data_runs_are_the_units_that_hold_another_byte(data: bytes, unit: int) -> None:
    assert data_runs(data, unit) == _merged(data, unit)


@given(sparse_bytes, st.data())
def test_the_first_difference_is_where_the_first_byte_differs(data: bytes, draw: st.DataObject) -> None:
    other = bytearray(data)
    if data:
        other[draw.draw(st.integers(0, len(data) - 1))] ^= draw.draw(st.sampled_from([0, 1, 255]))
    expected = next((at for at, (a, b) in enumerate(zip(data, other, strict=True)) if a != b), -1)
    assert first_difference(data, other) == expected


def test_buffers_of_two_lengths_are_refused() -> None:
    with pytest.raises(ValueError):
        first_difference(b"a", b"ab")


def test_a_unit_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError):
        data_runs(b"a", 0)


def _merged(data: bytes, unit: int) -> list[tuple[int, int]]:
    runs: list[tuple[int, int]] = []
    for start in range(0, len(data), unit):
        end = min(start + unit, len(data))
        if not data[start:end].strip(b"\0"):
            continue
        if runs and runs[-1][1] == start:
            runs[-1] = (runs[-1][0], end)
        else:
            runs.append((start, end))
    return runs
