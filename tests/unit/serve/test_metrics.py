"""What a server counts, and what it tells: sums that never fall, and text that Prometheus itself can read."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import cowslice
from cowslice.ops.bench.nbdbench import LoadOptions, run_load
from cowslice.ops.layout import write_populated_image
from cowslice.serve import metrics as m

GIB = 1 << 30


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[cowslice.Image]:
    write_populated_image(tmp_path / "disk.qcow2", size=4 * GIB, layout="random")
    with cowslice.open(tmp_path / "disk.qcow2", l2_cache_size="64k", l2_cache_entry_size="4k", warmup="off") as opened:
        yield opened


def samples(metrics: m.Metrics) -> dict[str, float]:
    """Every sample by its name and labels, as Prometheus' own parser understands the text."""
    parser = pytest.importorskip("prometheus_client.parser")
    families = list(parser.text_string_to_metric_families(m.exposition(metrics).decode()))
    found = {}
    for family in families:
        assert family.documentation
        for sample in family.samples:
            found[" ".join([sample.name, *(f"{k}={v}" for k, v in sorted(sample.labels.items()))])] = sample.value
    return found


def test_a_request_is_counted_by_command_place_and_time() -> None:
    counters = m.Counters(GIB)
    counters.note("read", GIB // 2, 4096, 3_000)
    counts = counters.counters()
    assert (counts["requests"]["read"], counts["bytes"]["read"], counts["errors"]) == (1, 4096, 0)
    assert [n for n, value in enumerate(counts["heat"]) if value] == [m.HEAT // 2]
    assert [n for n, value in enumerate(counts["latency"]) if value] == [2]
    assert counts["latency_ns"] == 3_000


def test_a_failed_request_moves_no_bytes() -> None:
    counters = m.Counters(GIB)
    counters.note("read", 0, 4096, 1_000, failed=True)
    counts = counters.counters()
    assert (counts["requests"]["read"], counts["bytes"]["read"], counts["errors"], sum(counts["heat"])) == (1, 0, 1, 0)


@given(st.integers(0, 1 << 62))
def test_a_latency_is_below_the_bound_of_its_bucket_and_not_below_the_one_before(nanoseconds: int) -> None:
    bucket = m.latency_bucket(nanoseconds)
    if bucket < m.LATENCIES - 1:
        assert nanoseconds < 1000 << bucket
    if bucket:
        assert nanoseconds >= 1000 << (bucket - 1)


@given(st.integers(1, 1 << 62), st.data())
def test_every_place_of_every_disk_has_a_cell(size: int, data: st.DataObject) -> None:
    offset = data.draw(st.integers(0, size - 1))
    cell = m.heat_cell(offset, size)
    part = -(-size // m.HEAT)
    assert cell * part <= offset < (cell + 1) * part


def test_the_totals_keep_what_a_connection_counted_before_it_ended() -> None:
    meter = m.Metrics().add_export("", GIB)
    first, second = m.Counters(GIB), m.Counters(GIB)
    for source in (first, second):
        meter.attach(source)
        source.note("read", 0, 512, 1)
    meter.detach(first)
    meter.detach(first)
    second.note("read", 0, 512, 1)
    reading = meter.reading()
    assert (reading.connections, reading.connections_total) == (1, 2)
    assert (reading.counts["requests"]["read"], reading.counts["heat"][0]) == (3, 3)


class Loop:
    """What a compiled loop says of itself."""

    def counters(self) -> dict[str, object]:
        latencies, heat = [0] * m.LATENCIES, [0] * m.HEAT
        latencies[3], heat[5] = 7, 7
        counted = {"reads": 7, "bytes": 7 * 4096, "writes": 2, "written": 1024, "latency_seconds": 5e-5}
        return {**counted, "latencies": latencies, "heat": heat, "sends": 1}


def test_a_connection_may_count_in_two_places() -> None:
    meter = m.Metrics().add_export("", GIB)
    sources = (m.LoopCounters(Loop()), m.Counters(GIB))
    meter.attach(*sources)
    sources[1].note("read", 0, 1, 1000)
    before = meter.reading()
    meter.detach(*sources)
    after = meter.reading()
    assert (before.connections, after.connections, after.connections_total) == (1, 0, 1)
    assert before.counts == after.counts
    assert after.counts["requests"]["read"] == 8
    assert after.counts["bytes"]["read"] == 7 * 4096 + 1
    assert (after.counts["requests"]["write"], after.counts["bytes"]["write"]) == (2, 1024)
    assert (after.counts["latency"][3], after.counts["heat"][5], after.counts["latency_ns"]) == (7, 7, 51_000)


def test_nothing_is_lost_when_many_threads_count() -> None:
    meter = m.Metrics().add_export("", GIB)
    source = m.Counters(GIB)
    meter.attach(source)
    threads = [
        threading.Thread(target=lambda: [source.note("write", 0, 1, 1) for _ in range(500)]) for _ in range(4)
    ]  # fmt: skip
    for thread in threads:
        thread.start()
    seen = [meter.reading().counts["bytes"]["write"] for _ in range(20)]
    for thread in threads:
        thread.join()
    assert seen == sorted(seen)
    assert meter.reading().counts["bytes"]["write"] == 2000


def test_prometheus_reads_every_figure(disk: cowslice.Image) -> None:
    metrics = m.Metrics()
    meter = metrics.add_export("vm", disk.size, disk)
    source = m.Counters(disk.size)
    meter.attach(source)
    disk.read(0, 4096)
    disk.read(0, 4096)
    source.note("read", 0, 4096, 1_500)
    source.note("flush", 0, 0, 5_000_000)
    found = samples(metrics)
    assert found["cowslice_requests_total command=read export=vm"] == 1
    assert found["cowslice_bytes_total command=read export=vm"] == 4096
    assert found["cowslice_connections export=vm"] == 1
    assert found["cowslice_export_bytes export=vm"] == 4 * GIB
    assert found["cowslice_request_seconds_count export=vm"] == 2
    assert found["cowslice_request_seconds_sum export=vm"] == pytest.approx(0.0050015)
    assert found["cowslice_request_seconds_bucket export=vm le=2e-06"] == 1
    assert found["cowslice_request_seconds_bucket export=vm le=+Inf"] == 2
    assert found["cowslice_map_misses_total export=vm"] == 1
    assert found["cowslice_map_hits_total export=vm"] == 1
    assert found["cowslice_map_budget_bytes export=vm"] >= found["cowslice_map_bytes export=vm"] > 0
    forms = {name: value for name, value in found.items() if name.startswith("cowslice_map_slices ")}
    assert "cowslice_map_slices export=vm form=inline" in forms
    assert sum(forms.values()) == 1


def test_buckets_never_fall_and_end_at_the_count() -> None:
    metrics = m.Metrics()
    source = m.Counters(GIB)
    metrics.add_export("", GIB).attach(source)
    for power in range(0, 60, 3):
        source.note("read", 0, 1, 1 << power)
    lines = [line for line in m.exposition(metrics).decode().splitlines() if "_bucket{" in line]
    values = [int(line.rsplit(" ", 1)[1]) for line in lines]
    assert values == sorted(values)
    assert (values[-1], len(values)) == (20, m.LATENCIES)


@pytest.mark.parametrize("name", ["", 'a"b', "back\\slash", "line\nbreak", "grün", '\\"\n\\'])
def test_any_export_name_survives(name: str) -> None:
    metrics = m.Metrics()
    metrics.add_export(name, 1)
    assert samples(metrics)[f"cowslice_export_bytes export={name}"] == 1


def test_a_name_that_is_no_unicode_does_not_end_the_report() -> None:
    metrics = m.Metrics()
    metrics.add_export("\udcff", 1)
    assert b'export="?"' in m.exposition(metrics)


def test_a_raw_disk_has_no_map(tmp_path: Path) -> None:
    (tmp_path / "raw").write_bytes(bytes(1 << 20))
    metrics = m.Metrics()
    with cowslice.open(tmp_path / "raw", format="raw") as raw:
        metrics.add_export("", raw.size, raw)
        assert not any("_map_" in name for name in samples(metrics))


def test_a_closed_disk_still_has_its_counts(disk: cowslice.Image) -> None:
    metrics = m.Metrics()
    metrics.add_export("", disk.size, disk)
    disk.close()
    assert samples(metrics)["cowslice_connections_total export="] == 0


def test_what_is_resident_is_told_by_place(disk: cowslice.Image) -> None:
    meter = m.Metrics().add_export("", disk.size, disk)
    assert meter.reading().resident == bytes(m.HEAT)
    disk.read(disk.size - 4096, 4096)
    resident = meter.reading().resident
    assert resident[-1] == 255
    assert not any(resident[: m.HEAT - 8])


@pytest.mark.parametrize("connections, depth", [(1, 1), (4, 32)])
def test_what_clients_did_over_nbd_is_counted_exactly(
    disk: cowslice.Image, tmp_path: Path, connections: int, depth: int
) -> None:
    metrics = m.Metrics()
    with cowslice.serve(disk, unix=tmp_path / "socket", name="vm", metrics=metrics) as server:
        result = run_load(
            server.uri, LoadOptions(connections=connections, depth=depth, count=999, offset=GIB, span=GIB)
        )  # fmt: skip
    (reading,) = metrics.readings()
    counts = reading.counts
    assert (counts["requests"]["read"], counts["bytes"]["read"]) == (result.requests, 999 * 4096)
    assert (sum(counts["latency"]), sum(counts["heat"]), counts["errors"]) == (999, 999, 0)
    assert set(np.flatnonzero(counts["heat"])) <= set(range(m.HEAT // 4, m.HEAT // 2))
    assert counts["latency_ns"] > 0
    assert (reading.connections, reading.connections_total) == (0, connections)
    assert reading.map["hits"] + reading.map["misses"] >= 999


def test_the_maps_of_all_layers_say_together_what_is_resident(tmp_path: Path) -> None:
    size = 512 * 64 * m.HEAT  # a part of the disk is a slice of the map
    for name, more in (("base", {}), ("top", {"backing_file": "base", "backing_format": "qcow2"})):
        cowslice.create(tmp_path / name, size, format="qcow2", cluster_size=512, **more)  # type: ignore[arg-type]
    with cowslice.open(tmp_path / "base", "r+") as base:
        base.write(size - 512, b"b" * 512)
    with cowslice.open(tmp_path / "top", "r+") as top:
        top.write(0, b"t" * 512)
        top.write(size - 1024, b"t" * 512)
    with cowslice.open(tmp_path / "top", warmup="off") as disk:
        meter = m.Metrics().add_export("", disk.size, disk)
        disk.read(0, 512)
        assert meter.reading().resident[0] == 255, "nothing of the other one is there to be kept"
        disk.read(size - 1024, 512)
        assert meter.reading().resident[-1] == 127, "of the top one only: nobody asked the other"
        disk.read(size - 512, 512)
        assert meter.reading().resident[-1] == 255


def test_a_layer_that_ends_before_the_disk_says_nothing_behind_its_end() -> None:
    top = m.LayerMap(GIB, bytes(m.HEAT), [True] * m.HEAT)
    found = m.residency(GIB, [top, m.LayerMap(GIB // 2, bytes([255]) * m.HEAT, [True] * m.HEAT)])
    assert set(found[: m.HEAT // 2]) == {127}
    assert not any(found[m.HEAT // 2 :])
