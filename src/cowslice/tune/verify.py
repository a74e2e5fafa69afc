"""Forecasts held against what happens: requests replayed by cowslice and by QEMU at several settings.

It does not know how an image is opened. What must hold: nothing is written, so writes are replayed as reads, and both
sides begin with an empty cache, so first touches count here on both.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from cowslice.cache.sizes import MIN_L2_ENTRIES
from cowslice.image.image import Image
from cowslice.tune import qemuio
from cowslice.tune.advise import Advice, Choice, Engine
from cowslice.tune.model import Forecast, Load, forecast_cowslice, forecast_qemu
from cowslice.tune.requests import Operation, Requests, joined
from cowslice.tune.simulate import MapSetting, QemuSetting, Replayed, simulate
from cowslice.units import KiB

MOST_REQUESTS = 20_000  # that are replayed, from the beginning; each engine reads them at four settings

Opener = Callable[[int, int, bool], Image]  # cache bytes, entry bytes, around the page cache


@dataclass(frozen=True, slots=True)
class Proof:
    """One setting: hit ratio and requests per second, forecast and measured. None is 'could not be counted'."""

    engine: Engine
    role: str
    cache_bytes: int
    entry_bytes: int
    depth: int
    requests: int
    forecast_hits: float
    measured_hits: float | None
    forecast_rate: float
    measured_rate: float

    def as_json(self) -> dict[str, Any]:
        """The same for scripts."""
        return {name.replace("_", "-"): value for name, value in asdict(self).items()}


def verify(
    advice: Advice, requests: Iterable[Requests], opener: Opener, *,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[Proof]:
    """Replay the first MOST_REQUESTS at the advised setting, today's, half of the advised and full coverage.

    `opener` opens the top file alone, without warm-up. QEMU is left out where `qemu-io` is not installed.
    Raises StorageError and what reading the image raises.
    """
    reads = _reads(requests)
    proving = _Proving(advice, reads, opener)
    roles = ("advised", "today", "half", "full")
    ours = _distinct(roles, (advice.ours, advice.ours_today, _half(advice.ours), advice.ours_full))
    qemu = _distinct(roles, (advice.qemu, advice.qemu_today, _half(advice.qemu), advice.qemu_full))
    steps = [*(qemu if qemuio.version() else ()), *ours]
    proofs = []
    for number, (role, choice) in enumerate(steps):
        if on_progress:
            on_progress(number, len(steps))
        proofs.append(proving.by_qemu(role, choice) if choice.engine == "qemu" else proving.by_us(role, choice))
    return proofs


class _Proving:
    """One stretch of requests, replayed at one setting after the other."""

    def __init__(self, advice: Advice, reads: Requests, opener: Opener) -> None:
        self._e = advice.evidence
        self._reads = reads
        self._opener = opener
        self._spans = list(zip(reads.offset.tolist(), reads.length.tolist(), strict=True))
        self._direct = self._e.calibration.direct and not self._e.calibration.given
        self._load = Load(length=max(512, int(reads.length.mean())), depth=self._e.load.depth)

    def by_qemu(self, role: str, choice: Choice) -> Proof:
        setting = QemuSetting(choice.cache_bytes, choice.entry_bytes)
        mapped = self._e.packed.mapped[(self._reads.offset // np.uint64(self._e.packed.slice_span)).astype(np.int64)]
        # Where there is no L2 table QEMU reads none.
        misses = self._simulated(setting, self._reads.select(mapped)).misses
        lookups = self._simulated(setting, self._reads).accesses
        forecast = forecast_qemu(self._e.calibration.qemu, self._load, misses=misses / len(self._spans),
                                 entry_bytes=choice.entry_bytes, entries=setting.entries)
        target = qemuio.qcow2_target(self._e.path, cache_bytes=choice.cache_bytes, entry_bytes=choice.entry_bytes,
                                     direct=self._direct)
        counted = qemuio.replay(target, self._spans, depth=1, count=True).misses
        timed = qemuio.replay(target, self._spans, depth=self._load.depth)  # counting takes time
        hits = None if counted is None else 1 - counted / lookups
        return self._proof(role, choice, self._load.depth, (1 - misses / lookups, hits), (forecast, timed.rate))

    def by_us(self, role: str, choice: Choice) -> Proof:
        """One by one: then each lookup is counted once."""
        with self._opener(choice.cache_bytes, choice.entry_bytes, self._direct) as disk:
            budget = disk.cache.statistics()["budget"]
            buffer = memoryview(bytearray(int(self._reads.length.max())))
            began = time.perf_counter()
            for offset, length in self._spans:
                disk.read_into(offset, buffer[:length])
            took = time.perf_counter() - began
            counted = disk.cache.statistics()
        done = self._simulated(MapSetting(budget, self._e.packed), self._reads)
        forecast = forecast_cowslice(self._e.calibration.ours, replace(self._load, depth=1),
                                     misses=done.misses / len(self._spans), entry_bytes=choice.entry_bytes)
        # The engine counts a lookup for each run of clusters; a share is of pieces that requests touch, as QEMU's.
        hits = 1 - counted["misses"] / max(1, done.accesses)
        return self._proof(role, choice, 1, (1 - done.miss_ratio, hits), (forecast, len(self._spans) / took))

    def _simulated(self, setting: QemuSetting | MapSetting, reads: Requests) -> Replayed:
        return simulate([reads], [setting], self._e.curves.geometry, disk_size=self._e.size)[0]

    def _proof(self, role: str, choice: Choice, depth: int, hits: tuple[float, float | None],
               rates: tuple[Forecast, float]) -> Proof:
        return Proof(choice.engine, role, choice.cache_bytes, choice.entry_bytes, depth, len(self._spans), *hits,
                     rates[0].rate, rates[1])


def _reads(requests: Iterable[Requests]) -> Requests:
    """The first requests that read or write, all as reads."""
    kept: list[Requests] = []
    missing = MOST_REQUESTS
    for chunk in requests:
        rows = np.flatnonzero((chunk.operation <= Operation.WRITE) & (chunk.length > 0))[:missing]
        kept.append(chunk.select(rows))
        missing -= len(rows)
        if not missing:
            break
    reads = joined(kept)
    return replace(reads, operation=np.zeros(len(reads), dtype=np.uint8))


def _half(choice: Choice) -> Choice:
    least = MIN_L2_ENTRIES * choice.entry_bytes if choice.engine == "qemu" else 16 * KiB
    return replace(choice, cache_bytes=max(least, choice.cache_bytes // 2))


def _distinct(roles: Sequence[str], choices: Sequence[Choice]) -> list[tuple[str, Choice]]:
    """Each setting once, by the first role that it has."""
    found: dict[tuple[int, int], tuple[str, Choice]] = {}
    for role, choice in zip(roles, choices, strict=True):
        found.setdefault((choice.cache_bytes, choice.entry_bytes), (role, choice))
    return list(found.values())
