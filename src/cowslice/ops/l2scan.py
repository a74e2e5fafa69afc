"""One thread's part of a check: read L2 tables and count what they refer to, as often as L1 entries name them.

It does not know where the tables come from or what becomes of a finding. Tables that overlap, as only those of a
spoiled image do, are cut where one begins or ends, so that no byte of the file is looked at twice in one pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from cowslice.errors import StorageError
from cowslice.format.geometry import Geometry
from cowslice.ops.dataruns import DataRuns
from cowslice.ops.l2rules import EntryRules, judge_entry, start_cluster
from cowslice.ops.refcheck import SATURATED, UNREADABLE, Tally, Trail
from cowslice.ops.references import stored_count
from cowslice.ops.roots import Roots
from cowslice.ops.tables import Tables
from cowslice.ops.tableset import TableSet


@dataclass(frozen=True, slots=True)
class Stretch:
    """Host bytes that `times` L1 entries name, all as part of L2 tables: `active` of them on the active disk.

    `begun` active tables begin here; `first` is the number of the first table that covers it.
    """

    start: int
    end: int
    times: int
    active: int
    begun: int
    first: int


def stretches(tables: TableSet, low: int, high: int, cluster_size: int) -> Iterator[Stretch]:
    """Cut the tables numbered `low` up to `high`, which overlap each other, where one begins or ends."""
    times = active = 0
    following = low
    at = tables[low][0]
    while low < high:
        begun = 0
        if following < high and tables[following][0] == at:
            _, _, begun, _, named = tables[following]
            active, times, following = active + begun, times + named, following + 1
        stop = tables[low][0] + cluster_size
        if following < high:
            stop = min(stop, tables[following][0])
        yield Stretch(at, stop, times, active, begun, low)
        at = stop
        if tables[low][0] + cluster_size == at:
            active, times, low = active - tables[low][2], times - tables[low][4], low + 1


class Verdicts(Protocol):
    """Who is told what a scan finds; any thread may tell."""

    def told(self, kind: str) -> bool: ...
    def corruption(self, message: str, cluster: int = -1, count: int = 1) -> None: ...
    def untold(self, corruptions: int) -> None: ...
    def error(self, message: str, count: int = 1) -> None: ...
    def overflow(self, cluster: int, owner: str, count: int) -> None: ...
    def add_totals(self, allocated: int, compressed: int, fragmented: int) -> None: ...


class TableScan:
    """Counts chains of L2 tables into one tally. `shared`: other threads count into it too."""

    def __init__(self, roots: Roots, tally: Tally, verdicts: Verdicts, *, shared: bool, sparse: bool) -> None:
        self.roots = roots
        self.tally = tally
        self.verdicts = verdicts
        self.shared = shared
        self.tables: Tables = roots.tables
        self.geometry: Geometry = self.tables.geometry
        self._runs = DataRuns(self.tables.storage, ask=sparse)
        self._described = max(1, len(self.tables.reftable) * self.geometry.refblock_entries)
        self._buffer = memoryview(bytearray(self.geometry.cluster_size))
        self._rules = [EntryRules(self.geometry, self.tables.header.has_data_file, active, self.tables.file_length)
                       for active in (False, True)]

    def chain(self, found: TableSet, low: int, high: int) -> None:
        """Count all tables of one chain."""
        trail = Trail()
        for stretch in stretches(found, low, high, self.geometry.cluster_size):
            trail.fresh += stretch.begun
            try:
                for start, end in self._runs.within(stretch.start, stretch.end):
                    piece = self._buffer[: end - start]
                    self.tables.storage.read_into(start, piece)
                    self._piece(found, stretch, start, piece, trail)
            except StorageError as error:
                if self.tally.first == 0:
                    self.verdicts.error(str(error))

    def _piece(self, found: TableSet, stretch: Stretch, start: int, piece: memoryview, trail: Trail) -> None:
        geometry = self.geometry
        # The header read as a table: nothing there can own a cluster alone.
        headless = stretch.active - (found[stretch.first][2] if found[stretch.first][0] == 0 else 0)
        described = self._described if self.verdicts.told("corruption") else 0
        odd, overflowed, allocated, compressed, fragmented, faults = self.tally.scan(
            piece, cluster_bits=geometry.cluster_bits, extended=geometry.extended_l2,
            data_file=self._rules[0].data_file, file_length=self.tables.file_length, active=headless > 0,
            shared=self.shared, times=stretch.times, visits=stretch.active, copied=headless,
            described=described, trail=trail)
        if faults:
            self.verdicts.untold(faults)
        for entry, cluster, count in overflowed:
            self.verdicts.overflow(cluster, self._place(found, stretch, start, entry), count)
        for entry in odd:
            self._judge(found, stretch, start, entry, piece, copied=headless)
        if stretch.active and self.tally.first == 0:
            self.verdicts.add_totals(allocated, compressed, fragmented)

    def _judge(
        self, found: TableSet, stretch: Stretch, start: int, entry: int, piece: memoryview, *, copied: int
    ) -> None:
        """Judge one entry by the plain rules and count it. It is told in the window where its span begins."""
        size = self.geometry.l2_entry_size
        raw = bytes(piece[entry * size : (entry + 1) * size])
        word, bitmap = int.from_bytes(raw[:8], "big"), int.from_bytes(raw[8:], "big")
        begins, tally = start_cluster(word, self._rules[0]), self.tally
        here = tally.first <= begins < tally.first + tally.clusters
        span = None
        for active, visits in enumerate((stretch.times - copied, copied)):
            if not visits:
                continue
            verdict = judge_entry(word, bitmap, self._rules[active], self._stored)
            span = verdict.span
            if not here and not (begins > self.tables.clusters and tally.first == 0):
                continue
            for fault in verdict.faults:
                known = self.verdicts.told("corruption")
                message = "" if known else f"{self._place(found, stretch, start, entry)} is {raw.hex()}: {fault}"
                self.verdicts.corruption(message, begins, visits)
        if span:
            last = (sum(span) - 1) >> self.geometry.cluster_bits
            excess, cluster = tally.add(begins, last - begins + 1, stretch.times)
            if excess:
                self.verdicts.overflow(cluster, self._place(found, stretch, start, entry), excess)

    def _stored(self, cluster: int) -> int | None:
        """The refcount on disk, from the tally where it holds it."""
        if self.tally.first <= cluster < self.tally.first + self.tally.clusters:
            stored: int = self.tally.get(cluster)[0]
            if stored != SATURATED:
                return None if stored == UNREADABLE else stored
        return stored_count(self.tables, cluster)

    def _place(self, found: TableSet, stretch: Stretch, start: int, entry: int) -> str:
        offset, place = found[stretch.first][:2]
        tree, index = self.roots.owner(place)
        at = (start - offset) // self.geometry.l2_entry_size + entry
        guest = (index << self.geometry.l2_bits | at) << self.geometry.cluster_bits
        return f"the entry of guest offset {guest:#x} of {tree.owner}"
