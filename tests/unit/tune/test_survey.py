"""What a trace is said to be like, whatever its chunks."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cowslice.tune.requests import Operation, Requests
from cowslice.tune.survey import COLUMNS, ROWS, Habits, Survey
from cowslice.units import MiB

DISK = 480 * MiB
PIECE = MiB


def requests(offsets: list[int], length: int = 4096, *, operation: int = 0, step: float = 0.5) -> Requests:
    count = len(offsets)
    return Requests(np.arange(count) * step, np.full(count, operation, np.uint8), np.array(offsets, np.uint64),
                    np.full(count, length, np.uint64))


def surveyed(*chunks: Requests) -> Habits:
    survey = Survey(DISK, PIECE)
    assert list(survey.watch(chunks)) == list(chunks)
    return survey.habits()


def test_requests_are_counted_by_kind_length_and_time() -> None:
    found = surveyed(requests([0, MiB, 2 * MiB]), requests([0], 8192, operation=Operation.WRITE))
    assert (found.requests, found.reads, found.writes, found.mean_length) == (4, 3, 1, 5120)
    assert (found.touched, found.end) == (3, 2 * MiB + 4096)


def test_times_give_a_rate() -> None:
    assert surveyed(requests([0] * 11, step=0.1)).arrivals == pytest.approx(11)


def test_without_times_there_is_no_rate() -> None:
    assert surveyed(requests([0] * 11, step=float("nan"))).arrivals is None


def test_a_request_stands_in_its_row_and_in_its_column() -> None:
    found = surveyed(requests([0] * 64), requests([DISK - 4096] * 64))
    assert found.per_column == 64
    assert found.heat[0].tolist() == [64, 0]
    assert found.heat[ROWS - 1].tolist() == [0, 64]


def test_first_touches_late_in_the_trace_are_told() -> None:
    old = list(range(0, 100 * MiB, MiB)) * 30
    assert surveyed(requests(old)).late_share == 0
    assert surveyed(requests([*old, *range(100 * MiB, 200 * MiB, MiB)])).late_share == pytest.approx(0.5)


def test_flushes_go_nowhere() -> None:
    found = surveyed(requests([0] * 5, 0, operation=Operation.FLUSH))
    assert (found.requests, found.heat.size, found.late_share) == (0, 0, 0.0)


@given(st.lists(st.integers(0, DISK - 4096), max_size=20), st.integers(1, 2500), st.integers(1, 2000))
def test_the_map_holds_every_request_whatever_the_chunks(offsets: list[int], times: int, cut: int) -> None:
    offsets = offsets * times
    whole = surveyed(requests(offsets))
    parts = surveyed(*(requests(offsets[at : at + cut]) for at in range(0, len(offsets), cut)))
    assert whole.heat.sum() == len(offsets) == whole.requests
    assert np.array_equal(whole.heat, parts.heat)
    assert np.array_equal(whole.fresh, parts.fresh)
    assert whole.heat.shape[1] <= COLUMNS
    pieces = {(offset + within) // PIECE for offset in offsets for within in (0, 4095)}
    assert whole.fresh.sum() == whole.touched == len(pieces)
