"""What is simulated is what happens: in a plain LRU, in our own engine, and in QEMU by its own account."""

from __future__ import annotations

import re
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import cowslice
from cowslice.format.geometry import Geometry
from cowslice.ops.layout import write_populated_image
from cowslice.testing import peers
from cowslice.testing.stackmodel import LruTwin
from cowslice.tune.curve import slice_curves
from cowslice.tune.curvepacked import packed_curve, packed_map
from cowslice.tune.simulate import MapSetting, QemuSetting, simulate
from cowslice.units import GiB, KiB, MiB

LENGTH = 4 * KiB


def trace_of(offsets):
    """Reads of 4 KiB, in two chunks."""
    offsets = np.asarray(offsets, dtype=np.uint64)
    return [SimpleNamespace(operation=np.zeros(len(part), dtype=np.uint8), offset=part,
                            length=np.full(len(part), LENGTH, dtype=np.uint64)) for part in np.array_split(offsets, 2)]


def workload(kind, blocks, count, seed=3):
    """Offsets of reads of 4 KiB on a disk of so many blocks."""
    dice = np.random.default_rng(seed)
    steps = np.arange(count)
    scattered = dice.permutation(1024)[np.minimum(dice.zipf(1.3, count), 1024) - 1] * (blocks // 1024)
    found = {
        "uniform": dice.integers(0, blocks, count),
        "zipf": scattered,
        "sequential": steps * 37 % blocks,
        "mixed": np.where(dice.random(count) < 0.7, scattered, steps * 37 % blocks),
        "loop": steps * (blocks // 160) % (blocks // 2),
    }[kind]
    return found.astype(np.uint64) * np.uint64(LENGTH)


KINDS = ["uniform", "zipf", "sequential", "mixed", "loop"]


@given(st.lists(st.integers(0, 30), max_size=200), st.integers(0, 40))
def test_qemu_is_a_plain_lru_of_whole_entries_two_at_least(numbers, entries):
    size, geometry = 1 * GiB, Geometry(16)
    offsets = [number * 32 * MiB for number in numbers]
    [done] = simulate(trace_of(offsets), [QemuSetting(entries * 4096 + 4095, 4096)], geometry, disk_size=size)
    twin = LruTwin(max(2, entries))
    assert done.missed.tolist() == [twin.misses(number) for number in numbers]
    assert (done.reads, done.misses) == (len(numbers), int(done.missed.sum()))
    curve = slice_curves(trace_of(offsets), geometry, disk_size=size).by_entry_bytes[4096]
    assert curve.miss_ratio(entries * 4096 + 4095) == done.miss_ratio


@pytest.mark.parametrize("policy", ["clock2q+", "lru"])
@pytest.mark.parametrize("layout", ["random", "fragments", "sequential"])
@pytest.mark.parametrize("kind", KINDS)
def test_ours_is_within_half_a_point_of_the_engines_own_counters(kind, layout, policy, tmp_path):
    write_populated_image(tmp_path / "disk.qcow2", size=8 * GiB, layout=layout)
    for budget in (64 * KiB, 160 * KiB):
        hold_against_engine(tmp_path / "disk.qcow2", kind, budget, policy=policy)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("entry_bytes, readahead", [(16 * KiB, True), (16 * KiB, False), (512, True), (4096, False)])
def test_ours_is_as_near_for_other_units_of_reading(kind, entry_bytes, readahead, tmp_path):
    write_populated_image(tmp_path / "disk.qcow2", size=8 * GiB, layout="random")
    hold_against_engine(tmp_path / "disk.qcow2", kind, 96 * KiB, entry_bytes=entry_bytes, readahead=readahead)


def hold_against_engine(path, kind, budget, *, entry_bytes=4096, policy="clock2q+", readahead=True):
    with cowslice.open(path, l2_cache_size=budget, l2_cache_entry_size=entry_bytes, policy=policy,
                       readahead=readahead, warmup="off") as disk:
        offsets, buffer = workload(kind, disk.size // LENGTH, 20_000), bytearray(LENGTH)
        packed = packed_map(disk, entry_bytes=entry_bytes)
        setting = MapSetting(disk.cache.statistics()["budget"], packed, policy, readahead)
        for offset in offsets.tolist():  # one by one: a batch looks up what is resident before the rest
            disk.read_into(offset, buffer)
        counted = disk.cache.statistics()
    [done] = simulate(trace_of(offsets), [setting], packed.geometry, disk_size=packed.disk_size)
    ratio = counted["misses"] / (counted["hits"] + counted["misses"])
    assert done.miss_ratio == pytest.approx(ratio, abs=0.005)


def test_the_curve_by_bytes_ends_at_the_cold_misses_where_the_whole_map_fits(tmp_path):
    path = tmp_path / "disk.qcow2"
    write_populated_image(path, size=4 * GiB, layout="random")
    offsets = workload("uniform", 4 * GiB // LENGTH, 5000)
    with cowslice.open(path) as disk:
        packed = packed_map(disk)
    curve = packed_curve(trace_of(offsets), packed)
    assert curve.full_bytes == packed.packed_bytes
    assert curve.misses_at(packed.packed_bytes) == curve.cold == 128
    assert curve.miss_ratio(packed.packed_bytes, warm=True) == 0.0


# -- QEMU -------------------------------------------------------------------------------------------------------------


def qemu_misses(path, offsets, cache_bytes, entry_bytes):
    """How many L2 slices qemu-io read, by its trace events."""
    cache = f"l2-cache-size={cache_bytes},l2-cache-entry-size={entry_bytes}"
    options = f"driver=qcow2,file.driver=file,file.filename={path},{cache}"
    commands = "".join(f"read -q {offset} {LENGTH}\n" for offset in offsets.tolist())
    done = peers.run("qemu-io", "-r", "-T", "qcow2_cache_get_read", "--image-opts", options, stdin=commands.encode())
    return len(re.findall(rb"qcow2_cache_get_read .*is_l2_cache 1", done.stdout + done.stderr))


def hold_against_qemu(path, kind, size, cluster_bits, entry_bytes, caches, count):
    offsets = workload(kind, size // LENGTH, count)
    curve = slice_curves(trace_of(offsets), Geometry(cluster_bits), disk_size=size).by_entry_bytes[entry_bytes]
    for cache_bytes in caches:
        measured = qemu_misses(path, offsets, cache_bytes, entry_bytes) / count
        assert curve.miss_ratio(cache_bytes) == pytest.approx(measured, abs=0.01), (kind, entry_bytes, cache_bytes)


@pytest.fixture(scope="module")
def shuffled(tmp_path_factory):
    path = tmp_path_factory.mktemp("shuffled") / "disk.qcow2"
    write_populated_image(path, size=4 * GiB, layout="random")
    return path


@peers.needs("qemu-io")
@pytest.mark.parametrize("entry_bytes", [512, 4096, 65536])
@pytest.mark.parametrize("kind", KINDS)
def test_the_curves_forecast_what_qemu_reads(kind, entry_bytes, shuffled):
    hold_against_qemu(shuffled, kind, 4 * GiB, 16, entry_bytes, [150_000, 400_000], 2000)


@pytest.mark.long
@peers.needs("qemu-io")
@pytest.mark.parametrize("entry_bytes", [512, 4096, 65536])
@pytest.mark.parametrize("kind", KINDS)
def test_the_curves_forecast_what_qemu_reads_at_six_sizes(kind, entry_bytes, tmp_path):
    write_populated_image(tmp_path / "disk.qcow2", size=16 * GiB, layout="random")
    full = 16 * GiB // (64 * KiB) * 8
    caches = [full * share // 100 for share in (1, 5, 20, 50, 80, 100)]
    hold_against_qemu(tmp_path / "disk.qcow2", kind, 16 * GiB, 16, entry_bytes, caches, 5000)
