"""From an open image, a trace and a calibrated storage to all that advice rests on.

It does not know where the trace comes from, only that it can be iterated again. What must hold: a trace larger than
memory is read more than once rather than kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from cowslice.cache.sizes import CacheSizes, Size, plan_cache_sizes
from cowslice.errors import BadOption
from cowslice.image.image import Image
from cowslice.tune.advise import Evidence
from cowslice.tune.calibrate import Calibration
from cowslice.tune.curve import slice_curves
from cowslice.tune.curvepacked import SLICE_BYTES, packed_curve, packed_map
from cowslice.tune.model import DEPTH, Load
from cowslice.tune.requests import Requests
from cowslice.tune.survey import Survey

KEPT_REQUESTS = 4_000_000  # in memory between passes: 132 MB; a longer trace is read again

Advance = Callable[[int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """Cache options as QEMU is given them today; None is 'not given'."""

    cache_size: Size = None
    l2_cache_size: Size = None
    refcount_cache_size: Size = None
    l2_cache_entry_size: Size = None

    def sizes(self, disk: Image) -> CacheSizes:
        """What QEMU makes of them for that disk. Raises BadOption, also for a raw disk."""
        if disk.geometry is None:
            raise BadOption(f"'{disk.path}' is a raw disk: it has no map, so no cache can help it")
        return plan_cache_sizes(disk.size, disk.geometry, cache_size=self.cache_size, l2_cache_size=self.l2_cache_size,
                                refcount_cache_size=self.refcount_cache_size,
                                l2_cache_entry_size=self.l2_cache_entry_size, qemu=True)


class Kept:
    """Requests that are iterated several times: kept in memory while they are few, else taken from `source` again."""

    def __init__(self, source: Iterable[Requests], most: int = KEPT_REQUESTS) -> None:
        self._source = source
        self._most = most
        self._chunks: list[Requests] | None = None

    def __iter__(self) -> Iterator[Requests]:
        if self._chunks is not None:
            yield from self._chunks
            return
        chunks: list[Requests] | None = []
        count = 0
        for chunk in self._source:
            count += len(chunk)
            if chunks is not None:
                chunks.append(chunk)
                chunks = chunks if count <= self._most else None
            yield chunk
        self._chunks = chunks


def gather(
    disk: Image, requests: Iterable[Requests], *, calibration: Calibration, source: str = "", name: str = "",
    today: Setting | None = None, depth: int = DEPTH, entry_bytes: int = SLICE_BYTES,
    on_progress: Advance | None = None,
) -> Evidence:
    """Read the whole trace and the image's map. `entry_bytes` is the unit of our metadata reads.

    Raises BadOption for a raw disk or a trace without requests, OutOfRange for one of a larger disk, and what reading
    the trace and the image raises.
    """
    tell = on_progress or (lambda done, total: None)
    sizes = (today or Setting()).sizes(disk)
    assert disk.geometry is not None
    tell(0, 3)
    packed = packed_map(disk, entry_bytes=min(entry_bytes, disk.geometry.cluster_size))
    tell(1, 3)
    survey = Survey(disk.size, packed.slice_span)
    kept = Kept(requests)
    curves = slice_curves(survey.watch(kept), disk.geometry, disk_size=disk.size)
    if not curves.requests:
        raise BadOption(f"{source or 'the trace'} has no request that reads or writes, expected some")
    tell(2, 3)
    by_bytes = packed_curve(kept, packed)
    tell(3, 3)
    habits = survey.habits()
    load = Load(length=max(512, habits.mean_length), depth=depth, arrivals=habits.arrivals)
    return Evidence(name=name or disk.path, path=disk.path, size=disk.size, layers=len(disk.layers), habits=habits,
                    curves=curves, packed=packed, packed_curve=by_bytes, calibration=calibration, load=load,
                    today=sizes, source=source)
