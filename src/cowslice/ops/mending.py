"""What a repair would change, planned by a check that writes into an overlay: counts, flags, impossible entries.

It does not write to the file. What must hold: a cluster that has two owners is never written, because one of them may
be guest data, and nothing is planned from an image of which something could not be read.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field, replace

from cowslice.format.entries import (
    ALL_SUBCLUSTERS,
    COMPRESSED,
    COPIED,
    L1_OFFSET_MASK,
    L2_OFFSET_MASK,
    ZERO,
    compressed_span,
)
from cowslice.format.refcounts import REFTABLE_OFFSET_MASK
from cowslice.format.snapshots import MIN_EXTRA_V3, Snapshot, encode_snapshot_table
from cowslice.format.words import unpack_words
from cowslice.ops.check import CheckReport, CheckRun, Progress
from cowslice.ops.l2rules import end_fault
from cowslice.ops.l2scan import Stretch, TableScan
from cowslice.ops.newcounts import NewCounts
from cowslice.ops.overlay import Overlay, Stage
from cowslice.ops.refcheck import Tally, Trail
from cowslice.ops.references import REFTABLE_OWNER, load_tables, stored_count
from cowslice.ops.tables import Tables
from cowslice.ops.tableset import TableSet
from cowslice.units import round_up

# Impossible entries mended at once; a file with more is mended again.
MOST_ENTRIES = 1 << 18
_SNAPSHOTS_OFFSET = 64  # where the header names the snapshot table (spec: Header)


@dataclass(slots=True)
class Survey:
    """What one counting pass learned. `entries`: host offset and new bytes of entries that can become plain zeros."""

    report: CheckReport
    must_rebuild: str = ""
    dangling: bool = False
    unread: int = 0
    entries: dict[int, bytes] = field(default_factory=dict)


class SurveyScan(TableScan):
    """Looks also for unaligned zero clusters that own space, and for entries that point behind the file."""

    def _piece(self, found: TableSet, stretch: Stretch, start: int, piece: memoryview, trail: Trail) -> None:
        super()._piece(found, stretch, start, piece, trail)
        geometry = self.geometry
        # Counts nothing (no times), and holds no copied flag: only what an entry alone has wrong.
        odd = self.tally.scan(
            piece, cluster_bits=geometry.cluster_bits, extended=geometry.extended_l2,
            data_file=self._rules[0].data_file, file_length=self.tables.file_length, active=False,
            shared=self.shared, times=0, visits=0,
        )[0]
        for entry in odd:
            at = entry * geometry.l2_entry_size
            raw = bytes(piece[at : at + geometry.l2_entry_size])
            self._look(start + at, int.from_bytes(raw[:8], "big"), int.from_bytes(raw[8:], "big"))

    def _look(self, at: int, word: int, bitmap: int) -> None:
        """Judge one entry that lies at host offset `at`."""
        survey: Survey = self.verdicts.survey  # type: ignore[attr-defined]
        geometry, rules, offset = self.geometry, self._rules[0], word & L2_OFFSET_MASK
        if word & COMPRESSED:
            survey.dangling |= bool(end_fault(*compressed_span(word, geometry.cluster_bits), rules))
            return
        data = bitmap & ALL_SUBCLUSTERS if geometry.extended_l2 else not word & ZERO
        if offset and not data and not geometry.is_aligned(offset):
            if len(survey.entries) < MOST_ENTRIES:
                # An extended entry keeps its bitmap: subclusters that show the backing file still do.
                survey.entries[at] = (0 if geometry.extended_l2 else ZERO).to_bytes(8, "big")
        elif offset and not rules.data_file and end_fault(offset, geometry.cluster_size, rules):
            survey.dangling = True


class Counting(CheckRun):
    """A check that plans the right refcounts: in place, or into new structures where `fresh` is given."""

    scan_type = SurveyScan

    def __init__(
        self, tables: Tables, overlay: Overlay, *, lower_only: bool, fresh: NewCounts | None, workers: int, window: int,
        progress: Progress | None,
    ) -> None:
        if fresh:  # what is replaced counts no more
            tables.areas = [area for area in tables.areas if area.owner != REFTABLE_OWNER]
            tables.reftable = array("Q")
        super().__init__(tables, workers=workers, window=window, progress=progress)
        self.survey = Survey(self.report)
        self.overlay = overlay
        self.lower_only = lower_only
        self.fresh = fresh
        self._lost = 0

    def everything(self) -> None:
        super().everything()
        end = self.tables.file_length
        self.survey.dangling |= any(found.find(end) < len(found) for found in self.roots.sets(self.found))
        self.survey.dangling |= any(area.offset + area.length >= end + self.geometry.cluster_size
                                    for area in self.tables.areas)
        self.survey.unread = self.report.check_errors - self._lost
        if self.fresh and not self.survey.unread:
            self.fresh.finish()

    def _lost_block(self, tally: Tally, index: int, why: str) -> None:
        before = self.report.check_errors
        super()._lost_block(tally, index, why)
        self._lost += self.report.check_errors - before
        self.survey.must_rebuild = why

    def _block_fault(self, word: int) -> str:
        fault = super()._block_fault(word)
        # Behind the file there is nothing to spoil: a leak elsewhere can be mended all the same.
        beyond = (word & REFTABLE_OFFSET_MASK) >> self.geometry.cluster_bits >= self.tables.clusters
        if fault and not (self.lower_only and beyond):
            self.survey.must_rebuild = f"refcount table entry {word:#018x}: {fault}"
        return fault

    def _count_refblocks(self, tally: Tally) -> None:
        super()._count_refblocks(tally)
        for index in self.blocks.get(tally.first // self.window, ()):
            cluster = (self.tables.reftable[index] & REFTABLE_OFFSET_MASK) >> self.geometry.cluster_bits
            if tally.get(cluster)[1] != 1:
                self.survey.must_rebuild = f"the cluster of refcount block {index} has another owner too"

    def _compare(self, tally: Tally) -> None:
        super()._compare(tally)
        if self.fresh:
            self.fresh.take(tally)
            return
        entries = self.geometry.refblock_entries
        for index in range(tally.first // entries, (tally.first + tally.clusters - 1) // entries + 1):
            self._plan_block(tally, index)

    def _plan_block(self, tally: Tally, index: int) -> None:
        """Plan the counts of one block that is there."""
        geometry = self.geometry
        first, order, size = index * geometry.refblock_entries, geometry.refcount_order, geometry.cluster_size
        offset = self.tables.reftable[index] & REFTABLE_OFFSET_MASK if index < len(self.tables.reftable) else 0
        if not offset or not geometry.is_aligned(offset) or offset >= self.tables.file_length:
            if tally.put(first, bytearray(size), order, fresh=True)[0]:
                self.survey.must_rebuild = (self.survey.must_rebuild
                                            or f"there is no block for the refcounts of clusters from {first} on")
            return
        block = bytearray(self.overlay.read(offset, size))  # with what another window of the same block has planned
        raised, risen = tally.put(first, block, order, up=True)
        if risen and self.lower_only:
            self.survey.must_rebuild = "clusters that are in use count zero"
        if raised and not self.lower_only:
            self.overlay.change(Stage.RAISE, offset, bytes(block), f"{raised} refcounts are too low")
        elif raised:
            block = bytearray(self.overlay.read(offset, size))
        lowered, _ = tally.put(first, block, order, down=True)
        if lowered:
            self.overlay.change(Stage.LOWER, offset, bytes(block), f"{lowered} clusters are leaked")


class Flagging(CheckRun):
    """Plans copied flags of the active disk by the refcounts that the overlay shows, those already planned."""

    def __init__(self, overlay: Overlay, *, window: int) -> None:
        super().__init__(load_tables(overlay), workers=1, window=window, progress=None)
        self.overlay = overlay
        self.refused: list[str] = []

    def everything(self) -> None:
        self.found = self.roots.collect(0)
        for first in range(0, self.universe, self.window):
            tally = Tally(first, min(self.window, self.universe - first), self.geometry.max_refcount)
            self._load_stored(tally)
            self._flag_l1(tally)
            for found in self.roots.sets(self.found):
                for n in range(found.find(self.tables.file_length)):
                    offset, _, active, _, times = found[n]
                    if active and offset and self.geometry.is_aligned(offset):
                        self._flag_table(tally, offset, times)

    def _flag_l1(self, tally: Tally) -> None:
        bits = self.geometry.cluster_bits
        for piece in self.roots.pieces():
            if not piece.tree.active:
                continue
            for n, word in enumerate(unpack_words(piece.data)):
                cluster = (word & L1_OFFSET_MASK) >> bits
                if not word & L1_OFFSET_MASK or not tally.first <= cluster < tally.first + tally.clusters:
                    continue
                stored = tally.get(cluster)[0]
                if cluster < self.tables.clusters and (stored == 1) != bool(word & COPIED):
                    self._set(piece.start + n * 8, 1, (word ^ COPIED).to_bytes(8, "big"),
                              f"the copied flag of L1 entry {(piece.start - piece.tree.offset) // 8 + n}: the refcount "
                              f"of its table is {stored}")

    def _flag_table(self, tally: Tally, offset: int, times: int) -> None:
        geometry, header = self.geometry, self.tables.header
        table = bytearray(self.tables.storage.read(offset, geometry.cluster_size))
        odd = tally.scan(
            table, cluster_bits=geometry.cluster_bits, extended=geometry.extended_l2, data_file=header.has_data_file,
            file_length=self.tables.file_length, active=True, shared=False,
        )[0]
        wrong = 0
        for entry in odd:
            at = entry * geometry.l2_entry_size
            word = int.from_bytes(table[at : at + 8], "big")
            if self._is_flag_wrong(tally, word):
                table[at : at + 8] = (word ^ COPIED).to_bytes(8, "big")
                wrong += 1
        if wrong:
            self._set(offset, times, bytes(table), f"{wrong} copied flags of this L2 table do not fit the refcounts")

    def _is_flag_wrong(self, tally: Tally, word: int) -> bool:
        offset = word & L2_OFFSET_MASK
        if word & COMPRESSED:
            return bool(word & COPIED)
        if self.tables.header.has_data_file:
            return not word & COPIED
        cluster = offset >> self.geometry.cluster_bits
        if not offset or cluster >= self.tables.clusters or not tally.first <= cluster < tally.first + tally.clusters:
            return False
        return (tally.get(cluster)[0] == 1) != bool(word & COPIED)

    def _set(self, offset: int, times: int, new: bytes, why: str) -> None:
        owners = stored_count(self.tables, offset >> self.geometry.cluster_bits)
        if owners == times:
            self.overlay.change(Stage.MEND, offset, new, why)
        elif owners is not None and owners > times:
            self.refused.append(f"{why}, but the cluster at {offset:#x} is used for something else too")


def mend_snapshots(overlay: Overlay) -> bool:
    """Plan a new snapshot table where records of version 3 lack their sizes: whether there is one."""
    tables = load_tables(overlay)
    header, snapshots = tables.header, tables.snapshots
    if header.version < 3 or tables.errors or len(snapshots) < header.snapshot_count:
        return False
    if all(len(one.extra) >= MIN_EXTRA_V3 for one in snapshots):
        return False
    table = encode_snapshot_table(_completed(one, header.size) for one in snapshots)
    at = round_up(tables.file_length + tables.geometry.cluster_size - 1, tables.geometry.cluster_size)
    overlay.change(Stage.RAISE, at, table, "a new snapshot table, with the sizes that records lack")
    overlay.change(Stage.SWITCH, _SNAPSHOTS_OFFSET, at.to_bytes(8, "big"), "the header names the new snapshot table")
    return True


def _completed(one: Snapshot, size: int) -> Snapshot:
    if len(one.extra) >= MIN_EXTRA_V3:
        return one
    return replace(one, extra=one.vm_state_size.to_bytes(8, "big") + size.to_bytes(8, "big"))
