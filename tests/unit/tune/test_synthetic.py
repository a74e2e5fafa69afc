"""Synthetic workloads are the same for a seed, stay inside the disk, and have the shape that their name says."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cowslice.errors import BadOption
from cowslice.tune.requests import MOST_IN_CHUNK, Operation, Requests, joined
from cowslice.tune.synthetic import SHAPES, shuffled, synthetic
from cowslice.units import GiB, KiB, MiB


def everything(description: str, size: int = GiB) -> Requests:
    return joined(list(synthetic(description, size=size)))


@pytest.mark.parametrize("name", SHAPES)
def test_a_workload_is_the_same_in_every_pass_and_another_with_another_seed(name: str) -> None:
    source = synthetic(f"{name}:requests=70000,write=0.5", size=GiB)
    first, again = joined(list(source)), joined(list(source))
    other = everything(f"{name}:requests=70000,write=0.5,seed=2")
    assert np.array_equal(first.offset, again.offset)
    assert np.array_equal(first.operation, again.operation)
    assert not np.array_equal(first.operation, other.operation)


@pytest.mark.parametrize("name", SHAPES)
def test_a_long_workload_comes_in_bounded_chunks_that_differ(name: str) -> None:
    chunks = list(synthetic(f"{name}:requests=140000", size=64 * GiB))
    assert [len(chunk) for chunk in chunks] == [MOST_IN_CHUNK, MOST_IN_CHUNK, 140000 - 2 * MOST_IN_CHUNK]
    assert not np.array_equal(chunks[0].offset, chunks[1].offset)


@given(name=st.sampled_from(list(SHAPES)), size=st.integers(128 * KiB, 1 << 50), seed=st.integers(0, 1 << 64 - 1))
def test_every_request_lies_inside_the_disk(name: str, size: int, seed: int) -> None:
    asked = everything(f"{name}:requests=300,seed={seed}", size)
    assert len(asked) == 300
    assert int((asked.offset + asked.length).max()) <= size
    assert int(asked.length.min()) > 0
    assert not (asked.offset % np.uint64(4 * KiB)).any()


def test_a_share_of_requests_writes() -> None:
    asked = everything("uniform:requests=100000,write=0.3,length=64k")
    assert (asked.operation == Operation.WRITE).mean() == pytest.approx(0.3, abs=0.01)
    assert set(asked.length.tolist()) == {64 * KiB}


@pytest.mark.parametrize("theta", [0.6, 0.99, 1.0, 1.4])
def test_places_of_zipf_are_as_often_asked_as_its_law_says(theta: float) -> None:
    places = 1 << 18
    asked = everything(f"zipf:theta={theta},requests=500000", places * 4 * KiB)
    counted = np.sort(np.bincount((asked.offset // np.uint64(4 * KiB)).astype(np.int64), minlength=places))[::-1]
    law = np.arange(1, places + 1, dtype=np.float64) ** -theta
    law /= law.sum()
    assert counted[0] / 500000 == pytest.approx(law[0], rel=0.15, abs=2e-4)
    assert counted[:2000].sum() / 500000 == pytest.approx(law[:2000].sum(), abs=0.03)
    assert (counted[:100] > 0).all()


def test_ranks_behind_the_exact_ones_follow_the_same_law() -> None:
    asked = everything("zipf:theta=0,requests=400000", (1 << 19) * 4 * KiB)  # uniform: an eighth is exact
    halves = np.bincount((asked.offset // np.uint64(GiB)).astype(np.int64), minlength=2)
    distinct = len(np.unique(asked.offset))
    assert halves[0] / 400000 == pytest.approx(0.5, abs=0.01)
    assert distinct / (1 << 19) == pytest.approx(1 - np.exp(-400000 / (1 << 19)), abs=0.005)


@given(count=st.integers(1, 5000))
def test_a_shuffle_gives_each_number_once(count: int) -> None:
    assert sorted(shuffled(np.arange(count, dtype=np.uint64), count).tolist()) == list(range(count))


def test_streams_go_through_their_parts_in_turn() -> None:
    asked = everything("sequential:requests=6,streams=2,length=1M", 8 * MiB)
    assert (asked.offset // np.uint64(MiB)).tolist() == [0, 4, 1, 5, 2, 6]


def test_a_mixed_workload_goes_through_the_disk_in_order_between_other_requests() -> None:
    asked = everything("mixed:requests=100000,sequential=0.25")
    ordered = asked.offset[3::4]
    assert np.array_equal(ordered, np.arange(25000, dtype=np.uint64) * np.uint64(4 * KiB))


def test_the_working_set_of_a_phase_is_a_share_of_the_disk() -> None:
    asked = everything("phases:requests=80000,phases=4,share=0.05", 4 * GiB)
    spans = [int(part.max() - part.min()) for part in np.split(asked.offset, 4)]
    assert all(0.045 * 4 * GiB < span < 0.05 * 4 * GiB for span in spans)
    assert int(asked.offset.max() - asked.offset.min()) > 0.1 * 4 * GiB


def test_a_boot_reads_in_runs_and_touches_a_small_part() -> None:
    asked = everything("boot", 64 * GiB)
    follows = asked.offset[1:] == asked.offset[:-1] + asked.length[:-1]
    assert 0.6 < follows.mean() < 0.95
    assert len(np.unique(asked.offset // np.uint64(MiB))) < 0.15 * 64 * KiB


@pytest.mark.parametrize("description, told", [
    ("zip", "expected one of uniform, zipf, sequential, mixed, phases, boot"),
    ("uniform:theta=1", "expected KEY=VALUE with one of requests .*, seed .*, length .*, write"),
    ("uniform:seed", "has 'seed', expected KEY=VALUE"),
    ("uniform:seed=1,seed=2", "'seed' twice"),
    ("zipf:theta=much", "theta of workload .* is 'much', expected a number from 0 to 10"),
    ("zipf:theta=nan", "is 'nan', expected a number"),
    ("zipf:requests=0", "expected a whole number from 1 to"),
    ("zipf:length=1000", "expected a multiple of 512"),
    ("zipf:length=x", "expected a size"),
    ("boot:length=4k", "has 'length=4k', expected"),
])
def test_what_a_description_cannot_be_is_told_with_what_it_can(description: str, told: str) -> None:
    with pytest.raises(BadOption, match=told):
        synthetic(description, size=GiB)


def test_a_disk_without_room_for_a_request_is_refused() -> None:
    with pytest.raises(BadOption, match="the disk has 4095 bytes, expected at least 4096"):
        synthetic("uniform", size=4095)
