"""Forecasts held against what happens: requests replayed by cowslice and by QEMU at several settings.

It does not know how an image is opened. What must hold: nothing is written, so writes are replayed as reads, and both
sides begin with an empty cache, so first touches count here on both. What is timed lasts long enough to be told.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from cowslice.cache.sizes import MIN_L2_ENTRIES
from cowslice.errors import BadOption
from cowslice.image.image import Image
from cowslice.tune import qemuio
from cowslice.tune.advise import Advice, Choice, Engine
from cowslice.tune.model import Load, forecast_cowslice, forecast_qemu
from cowslice.tune.requests import Operation, Requests, joined
from cowslice.tune.simulate import MapSetting, QemuSetting, Replayed, simulate
from cowslice.units import KiB, MiB

if TYPE_CHECKING:
    from numpy.typing import NDArray

MOST_REQUESTS = 20_000  # that are replayed, from the beginning; each engine reads them at four settings
LONGEST = 16 * MiB  # bytes of one request that are read: no guest asks for so many at once, but a line in a file may
FLOOR = 0.05  # seconds that are timed at least: until then a replay is begun anew, with an empty cache again
ROUNDS = 3  # replays of which the quickest counts: what else the machine does makes them slower, never faster
PATIENCE = 3.0  # seconds, opening included, after which no replay is begun anew
BATCH_BYTES = 64 * MiB  # memory that one batch of reads fills
_SAME, _MIXED = 1 << 14, 1 << 10  # requests of a batch: of one length, and where those of one length are picked out

Opener = Callable[[int, int, bool], Image]  # cache bytes, entry bytes, around the page cache
Batch = tuple["NDArray[np.int64]", int]  # offsets, and the length of each of these reads


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
    advice: Advice, requests: Iterable[Requests], opener: Opener, *, key: qemuio.Key | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[Proof]:
    """Replay the first MOST_REQUESTS at the advised setting, today's, half of the advised and full coverage.

    `opener` opens the top file alone, without warm-up; `key` lets QEMU open it too, if it is encrypted. QEMU is left
    out where `qemu-io` is not installed. Raises BadOption for requests of which none reads or writes, StorageError, and
    what reading the image raises.
    """
    reads = _reads(requests)
    if not len(reads):
        raise BadOption(f"'{advice.evidence.source}' has nothing to replay, expected requests that read or write")
    proving = _Proving(advice, reads, opener, key)
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

    def __init__(self, advice: Advice, reads: Requests, opener: Opener, key: qemuio.Key | None) -> None:
        self._e = advice.evidence
        self._reads = reads
        self._opener = opener
        self._spans = list(zip(reads.offset.tolist(), reads.length.tolist(), strict=True))
        self._direct = self._e.calibration.direct and not self._e.calibration.given
        self._load = Load(length=max(512, int(reads.length.mean())), depth=self._e.load.depth)
        self._key = key

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

        def replayed(depth: int, *, count: bool = False) -> qemuio.Replayed:
            return qemuio.replay(target, self._spans, depth=depth, count=count, key=self._key)

        counted = replayed(1, count=True).misses
        rate = self._rate(lambda: replayed(self._load.depth).seconds)  # apart, because counting takes time
        hits = None if counted is None else 1 - counted / lookups
        return self._proof(role, choice, (1 - misses / lookups, hits), (forecast.rate, rate))

    def by_us(self, role: str, choice: Choice) -> Proof:
        """Counted one by one, because then each lookup is counted once; timed as many at once as the guest asks."""
        with self._opened(choice) as disk:
            buffer = memoryview(bytearray(int(self._reads.length.max())))
            for offset, length in self._spans:
                disk.read_into(offset, buffer[:length])
            counted = disk.cache.statistics()
        done = self._simulated(MapSetting(counted["budget"], self._e.packed), self._reads)
        forecast = forecast_cowslice(self._e.calibration.ours, self._load, misses=done.misses / len(self._spans),
                                     entry_bytes=choice.entry_bytes)
        # The engine counts a lookup for each run of clusters; a share is of pieces that requests touch, as QEMU's.
        hits = 1 - counted["misses"] / max(1, done.accesses)
        parts = batches(self._reads)
        out = memoryview(bytearray(max(len(offsets) * length for offsets, length in parts)))
        rate = self._rate(lambda: self._our_seconds(choice, parts, out))
        return self._proof(role, choice, (1 - done.miss_ratio, hits), (forecast.rate, rate))

    def _our_seconds(self, choice: Choice, parts: Sequence[Batch], out: memoryview) -> float:
        with self._opened(choice) as disk:
            began = time.perf_counter()
            for offsets, length in parts:
                disk.read_many(offsets, length, out[: len(offsets) * length], depth=self._load.depth)
            return time.perf_counter() - began

    def _rate(self, replay: Callable[[], float]) -> float:
        """Requests per second in the quickest of as many replays as it takes to tell."""
        patience = time.monotonic() + PATIENCE
        took = [replay()]
        while (sum(took) < FLOOR or len(took) < ROUNDS) and time.monotonic() < patience:
            took.append(replay())
        return len(self._spans) / min(took)

    def _opened(self, choice: Choice) -> Image:
        return self._opener(choice.cache_bytes, choice.entry_bytes, self._direct)

    def _simulated(self, setting: QemuSetting | MapSetting, reads: Requests) -> Replayed:
        return simulate([reads], [setting], self._e.curves.geometry, disk_size=self._e.size)[0]

    def _proof(self, role: str, choice: Choice, hits: tuple[float, float | None], rates: tuple[float, float]) -> Proof:
        return Proof(choice.engine, role, choice.cache_bytes, choice.entry_bytes, self._load.depth, len(self._spans),
                     *hits, *rates)


def batches(reads: Requests) -> list[Batch]:
    """The same reads as batches of one length each, in their order as nearly as that allows."""
    lengths = np.unique(reads.length)
    step = max(1, min(_SAME if len(lengths) == 1 else _MIXED, BATCH_BYTES // int(lengths[-1])))
    made: list[Batch] = []
    for first in range(0, len(reads), step):
        part = reads.select(slice(first, first + step))
        made += [(part.offset[part.length == length].astype(np.int64), int(length))
                 for length in np.unique(part.length)]
    return made


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
    return replace(reads, operation=np.zeros(len(reads), dtype=np.uint8),
                   length=np.minimum(reads.length, np.uint64(LONGEST)))


def _half(choice: Choice) -> Choice:
    least = MIN_L2_ENTRIES * choice.entry_bytes if choice.engine == "qemu" else 16 * KiB
    return replace(choice, cache_bytes=max(least, choice.cache_bytes // 2))


def _distinct(roles: Sequence[str], choices: Sequence[Choice]) -> list[tuple[str, Choice]]:
    """Each setting once, by the first role that it has."""
    found: dict[tuple[int, int], tuple[str, Choice]] = {}
    for role, choice in zip(roles, choices, strict=True):
        found.setdefault((choice.cache_bytes, choice.entry_bytes), (role, choice))
    return list(found.values())
