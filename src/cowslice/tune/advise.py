"""From curves and a forecast to a setting: the knee, what a megabyte more buys, what covers all, where a cliff is.

It is pure: records in, records out, no words (they are `wording`'s). What must hold: the setting that is advised
reaches `ENOUGH` of the best rate by the same forecast, and no smaller candidate does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import numpy as np

from cowslice.cache.sizes import MIN_ENTRY_SIZE, CacheSizes, plan_cache_sizes
from cowslice.format.geometry import Geometry
from cowslice.tune.calibrate import Calibration
from cowslice.tune.curve import Curve, Curves
from cowslice.tune.curvepacked import PackedCurve, PackedMap
from cowslice.tune.model import Forecast, Load, forecast_cowslice, forecast_qemu
from cowslice.tune.survey import Habits
from cowslice.units import KiB, MiB, round_up

ENOUGH = 0.95  # of the best rate: the knee
LEAST = 64 * KiB  # nobody saves memory below that
STEPS_PER_OCTAVE = 6  # of the sizes that a line is drawn through
CLIFF_DROP = 0.2  # of all lookups, within CLIFF_SPAN of size
CLIFF_SPAN = 1.15
LEAST_LOOP = 4  # entries; every curve is steep where it begins
FEW_REQUESTS = 1000
STILL_NEW = 0.1  # of the parts of the disk first touched in the last quarter of the trace
OTHER_CLUSTERS = (-2, 2, 4)  # bits that other clusters are longer: a quarter, four and sixteen times the size
CLUSTER_BITS, EXTENDED_BITS = (12, 21), (14, 21)  # that people choose, and that subclusters leave to be chosen
FRAGMENTED = 4  # times what the map would take written in order, and at least LEAST

Engine = Literal["qemu", "cowslice"]


class _Misses(Protocol):
    @property
    def accesses(self) -> int: ...
    def miss_ratio(self, cache_bytes: int, *, warm: bool = False) -> float: ...


@dataclass(frozen=True, slots=True)
class Choice:
    """One setting and what it gives, first touches apart. `misses` are metadata reads per request."""

    engine: Engine
    cache_bytes: int
    entry_bytes: int
    miss_ratio: float
    misses: float
    forecast: Forecast

    @property
    def rate(self) -> float:
        return self.forecast.rate


@dataclass(frozen=True, slots=True)
class Line:
    """The settings of one engine with one entry size, by growing cache; `knee` is the smallest that is enough."""

    engine: Engine
    entry_bytes: int
    choices: tuple[Choice, ...]
    knee: Choice


@dataclass(frozen=True, slots=True)
class Cliff:
    """Between two cache sizes the miss ratio falls steeply: a loop that fits or does not."""

    entry_bytes: int
    below: int
    above: int
    misses_below: float
    misses_above: float


@dataclass(frozen=True, slots=True)
class Compaction:
    """Bytes of the packed map now, and if all clusters lay in order."""

    now: int
    then: int


@dataclass(frozen=True, slots=True)
class OtherClusters:
    """What QEMU would need for as much with other clusters, and to hold the whole map of the same disk."""

    geometry: Geometry
    choice: Choice
    full_bytes: int


@dataclass(frozen=True, slots=True, eq=False)
class Evidence:
    """All that advice rests on: one image, one trace, one storage. `today` is QEMU's setting now."""

    name: str
    path: str
    size: int
    layers: int
    habits: Habits
    curves: Curves
    packed: PackedMap
    packed_curve: PackedCurve
    calibration: Calibration
    load: Load
    today: CacheSizes
    source: str


@dataclass(frozen=True, slots=True, eq=False)
class Advice:
    """The advised settings, those of today, those that hold everything, and what there is to know about them."""

    evidence: Evidence
    lines: tuple[Line, ...]
    qemu: Choice
    qemu_today: Choice
    qemu_full: Choice
    ours: Choice
    ours_today: Choice
    ours_full: Choice
    next_megabyte: Choice
    cliff: Cliff | None
    compaction: Compaction | None
    too_short: str
    others: tuple[OtherClusters, ...]

    @property
    def best_rate(self) -> float:
        """What QEMU gives when nothing is missing."""
        return self.qemu_full.rate


