"""What a server counts, and how it tells: counters of connections, their sum per export, Prometheus' text.

It does not know sockets or protocols: whoever answers requests keeps a source with `counters()`, in Python or compiled,
and attaches it to the meter of its export. What must hold: no total ever falls, also when a connection ends.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import TYPE_CHECKING, Any, Protocol, TypedDict

from cowslice.cache.slicemap import SliceMap
from cowslice.image.qcow2 import Qcow2Layer

if TYPE_CHECKING:
    from cowslice.image.image import Image

COMMANDS = ("read", "write", "flush", "trim", "cache", "zero", "status")
LATENCIES = 32  # buckets of latency: the n-th counts below 2**n microseconds, the last one everything else
HEAT = 512  # equal parts of a disk whose reads and writes are counted apart
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Counts(TypedDict):
    """What happened since the start: `requests` and `bytes` by command, `heat` by place on the disk."""

    requests: dict[str, int]
    bytes: dict[str, int]
    errors: int
    latency: list[int]
    latency_ns: int
    heat: list[int]


class Source(Protocol):
    """Something that counts, such as a connection. It is asked from any thread."""

    def counters(self) -> Counts: ...


def latency_bucket(nanoseconds: int) -> int:
    """The bucket of a latency."""
    return min((nanoseconds // 1000).bit_length(), LATENCIES - 1)


def heat_cell(offset: int, size: int) -> int:
    """The part of a disk of `size` bytes that `offset` lies in."""
    return min(offset // max(-(-size // HEAT), 1), HEAT - 1)


def no_counts() -> Counts:
    """Nothing yet."""
    return {
        "requests": dict.fromkeys(COMMANDS, 0),
        "bytes": {"read": 0, "write": 0},
        "errors": 0,
        "latency": [0] * LATENCIES,
        "latency_ns": 0,
        "heat": [0] * HEAT,
    }


def add_counts(total: Counts, more: Counts) -> None:
    """Add `more` to `total`. Commands, buckets and cells that `more` leaves out count as zero."""
    for name in ("requests", "bytes"):
        mine: dict[str, int] = total[name]
        for key, value in more[name].items():
            mine[key] = mine.get(key, 0) + value
    total["errors"] += more["errors"]
    total["latency_ns"] += more["latency_ns"]
    for key in ("latency", "heat"):
        row: list[int] = total[key]  # type: ignore[literal-required]
        for n, value in enumerate(more[key][: len(row)]):  # type: ignore[literal-required]
            if value:
                row[n] += value


class Counters:
    """Counts of requests answered in Python, for a disk of `size` bytes. Thread safe."""

    def __init__(self, size: int) -> None:
        self._counts = no_counts()
        self._size = size
        self._lock = threading.Lock()

    def note(self, command: str, offset: int, length: int, nanoseconds: int, *, failed: bool = False) -> None:
        """Count one answered request; `command` is one of COMMANDS. A failed one moved no bytes."""
        counts = self._counts
        with self._lock:
            counts["requests"][command] += 1
            counts["latency"][latency_bucket(nanoseconds)] += 1
            counts["latency_ns"] += nanoseconds
            if failed:
                counts["errors"] += 1
            elif command in counts["bytes"]:
                counts["bytes"][command] += length
                counts["heat"][heat_cell(offset, self._size)] += 1

    def counters(self) -> Counts:
        """A copy of what was counted."""
        copy = no_counts()
        with self._lock:
            add_counts(copy, self._counts)
        return copy


class _Loop(Protocol):
    """A compiled loop, as far as it concerns us: it answers reads and writes in place."""

    def counters(self) -> Mapping[str, Any]: ...


class LoopCounters:
    """The counters of a compiled loop in the words of the others."""

    def __init__(self, loop: _Loop) -> None:
        self._loop = loop

    def counters(self) -> Counts:
        """What the loop counted, of what it answered itself."""
        told, counts = self._loop.counters(), no_counts()
        counts["requests"]["read"] = told["reads"]
        counts["bytes"]["read"] = told["bytes"]
        counts["requests"]["write"] = told["writes"]
        counts["bytes"]["write"] = told["written"]
        counts["latency"] = told["latencies"]
        counts["latency_ns"] = round(told["latency_seconds"] * 1e9)
        counts["heat"] = told["heat"]
        return counts


@dataclass(frozen=True, slots=True)
class Reading:
    """One export at one moment. `map` is what its metadata cache says of itself, {} for a raw disk.

    `resident` says for each of HEAT parts of the disk which share of its map is in memory, over all files of the chain,
    0 to 255.
    """

    name: str
    size: int
    connections: int
    connections_total: int
    counts: Counts
    map: Mapping[str, Any] = field(default_factory=dict)
    resident: bytes = b""


class ExportMeter:
    """The sum of what all connections to one export counted, those that ended included. Thread safe."""

    def __init__(self, name: str, size: int, disk: Image | None = None) -> None:
        self.name = name
        self.size = size
        self._disk = disk
        self._past = no_counts()
        self._connections: list[tuple[Source, ...]] = []
        self._connections_total = 0
        self._lock = threading.Lock()

    def attach(self, *sources: Source) -> None:
        """A connection begins. Each of its sources counts what the others do not."""
        with self._lock:
            self._connections.append(sources)
            self._connections_total += 1

    def detach(self, *sources: Source) -> None:
        """A connection has ended: keep what it counted. One that is not attached is ignored."""
        with self._lock:
            if sources in self._connections:
                self._connections.remove(sources)
                for source in sources:
                    add_counts(self._past, source.counters())

    def reading(self) -> Reading:
        """What was counted until now."""
        counts = no_counts()
        with self._lock:
            add_counts(counts, self._past)
            for source in chain.from_iterable(self._connections):
                add_counts(counts, source.counters())
            connections, connections_total = len(self._connections), self._connections_total
        statistics, resident = self._cache()
        return Reading(self.name, self.size, connections, connections_total, counts, statistics, resident)

    def _cache(self) -> tuple[Mapping[str, Any], bytes]:
        """The cache's own counters, and the residency of the maps of all layers together."""
        if self._disk is None or self._disk.closed:
            return {}, b""
        maps = [layer_map(layer) for layer in self._disk.layers if isinstance(layer, Qcow2Layer)]
        return (self._disk.cache.statistics(), residency(self._disk.size, maps)) if maps else ({}, b"")


