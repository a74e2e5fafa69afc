"""Caches replayed under a trace: QEMU's by its own rules, ours by its very policy and the packed sizes of a real image.

It does not know what a miss costs. One pass serves any number of settings.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from cowslice.cache.policy import Rehearsal
from cowslice.cache.sizes import MIN_L2_ENTRIES
from cowslice.format.geometry import Geometry
from cowslice.tune.curve import Columns, touched_spans
from cowslice.tune.curvepacked import PackedMap

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

    `packed.entry_bytes` is the unit of a metadata read.
    """

    cache_bytes: int
    packed: PackedMap
    policy: Literal["clock2q+", "lru"] = "clock2q+"


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
    replays = [_Replay(setting, geometry) for setting in settings]
    for chunk in requests:
        spans = touched_spans(chunk, geometry, disk_size)
        for replay in replays:
            replay.add(*spans)
    return [replay.finished() for replay in replays]


class _Replay:
    def __init__(self, setting: Setting, geometry: Geometry) -> None:
        self.setting = setting
        self.missed: list[int] = []
        self.counts = [[0, 0], [0, 0]]
        if isinstance(setting, QemuSetting):
            self.span = setting.entry_bytes // geometry.l2_entry_size << geometry.cluster_bits
            self.held: OrderedDict[int, None] = OrderedDict()
        else:
            self.span = setting.packed.slice_span
            self.policy = Rehearsal(setting.policy, setting.cache_bytes - setting.packed.directory_bytes)

    def add(self, first: NDArray[np.uint64], last: NDArray[np.uint64], writes: NDArray[np.uint8]) -> None:
        for start, end, write in zip(first.tolist(), last.tolist(), writes.tolist(), strict=True):
            found = [self._access(number) for number in range(start // self.span, end // self.span + 1)]
            self.counts[write][0] += len(found)
            self.counts[write][1] += found.count(False)
            self.missed.append(min(found.count(False), 65535))

    def _access(self, number: int) -> bool:
        if isinstance(self.setting, MapSetting):
            return self.policy.access(number, int(self.setting.packed.sizes[number]))
        if number in self.held:
            self.held.move_to_end(number)
            return True
        if len(self.held) == self.setting.entries:
            self.held.popitem(last=False)
        self.held[number] = None
        return False

    def finished(self) -> Replayed:
        (reads, read_misses), (writes, write_misses) = self.counts
        return Replayed(self.setting, reads, writes, read_misses, write_misses, np.array(self.missed, dtype=np.uint16))