def advise(evidence: Evidence) -> Advice:
    """Choose settings for one disk."""
    at = _Settings(evidence, evidence.curves.by_entry_bytes)
    full = evidence.today.full_coverage
    lines = at.lines(full)
    ours = at.our_line()
    best = at.qemu(full, max(at.curves))
    chosen = _smallest(lines, full, at)
    today = evidence.today
    return Advice(
        evidence=evidence, lines=(*lines, ours), qemu=chosen, qemu_full=best, ours=ours.knee,
        qemu_today=at.qemu(today.l2_cache_size, today.l2_cache_entry_size), ours_today=at.ours(today.l2_cache_size),
        ours_full=at.ours(_handy(evidence.packed.packed_bytes)),
        next_megabyte=at.qemu(min(today.l2_cache_size + MiB, full), today.l2_cache_entry_size),
        cliff=_cliff(evidence.curves.by_entry_bytes[chosen.entry_bytes]), compaction=_compaction(evidence.packed),
        too_short=_too_short(evidence, chosen), others=_others(evidence))  # fmt: skip


class _Settings:
    """What a setting gives, by the evidence, where the curves of QEMU's entry sizes are these."""

    def __init__(self, evidence: Evidence, curves: Mapping[int, Curve]) -> None:
        self.evidence = evidence
        self.curves = curves

    def qemu(self, cache_bytes: int, entry_bytes: int) -> Choice:
        e = self.evidence
        ratio, misses = self._misses(self.curves[entry_bytes], cache_bytes)
        forecast = forecast_qemu(e.calibration.qemu, e.load, misses=misses, entry_bytes=entry_bytes,
                                 entries=cache_bytes // entry_bytes)
        return Choice("qemu", cache_bytes, entry_bytes, ratio, misses, forecast)

    def ours(self, cache_bytes: int) -> Choice:
        e = self.evidence
        ratio, misses = self._misses(e.packed_curve, cache_bytes)
        forecast = forecast_cowslice(e.calibration.ours, e.load, misses=misses, entry_bytes=e.packed.entry_bytes)
        return Choice("cowslice", cache_bytes, e.packed.entry_bytes, ratio, misses, forecast)

    def lines(self, full: int) -> tuple[Line, ...]:
        """QEMU with each entry size, the smallest first."""
        return tuple(self._line(entry, full) for entry in sorted(self.curves))

    def _line(self, entry: int, full: int) -> Line:
        """QEMU with one entry size, from two entries to all."""
        curve = self.curves[entry]
        steps = sorted({int(curve.entries_of(0)), *(int(n) for n in curve.entries if n >= 2), -(-full // entry)})
        knee = _first_enough([n * entry for n in steps], lambda size: self.qemu(size, entry))
        sizes = _ladder(2 * entry, max(full, 2 * entry))
        return Line("qemu", entry, tuple(self.qemu(size, entry) for size in sizes), knee)

    def our_line(self) -> Line:
        """Our engine, from almost nothing to the whole packed map."""
        curve, packed = self.evidence.packed_curve, self.evidence.packed
        full = max(packed.packed_bytes, LEAST)
        steps = [int(size) + curve.directory_bytes for size in curve.sizes] + [full]
        knee = _first_enough(sorted({max(size, 1) for size in steps}), self.ours)
        sizes = _ladder(min(LEAST, max(full // 64, 4 * KiB)), max(full, 2 * LEAST))
        return Line("cowslice", packed.entry_bytes, tuple(self.ours(size) for size in sizes),
                    self.ours(_handy(knee.cache_bytes)))

    def _misses(self, curve: _Misses, cache_bytes: int) -> tuple[float, float]:
        """(misses per lookup, misses per request), first touches apart."""
        ratio = max(0.0, curve.miss_ratio(cache_bytes, warm=True))
        return ratio, ratio * curve.accesses / max(1, self.evidence.curves.requests)


def _first_enough(sizes: Sequence[int], at: Callable[[int], Choice]) -> Choice:
    """The smallest of these growing sizes that gives ENOUGH of what the largest gives."""
    enough = ENOUGH * at(sizes[-1]).rate
    low, high = 0, len(sizes) - 1
    while low < high:
        middle = (low + high) // 2
        if at(sizes[middle]).rate >= enough:
            high = middle
        else:
            low = middle + 1
    return at(sizes[low])


def _smallest(lines: Sequence[Line], full: int, at: _Settings) -> Choice:
    """The knee of the entry size that needs least memory, at a handy size; of equals the fastest."""
    handy = [at.qemu(max(min(_handy(line.knee.cache_bytes), full), 2 * line.entry_bytes), line.entry_bytes)
             for line in lines]
    enough = [choice for choice in handy if choice.rate >= ENOUGH * 0.99 * max(other.rate for other in handy)]
    least = min(choice.cache_bytes for choice in enough)
    if least >= full:  # everything is held: then the size of an entry does not matter and QEMU's default is best
        return at.qemu(full, max(at.curves))
    # Larger entries fill the cache sooner; smaller ones than a block of the host's file system read no faster.
    return max((choice for choice in enough if choice.cache_bytes == least),
               key=lambda choice: (choice.entry_bytes >= 4 * KiB, choice.rate))


def _others(evidence: Evidence) -> tuple[OtherClusters, ...]:
    """The same requests on the same disk, had it been made with other clusters or with extended entries."""
    geometry = evidence.curves.geometry
    bits, extended = geometry.cluster_bits, geometry.extended_l2
    made = [Geometry(bits + more, extended) for more in OTHER_CLUSTERS] + [Geometry(bits, not extended)]
    found = (_other(evidence, other) for other in made if _can_be_chosen(other))
    return tuple(other for other in found if other is not None)


def _can_be_chosen(geometry: Geometry) -> bool:
    least, most = EXTENDED_BITS if geometry.extended_l2 else CLUSTER_BITS
    return least <= geometry.cluster_bits <= most


def _other(evidence: Evidence, geometry: Geometry) -> OtherClusters | None:
    curves = curves_with(evidence.curves, geometry)
    if not curves:
        return None
    at, full = _Settings(evidence, curves), plan_cache_sizes(evidence.size, geometry, qemu=True).full_coverage
    return OtherClusters(geometry, _smallest(at.lines(full), full, at), full)


def curves_with(curves: Curves, geometry: Geometry) -> dict[int, Curve]:
    """The curves by what an entry is with another geometry, as far as they are known.

    A slice is the guest bytes that it maps, whatever the entries in it: with larger clusters a smaller one does.
    """
    found = {}
    for curve in curves.by_entry_bytes.values():
        entry = (curve.slice_span >> geometry.cluster_bits) * geometry.l2_entry_size
        if MIN_ENTRY_SIZE <= entry <= geometry.cluster_size:
            found[entry] = replace(curve, entry_bytes=entry)
    return found


def _handy(size: int) -> int:
    """The next size that people would write: at least 64 KiB, in steps of about a tenth."""
    if size <= LEAST:
        return LEAST
    step = max(64 * KiB, 1 << (size.bit_length() - 4))
    return round_up(size, step)


def _ladder(least: int, most: int) -> list[int]:
    """Sizes from least to most, both included, in equal proportions."""
    steps = max(2, int(np.ceil(np.log2(most / least) * STEPS_PER_OCTAVE)) + 1)
    return sorted({round(least * (most / least) ** (n / (steps - 1))) for n in range(steps)})


def _cliff(curve: Curve) -> Cliff | None:
    """The steepest place of a curve, if it is steep enough to stand on the wrong side of."""
    if not curve.accesses or len(curve.entries) < 2:
        return None
    misses = curve.misses / curve.accesses
    # The largest size that still has misses[n], and what a cache a little larger than that has.
    below = curve.entries[1:] - 1
    ends = np.searchsorted(curve.entries, np.maximum(below * CLIFF_SPAN, below + 1), side="right") - 1
    drops = np.where(below >= LEAST_LOOP, misses[:-1] - misses[ends], 0.0)
    at = int(drops.argmax())
    if drops[at] < CLIFF_DROP:
        return None
    cold = curve.cold / curve.accesses
    entry = curve.entry_bytes
    return Cliff(entry, int(below[at]) * entry, int(curve.entries[ends[at]]) * entry,
                 float(misses[at] - cold), float(misses[ends[at]] - cold))


def _compaction(packed: PackedMap) -> Compaction | None:
    """What packing would give on an image written in order, if this one is far from it."""
    if packed.packed_bytes < max(LEAST, FRAGMENTED * packed.directory_bytes):
        return None
    return Compaction(packed.packed_bytes, packed.directory_bytes)


def _too_short(evidence: Evidence, chosen: Choice) -> str:
    """Why the trace cannot tell, or ''."""
    habits, curve = evidence.habits, evidence.curves.by_entry_bytes[chosen.entry_bytes]
    if habits.requests < FEW_REQUESTS:
        return f"it has only {habits.requests} requests"
    if habits.late_share >= STILL_NEW:
        return f"{habits.late_share:.0%} of the places it touches come up first in its last quarter"
    if curve.accesses < 2 * curve.touched:
        return "it comes back to hardly any place"
    held = max(2, chosen.cache_bytes // chosen.entry_bytes)
    if curve.touched > held and curve.misses_at(held) < 2 * held:
        return f"it fills a cache of {held} entries less than twice"
    return ""
