"""How fast a disk answers with a given metadata cache: two laws, a few constants, no I/O.

It does not know where misses come from (`curve`) nor how constants are measured (`calibrate`). What must hold: QEMU's
law reproduces the published tables that this project starts from, and no forecast exceeds what the storage can give.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from cowslice.units import KiB

DEPTH = 32  # requests under way at once where nobody says otherwise; what a busy virtio disk has
SLOW = 0.99  # the share of requests that p99 speaks of
QEMU_CPU = 12.6e-6  # seconds; what the published tables need per request besides the misses
OUR_CPU = 2e-6  # seconds per request of the compiled path on a present core
# Seconds per entry that QEMU's search takes: it tries one place after another where it looks an entry up, and looks at
# all of them for the one to give up. Measured at 256 to 8192 entries on a present core, once entries have moved.
HIT_SEARCH = 0.7e-9
MISS_SEARCH = 1.6e-9
BLOCK = 4 * KiB  # no storage reads less at once


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """A storage as one engine sees it. Seconds of a random read at depth 1, reads per second at depth 32.

    `cpu` is what the engine itself spends on a request, in seconds; `miss_cpu` what ours spends on a miss besides
    reading, `cipher` what either spends on each byte of an encrypted image.
    """

    read_4k: float
    read_64k: float
    rate_4k: float
    rate_64k: float
    cpu: float
    miss_cpu: float = 0.0
    cipher: float = 0.0

    def seconds(self, length: int) -> float:
        """How long one read of `length` bytes takes alone: a line through the two that were measured."""
        return _line(self.read_4k, self.read_64k, length)

    def rate(self, length: int) -> float:
        """Reads of `length` bytes per second with many under way: time per read is a line through the two measured."""
        return 1 / _line(1 / self.rate_4k, 1 / self.rate_64k, length)


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What a guest asks for: mean bytes of a request, how many are under way, and how many come per second.

    Without `arrivals` the guest is taken to send the next request as soon as one is answered.
    """

    length: int = 4 * KiB
    depth: int = DEPTH
    arrivals: float | None = None


@dataclass(frozen=True, slots=True)
class Forecast:
    """Requests per second at most, seconds that the median and the slowest hundredth take, and what limits the rate.

    `limit` is "metadata", "storage", "depth" or "processor".
    """

    rate: float
    p50: float
    p99: float
    limit: str


def forecast_qemu(device: Device, load: Load, *, misses: float, entry_bytes: int, entries: int = 0) -> Forecast:
    """What QEMU does with `misses` metadata reads of `entry_bytes` per request: they wait for one another.

    Its map is read under one lock, so misses are served one at a time and every other request queues behind them.
    `entries` is how many the cache has: all are searched.
    """
    cpu = device.cpu + device.cipher * load.length + HIT_SEARCH * entries
    waits = misses * (device.seconds(entry_bytes) + MISS_SEARCH * entries)
    limits = {
        "storage": device.rate(load.length),
        "depth": load.depth / device.seconds(load.length),
        "processor": 1 / cpu,
        "metadata": 1 / (waits + cpu) if misses else math.inf,
    }
    rate, limit = _lowest(limits)
    alone = _Alone(device.seconds(load.length), device.seconds(entry_bytes), misses)
    return Forecast(rate, *_latencies(alone, load, rate, waits + cpu), limit)


def forecast_cowslice(device: Device, load: Load, *, misses: float, entry_bytes: int) -> Forecast:
    """What our engine does: a miss costs itself, and takes what a read of its size takes, of storage and processor."""
    data, metadata = device.seconds(load.length), device.seconds(entry_bytes)
    weight = device.rate(load.length) / device.rate(entry_bytes)
    cpu = device.cpu + misses * (device.cpu + device.miss_cpu) + device.cipher * load.length
    limits = {
        "storage": device.rate(load.length) / (1 + misses * weight),
        "depth": load.depth / (data + misses * (metadata + device.miss_cpu)),
        "processor": 1 / cpu,
    }
    rate, limit = _lowest(limits)
    if misses and limit != "processor" and rate < 0.95 * min(device.rate(load.length), load.depth / data):
        limit = "metadata"
    return Forecast(rate, *_latencies(_Alone(data, metadata, misses), load, rate, 1 / rate), limit)


@dataclass(frozen=True, slots=True)
class _Alone:
    """Seconds of a request that meets no other: the data, and for some the metadata before it."""

    data: float
    metadata: float
    misses: float

    def at(self, share: float) -> float:
        """What this share of requests does not exceed. A request that spans slices may miss more than once."""
        return self.data + (math.ceil(self.misses) * self.metadata if self.misses > 1 - share else 0.0)


def _latencies(alone: _Alone, load: Load, rate: float, service: float) -> tuple[float, float]:
    """(p50, p99) in seconds, before a server that takes `service` seconds and ends `rate` requests per second.

    Where the guest keeps `depth` requests under way, each takes what all of them take (Little's law).
    """
    if load.arrivals is None or load.arrivals >= rate:
        return max(alone.at(0.5), load.depth / rate), max(alone.at(SLOW), load.depth / rate)
    busy = load.arrivals * service
    return alone.at(0.5) + _queue(busy, service, 0.5), alone.at(SLOW) + _queue(busy, service, SLOW)


def _queue(busy: float, service: float, share: float) -> float:
    """Seconds before a server that is `busy` a share of the time, not exceeded by this share of random arrivals.

    M/D/1 with an exponential tail that has its mean.
    """
    if busy <= 1 - share:
        return 0.0
    return math.log(busy / (1 - share)) * service / (2 * (1 - busy))


def _lowest(limits: dict[str, float]) -> tuple[float, str]:
    name = min(limits, key=limits.__getitem__)
    return limits[name], name


def _line(at_4k: float, at_64k: float, length: int) -> float:
    """On the line through two measured points, which noise must not make fall; a short read costs a whole block."""
    slope = max(0.0, at_64k - at_4k) / (64 * KiB - BLOCK)
    return at_4k + slope * (max(length, BLOCK) - BLOCK)