@dataclass(frozen=True, slots=True)
class LayerMap:
    """Of each of HEAT parts of a layer of `size` bytes: which share of its map is in memory, and if it has one."""

    size: int
    resident: bytes
    there: Sequence[bool]


def layer_map(layer: Qcow2Layer) -> LayerMap:
    """What is in memory of one layer now."""
    assert isinstance(layer.slices, SliceMap)
    resident, span, l1 = layer.slices.residency(HEAT), layer.first.header.geometry.l2_span, layer.l1
    edges = [part * layer.size // HEAT for part in range(HEAT + 1)]
    # Tables that were made since the image was opened are in memory as long as they are new.
    there = [bool(resident[part] or l1[edges[part] // span * 8 : -(-edges[part + 1] // span) * 8].strip(b"\0"))
             for part in range(HEAT)]
    return LayerMap(layer.size, resident, there)


def residency(size: int, maps: Sequence[LayerMap]) -> bytes:
    """For each of HEAT parts of a disk of `size` bytes which share of its map is in memory, 0 to 255.

    That is the mean over the layers, top first in `maps`, that reach there and have something to be kept in memory.
    """
    found = bytearray(HEAT)
    for part in range(HEAT):
        middle = (2 * part + 1) * size // (2 * HEAT)
        places = [(one, middle * HEAT // one.size) for one in maps if middle < one.size]
        shares = [one.resident[place] for one, place in places if one.there[place]]
        found[part] = sum(shares) // len(shares) if shares else 0
    return bytes(found)


class Metrics:
    """The meters of all exports of a server. Thread safe."""

    def __init__(self) -> None:
        self._meters: list[ExportMeter] = []
        self._lock = threading.Lock()
        self.started = time.time()

    def add_export(self, name: str, size: int, disk: Image | None = None) -> ExportMeter:
        """A meter for a new export of `size` bytes, whose map is that of `disk`."""
        meter = ExportMeter(name, size, disk)
        with self._lock:
            self._meters.append(meter)
        return meter

    def readings(self) -> list[Reading]:
        """Every export, in the order they were added."""
        with self._lock:
            meters = list(self._meters)
        return [meter.reading() for meter in meters]


# -- Prometheus --------------------------------------------------------------------------------------------------------

_MAP_COUNTERS = {
    "hits": ("cowslice_map_hits_total", "Lookups answered from memory."),
    "misses": ("cowslice_map_misses_total", "Lookups that had to read metadata."),
    "loads": ("cowslice_map_loads_total", "Metadata reads."),
    "failed_loads": ("cowslice_map_failed_loads_total", "Metadata reads that failed."),
    "joined_loads": ("cowslice_map_joined_loads_total", "Waits of a lookup for a metadata read of another one."),
    "bytes_read": ("cowslice_map_read_bytes_total", "Bytes of metadata read."),
    "evictions": ("cowslice_map_evictions_total", "Slices that left to make room."),
}
_MAP_GAUGES = {
    "bytes_used": ("cowslice_map_bytes", "Memory that the packed map takes."),
    "budget": ("cowslice_map_budget_bytes", "The most that the map may take."),
}

Sample = tuple[str, dict[str, str], float]  # suffix of the name, labels, value
Family = tuple[str, str, str, list[Sample]]  # name, type, help


def exposition(metrics: Metrics) -> bytes:
    """All exports in Prometheus' text format 0.0.4."""
    lines: list[str] = []
    for name, kind, text, samples in _families(metrics):
        lines += [f"# HELP {name} {text}", f"# TYPE {name} {kind}"]
        lines += [f"{name}{suffix}{_labels(labels)} {_number(value)}" for suffix, labels, value in samples]
    return ("\n".join(lines) + "\n").encode(errors="replace")


def _families(metrics: Metrics) -> Iterator[Family]:
    """Every metric that has samples."""
    readings = metrics.readings()
    families: list[Family] = [
        ("cowslice_start_time_seconds", "gauge", "When the server started, in seconds since 1970.",
         [("", {}, metrics.started)]),
        ("cowslice_requests_total", "counter", "Requests answered.", _by_key(readings, "requests", "command")),
        ("cowslice_bytes_total", "counter", "Bytes moved for clients.", _by_key(readings, "bytes", "command")),
        ("cowslice_errors_total", "counter", "Requests answered with an error.",
         [("", {"export": r.name}, r.counts["errors"]) for r in readings]),
        ("cowslice_request_seconds", "histogram", "Time from a request to its answer.",
         [sample for r in readings for sample in _histogram(r)]),
        ("cowslice_connections", "gauge", "Clients connected now.",
         [("", {"export": r.name}, r.connections) for r in readings]),
        ("cowslice_connections_total", "counter", "Clients that ever connected.",
         [("", {"export": r.name}, r.connections_total) for r in readings]),
        ("cowslice_export_bytes", "gauge", "Size of the disk.", [("", {"export": r.name}, r.size) for r in readings]),
        *_map_families(readings),
    ]  # fmt: skip
    for name, kind, text, samples in families:
        if samples:
            yield name, kind, text, samples


def _map_families(readings: Iterable[Reading]) -> Iterator[Family]:
    mapped = [reading for reading in readings if reading.map]
    for kind, group in (("counter", _MAP_COUNTERS), ("gauge", _MAP_GAUGES)):
        for key, (name, text) in group.items():
            yield name, kind, text, [("", {"export": r.name}, r.map[key]) for r in mapped]
    slices: list[Sample] = [
        ("", {"export": r.name, "form": form}, count) for r in mapped for form, count in r.map["slices"].items()
    ]
    yield "cowslice_map_slices", "gauge", "Slices of the map in memory, by how they are kept.", slices


def _by_key(readings: Iterable[Reading], what: str, label: str) -> list[Sample]:
    return [
        ("", {"export": reading.name, label: key}, value)
        for reading in readings
        for key, value in reading.counts[what].items()  # type: ignore[literal-required]
    ]


def _histogram(reading: Reading) -> Iterator[Sample]:
    """Cumulative buckets, their count and the sum, in seconds."""
    seen, export = 0, {"export": reading.name}
    for n, count in enumerate(reading.counts["latency"]):
        seen += count
        bound = "+Inf" if n == LATENCIES - 1 else repr((1 << n) / 1e6)
        yield "_bucket", {**export, "le": bound}, seen
    yield "_sum", export, reading.counts["latency_ns"] / 1e9
    yield "_count", export, seen


def _labels(labels: Mapping[str, str]) -> str:
    def escaped(text: str) -> str:
        return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")

    return "{" + ",".join(f'{name}="{escaped(value)}"' for name, value in labels.items()) + "}" if labels else ""


def _number(value: float) -> str:
    return str(value) if isinstance(value, int) else repr(float(value))
