"""The advised setting: enough, and no larger than that; what is said beside it is true of the curves."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from cowslice.errors import BadOption
from cowslice.tune.advise import ENOUGH, advise
from cowslice.tune.study import Kept
from cowslice.tune.wording import as_json, sentences, verdict
from cowslice.units import KiB, MiB
from tests.unit.tune.evidence import gathered, loop, requests, uniform


def topics(advice: object) -> dict[str, str]:
    return {sentence.topic: sentence.text for sentence in sentences(advice)}  # type: ignore[arg-type]


def test_uniform_reads_need_the_whole_map(tmp_path: Path) -> None:
    advice = advise(gathered(tmp_path, uniform(), l2_cache_size="512k"))
    assert (advice.qemu.cache_bytes, advice.qemu.entry_bytes) == (MiB, 64 * KiB)
    assert advice.qemu_today.miss_ratio == pytest.approx(0.5, abs=0.02)
    assert verdict(advice) == "starved"
    assert "times as fast" in topics(advice)["today"]


def test_a_loop_needs_what_it_loops_over_and_has_a_cliff_below(tmp_path: Path) -> None:
    advice = advise(gathered(tmp_path, loop(0.5), l2_cache_size="256k"))
    assert advice.cliff is not None
    assert advice.cliff.above <= advice.qemu.cache_bytes < 600 * KiB
    assert advice.cliff.misses_below > 0.9
    assert advice.cliff.misses_above == 0
    assert topics(advice)["cliff"].endswith("the advised size is just above it, so a little more is a margin.")
    roomy = replace(advice, qemu=replace(advice.qemu, cache_bytes=2 * advice.cliff.above))
    assert topics(roomy)["cliff"].endswith("loops over a part of the disk: stay well above.")


def test_a_cache_larger_than_the_workload_wastes_memory(tmp_path: Path) -> None:
    advice = advise(gathered(tmp_path, loop(0.1)))
    assert verdict(advice) == "wasteful"
    assert "buy nothing" in topics(advice)["today"]


@pytest.mark.parametrize("share", [0.1, 0.4, 1.0])
def test_the_advised_setting_is_enough_and_half_of_it_is_not(tmp_path: Path, share: float) -> None:
    advice = advise(gathered(tmp_path, loop(share), l2_cache_size="128k"))
    assert advice.qemu.rate >= ENOUGH * 0.99 * advice.best_rate
    line = next(line for line in advice.lines if line.entry_bytes == advice.qemu.entry_bytes and line.engine == "qemu")
    less = [choice for choice in line.choices if choice.cache_bytes < 0.5 * line.knee.cache_bytes]
    assert all(choice.rate < ENOUGH * advice.best_rate for choice in less)


def test_lines_never_fall(tmp_path: Path) -> None:
    for line in advise(gathered(tmp_path, uniform())).lines:
        rates = [choice.rate for choice in line.choices]
        assert all(after >= before * 0.98 for before, after in pairwise(rates))
        assert rates[-1] >= ENOUGH * max(rates)


@pytest.mark.parametrize("today, bought", [("256k", "Another 768 KiB"), ("1M", ""), ("512k", "Another 512 KiB")])
def test_the_next_megabyte_is_priced_as_far_as_there_is_map(tmp_path: Path, today: str, bought: str) -> None:
    advice = advise(gathered(tmp_path, uniform(), l2_cache_size=today))
    told = topics(advice).get("next", "")
    assert told.startswith(bought)
    assert bool(told) is bool(bought)
    assert advice.next_megabyte.cache_bytes == MiB
    assert advice.next_megabyte.rate == pytest.approx(advice.best_rate)


def test_other_clusters_and_extended_entries_are_told_by_what_they_would_need(tmp_path: Path) -> None:
    """Uniform reads need the whole map: 8 bytes for each cluster of 8 GiB, 16 with subclusters."""
    advice = advise(gathered(tmp_path, uniform()))
    found = {(other.geometry.cluster_size, other.geometry.extended_l2): other for other in advice.others}
    assert {key: other.full_bytes for key, other in found.items()} == {
        (16 * KiB, False): 4 * MiB, (256 * KiB, False): 256 * KiB, (MiB, False): MiB, (64 * KiB, True): 2 * MiB}
    needed = {key: other.choice.cache_bytes for key, other in found.items()}
    assert needed[16 * KiB, False] > 3 * MiB
    assert needed[256 * KiB, False] == 256 * KiB
    assert needed[MiB, False] == 64 * KiB
    assert needed[64 * KiB, True] > 1.5 * MiB
    assert "256 KiB with 256 KiB clusters" in topics(advice)["clusters"]
    assert "with extended L2 entries and 64 KiB clusters" in topics(advice)["clusters"]


def test_a_shuffled_image_is_told_what_order_would_give(tmp_path: Path) -> None:
    advice = advise(gathered(tmp_path, uniform(), layout="random"))
    assert advice.compaction is not None
    assert advice.compaction.then < advice.compaction.now / 4
    assert "qemu-img convert" in topics(advice)["map"]
    assert advise(gathered(tmp_path, uniform())).compaction is None


@pytest.mark.parametrize("places, why", [
    (np.arange(200), "only 200 requests"),
    (np.arange(2000) * 1024, "first in its last quarter"),
])  # fmt: skip
def test_a_short_trace_is_said_to_be_one(tmp_path: Path, places: np.ndarray, why: str) -> None:
    advice = advise(gathered(tmp_path, requests(places)))
    assert why in advice.too_short
    assert "too short to say" in topics(advice)["doubt"]


def test_a_trace_that_comes_back_is_long_enough(tmp_path: Path) -> None:
    assert advise(gathered(tmp_path, uniform())).too_short == ""


def test_everything_fits_into_json(tmp_path: Path) -> None:
    told = json.loads(json.dumps(as_json(advise(gathered(tmp_path, uniform(), l2_cache_size="512k")))))
    assert told["verdict"] == "starved"
    assert told["advised"]["cache-size"] == MiB
    assert {curve["engine"] for curve in told["curves"]} == {"qemu", "cowslice"}
    assert told["paste"]["drive"].endswith("l2-cache-size=1M,l2-cache-entry-size=64k")


def test_a_trace_without_requests_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadOption, match="no request that reads or writes"):
        gathered(tmp_path, [])


def test_what_is_kept_is_the_same_each_time_and_a_long_trace_is_read_again() -> None:
    chunks = uniform(100) + uniform(50)
    passes: list[int] = []

    class Source:
        def __iter__(self):  # type: ignore[no-untyped-def]
            passes.append(1)
            return iter(chunks)

    for most, expected in ((1000, 1), (120, 3)):
        passes.clear()
        kept = Kept(Source(), most)
        assert [sum(map(len, kept)) for _ in range(3)] == [150] * 3
        assert len(passes) == expected
