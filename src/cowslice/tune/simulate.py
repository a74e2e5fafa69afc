"""Caches replayed under a trace: QEMU's by its own rules, ours by its very policy and the packed sizes of a real image.

It does not know what a miss costs. One pass serves any number of settings.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from cowslice.cache.sizes import MIN_L2_ENTRIES
from cowslice.format.geometry import Geometry
from cowslice.tune.curve import Columns, touched_spans
from cowslice.tune.curvepacked import PackedMap
from cowslice.tune.simulatereplay import MapReplay, QemuReplay, Replay
from cowslice.units import div_ceil

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class QemuSetting:
    """QEMU with `l2-cache-size` and `l2-cache-entry-size` in bytes: a whole number of entries, two at least, LRU."""

    cache_bytes: int
    entry_bytes: int

    @property
    def entries(self) -> int:
        """The entries that QEMU makes of it."""
        return max(MIN_L2_ENTRIES, self.cache_bytes // self.entry_bytes)


@dataclass(frozen=True, slots=True)
class MapSetting:
    """cowslice with a metadata budget in bytes over a map whose packed sizes are known.

    `packed.entry_bytes` is the unit of a metadata read. `readahead` lets one read bring more to a sequential reader.
    """

    cache_bytes: int
    packed: PackedMap
    policy: Literal["clock2q+", "lru"] = "clock2q+"
    readahead: bool = True


Setting = QemuSetting | MapSetting


@dataclass(frozen=True, slots=True, eq=False)
class Replayed:
    """What became of a trace at one setting. Lookups of a slice are `reads` and `writes`; some missed.

    `missed[i]` is how many misses the i-th request had that looked anything up, at most 65535.
    """

    setting: Setting
    reads: int
    writes: int
    read_misses: int
    write_misses: int
    missed: NDArray[np.uint16]

    @property
    def accesses(self) -> int:
        """Lookups of a slice, reads and writes."""
        return self.reads + self.writes

    @property
    def misses(self) -> int:
        """Lookups that had to read metadata."""
        return self.read_misses + self.write_misses

    @property
    def miss_ratio(self) -> float:
        """Misses per access, 0.0 without any."""
        return self.misses / self.accesses if self.accesses else 0.0


def simulate(
    requests: Iterable[Columns], settings: Sequence[Setting], geometry: Geometry, *, disk_size: int
) -> list[Replayed]:
    """Replay a trace at every setting in one pass; the results stand in the order of the settings.

    Caches begin empty. Raises OutOfRange for a request beyond the disk, and what the trace raises.
    """
    replays = [_replay(setting, geometry, disk_size) for setting in settings]
    missed: list[list[NDArray[np.uint16]]] = [[] for _ in settings]
    for chunk in requests:
        first, last, writes = touched_spans(chunk, geometry, disk_size)
        for replay, found in zip(replays, missed, strict=True):
            found.append(np.zeros(len(first), dtype=np.uint16))
            replay.add(first, last, writes, found[-1])
    return [_result(*each) for each in zip(settings, replays, missed, strict=True)]


def _replay(setting: Setting, geometry: Geometry, disk_size: int) -> Replay:
    if isinstance(setting, QemuSetting):
        span = setting.entry_bytes // geometry.l2_entry_size << geometry.cluster_bits
        return QemuReplay(span.bit_length() - 1, slices=div_ceil(disk_size, span), entries=setting.entries)
    packed = setting.packed
    return MapReplay(
        packed.slice_span.bit_length() - 1, budget=setting.cache_bytes, policy=setting.policy, sizes=packed.sizes,
        mapped=packed.mapped.view(np.uint8), entry_bytes=packed.entry_bytes,
        group=packed.entry_bytes // packed.slice_bytes, readahead=setting.readahead,
        per_table=geometry.cluster_size // packed.slice_bytes)


def _result(setting: Setting, replay: Replay, missed: Sequence[NDArray[np.uint16]]) -> Replayed:
    reads, read_misses, writes, write_misses = replay.counts
    every = np.concatenate(missed) if missed else np.zeros(0, dtype=np.uint16)
    return Replayed(setting, reads, writes, read_misses, write_misses, every)
