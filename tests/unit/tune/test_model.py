"""The two laws: QEMU's against its published tables, ours against what a storage can give."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cowslice.ops.bench.cells import CELLS, DISK, Cell
from cowslice.tune.model import Device, Forecast, Load, forecast_cowslice, forecast_qemu
from cowslice.units import GiB, KiB

# The disk under the published tables, as one fit over all of them tells it.
SEED = Device(read_4k=177.2e-6, read_64k=423.2e-6, rate_4k=56_700, rate_64k=8_090, cpu=12.6e-6)
DEVICES = st.builds(
    Device,
    read_4k=st.floats(1e-6, 1e-2), read_64k=st.floats(1e-6, 1e-1), rate_4k=st.floats(100, 2e6),
    rate_64k=st.floats(10, 5e5), cpu=st.floats(1e-7, 1e-4), miss_cpu=st.floats(0, 1e-4), cipher=st.floats(0, 1e-8),
)  # fmt: skip
LOADS = st.builds(
    Load, length=st.integers(512, 1 << 20), depth=st.integers(1, 256), arrivals=st.none() | st.floats(0.1, 1e6)
)
ENTRIES = st.sampled_from([512 << n for n in range(13)])
FORECASTS = pytest.mark.parametrize("forecast", [forecast_qemu, forecast_cowslice])


def uniform_misses(cell: Cell) -> float:
    return max(0.0, 1 - cell.cache_bytes / cell.map_bytes(DISK))


def qemu(cell: Cell) -> Forecast:
    return forecast_qemu(SEED, Load(), misses=uniform_misses(cell), entry_bytes=cell.entry_bytes,
                         entries=cell.cache_bytes // cell.entry_bytes)


@pytest.mark.parametrize("cell", [cell for cell in CELLS if not cell.covers(40 * GiB)], ids=str)
def test_a_partial_cell_of_the_published_tables_is_forecast_within_six_percent(cell: Cell) -> None:
    found = qemu(cell)
    assert found.rate == pytest.approx(cell.published, rel=0.06)
    assert found.limit == "metadata"


@pytest.mark.parametrize("cell", [cell for cell in CELLS if cell.covers(40 * GiB)], ids=str)
def test_a_cell_that_holds_the_whole_map_is_limited_by_the_storage(cell: Cell) -> None:
    found = qemu(cell)
    assert found.rate == pytest.approx(cell.published, rel=0.06)
    assert found.limit == "storage"


@pytest.mark.parametrize("misses, expected", [(0.8, 31_500), (0.4, 40_500), (0.0, 56_700)])
def test_parallel_misses_cost_only_what_they_read(misses: float, expected: float) -> None:
    found = forecast_cowslice(SEED, Load(), misses=misses, entry_bytes=4 * KiB)
    assert found.rate == pytest.approx(expected, rel=0.01)


@FORECASTS
@given(device=DEVICES, load=LOADS, misses=st.floats(0, 8), entry=ENTRIES)
def test_no_forecast_exceeds_the_storage_the_depth_or_the_processor(
    forecast: type, device: Device, load: Load, misses: float, entry: int
) -> None:
    found = forecast(device, load, misses=misses, entry_bytes=entry)
    most = min(device.rate(load.length), load.depth / device.seconds(load.length), 1 / device.cpu)
    assert 0 < found.rate <= most * (1 + 1e-9)
    assert 0 < found.p50 <= found.p99


@FORECASTS
@given(device=DEVICES, load=LOADS, misses=st.tuples(st.floats(0, 8), st.floats(0, 8)), entry=ENTRIES)
def test_more_misses_never_make_a_disk_faster(
    forecast: type, device: Device, load: Load, misses: tuple[float, float], entry: int
) -> None:
    few, many = (forecast(device, load, misses=each, entry_bytes=entry) for each in sorted(misses))
    assert many.rate <= few.rate * (1 + 1e-9)


@FORECASTS
def test_deciphering_costs_each_byte(forecast: type) -> None:
    slow = replace(SEED, cipher=1e-8)  # 100 MB a second
    rates = [forecast(slow, Load(length=length), misses=0, entry_bytes=4 * KiB).rate for length in (4 * KiB, 64 * KiB)]
    assert rates == [pytest.approx(1 / (12.6e-6 + 1e-8 * 4096)), pytest.approx(1 / (12.6e-6 + 1e-8 * 65536))]


def test_a_miss_of_ours_costs_its_packing_where_storage_costs_nothing() -> None:
    memory = Device(read_4k=1e-7, read_64k=1e-7, rate_4k=1e9, rate_64k=1e9, cpu=1e-6, miss_cpu=3e-6)
    assert forecast_cowslice(memory, Load(), misses=0.5, entry_bytes=4 * KiB).rate == pytest.approx(1 / 3e-6)


@given(device=DEVICES, misses=st.floats(0.01, 1))
def test_alone_a_request_waits_for_nobody(device: Device, misses: float) -> None:
    found = forecast_qemu(device, Load(depth=1, arrivals=1e-6), misses=misses, entry_bytes=4 * KiB)
    slowest = device.seconds(4 * KiB) * (2 if misses > 0.011 else 1)
    assert found.p99 >= slowest * (1 - 1e-6)
    assert found.p50 == pytest.approx(device.seconds(4 * KiB) * (2 if misses > 0.5 else 1), rel=0.01)


@pytest.mark.parametrize("arrivals, waits", [(10, False), (6_000, True), (60_000, True)])
def test_requests_that_come_faster_queue_before_the_lock(arrivals: float, waits: bool) -> None:
    found = forecast_qemu(SEED, Load(arrivals=arrivals), misses=0.8, entry_bytes=4 * KiB)
    assert (found.p99 > 2.1 * SEED.read_4k) is waits


def test_a_guest_that_asks_for_more_than_is_served_has_all_its_requests_under_way() -> None:
    found = forecast_qemu(SEED, Load(depth=32, arrivals=1e6), misses=0.8, entry_bytes=4 * KiB)
    assert found.p50 == pytest.approx(32 / found.rate)


@given(device=DEVICES, length=st.integers(512, 1 << 22))
def test_a_longer_read_is_never_quicker(device: Device, length: int) -> None:
    assert device.seconds(length) <= device.seconds(length + 512) * (1 + 1e-9)
    assert device.rate(length) >= device.rate(length + 512) * (1 - 1e-9)
