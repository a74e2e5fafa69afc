"""Check a qcow2 file: count every reference to every host cluster and hold the counts against those on disk.

It changes nothing and opens nothing that the image names. Memory is bounded: counts are held for one window of host
clusters at a time, findings up to a limit, and the totals count them all, by the same rules as `qemu-img check`.
"""

from __future__ import annotations

import threading
from array import array
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace

from cowslice.errors import StorageError, UnsupportedImage
from cowslice.format.limits import MAX_FINDINGS
from cowslice.format.refcounts import REFTABLE_OFFSET_MASK, REFTABLE_RESERVED_MASK
from cowslice.ops.dataruns import DataRuns
from cowslice.ops.l2rules import EntryRules, end_fault, l1_faults
from cowslice.ops.l2scan import TableScan
from cowslice.ops.refcheck import SATURATED, UNREADABLE, Tally
from cowslice.ops.references import load_tables, place_fault, stored_count
from cowslice.ops.roots import L1Piece, Roots
from cowslice.ops.sweep import Segment, sweep
from cowslice.ops.tables import Tables
from cowslice.ops.tableset import TableSet
from cowslice.storage.base import Storage
from cowslice.units import SECTOR, MiB

# Host clusters counted at once: 8 bytes each, so 128 MiB count 1 TiB of 64 KiB clusters in one pass.
WINDOW = 1 << 24
# QEMU checks no more either; each window of them is one pass.
MAX_CLUSTERS = 1 << 31
# Below this many bytes of L2 tables a second thread costs more than it saves, unless the storage is slow.
WORTH_THREADS = 64 * MiB
# Clusters whose owners are looked up after the count.
MAX_CLAIMED = 1024

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class CheckFinding:
    """One thing that is wrong. `kind` is "corruption", "leak" or "error"; `count` is how often it counts in the totals.

    `cluster` is the first host cluster concerned, -1 for none; `clusters` how many follow in the same state.
    `claims` says who refers to it.
    """

    kind: str
    message: str
    count: int = 1
    cluster: int = -1
    clusters: int = 0
    claims: tuple[str, ...] = ()


@dataclass(slots=True)
class CheckReport:
    """The result of a check: totals over everything, and the first findings of each kind."""

    corruptions: int = 0
    leaks: int = 0
    check_errors: int = 0
    image_end_offset: int = 0
    total_clusters: int = 0
    allocated_clusters: int = 0
    fragmented_clusters: int = 0
    compressed_clusters: int = 0
    cluster_size: int = 0
    findings: list[CheckFinding] = field(default_factory=list)
    untold: int = 0
    _told: Counter[str] = field(default_factory=Counter, repr=False)

    def add(self, finding: CheckFinding, limit: int = MAX_FINDINGS) -> None:
        """Count a finding, and keep it unless there are enough of its kind."""
        if finding.kind == "leak":
            self.leaks += finding.count
        elif finding.kind == "error":
            self.check_errors += finding.count
        else:
            self.corruptions += finding.count
        if not self.is_full(finding.kind, limit):
            self._told[finding.kind] += 1
            self.findings.append(finding)
        else:
            self.untold += 1

    def is_full(self, kind: str, limit: int = MAX_FINDINGS) -> bool:
        """Whether there are so many findings of a kind that no more are kept, only counted."""
        return self._told[kind] >= limit


def check(storage: Storage, *, workers: int = 2, window: int = WINDOW, progress: Progress | None = None) -> CheckReport:
    """Check a qcow2 file for leaks and corruption. `progress(done, total)` counts distinct L2 tables over all passes.

    Raises ImageError when the header does not allow a check, StorageError when nothing can be read.
    """
    tables = load_tables(storage)
    if tables.clusters > MAX_CLUSTERS:
        raise UnsupportedImage(f"'{storage.name}' has {tables.clusters} host clusters, more than the {MAX_CLUSTERS} "
                               "that can be checked", features=("huge file",))
    run = CheckRun(tables, workers=workers, window=window, progress=progress)
    run.everything()
    return run.report


class CheckRun:
    """One check under way. Threads share the tally (atomic counts) and the report (under `_lock`)."""

    scan_type: type[TableScan] = TableScan

    def __init__(self, tables: Tables, *, workers: int, window: int, progress: Progress | None) -> None:
        self.tables = tables
        self.geometry = tables.geometry
        self.report = CheckReport(cluster_size=tables.geometry.cluster_size)
        self.report.total_clusters = self.geometry.clusters(tables.header.size // SECTOR * SECTOR)
        # One more than the file has: a span may begin in the last, incomplete cluster and end behind it.
        self.universe = tables.clusters + 1
        self.window = window
        self.roots = Roots(tables)
        self.workers = workers
        self._progress = progress
        self._jobs_lock = threading.Lock()
        self.stopped = False
        self._lock = threading.Lock()

    def everything(self) -> None:
        """Run every pass, then find out who claims the clusters whose counts differ."""
        for fault, times in self.tables.faults:
            self.corruption(fault, count=times)
        for error in self.tables.errors:
            self.error(error)
        self.areas = [*self._sound_areas()]
        self.blocks = self._sound_blocks()
        self.found = self.roots.collect(0, self._odd_l1_entry, lambda error: self.error(str(error)))
        self.untold(self.found.faults)
        self._tell_far_tables()
        self.sparse = self._is_sparse(len(self.found))
        self.chains = self._chains(self.found)
        highest = -1
        for first in range(0, self.universe, self.window):
            tally = Tally(first, min(self.window, self.universe - first), self.geometry.max_refcount)
            highest = max(highest, self._pass(tally))
        self.report.image_end_offset = (max(highest, 0) + 1) << self.geometry.cluster_bits
        self._name_claims()

    def _pass(self, tally: Tally) -> int:
        """Count into one window and compare it. Returns the highest cluster in use in it, or -1."""
        self._load_stored(tally)
        self._count_areas(tally)
        for found in self.roots.sets(self.found):
            self._count_tables(tally, found)
            self._scan_tables(tally, found, self.chains if found is self.found else self._chains(found))
        self._count_refblocks(tally)
        self._forget_beyond(tally)
        self._compare(tally)
        return tally.highest()

    def _load_stored(self, tally: Tally) -> None:
        """Bring the refcounts on disk of this window into the tally."""
        entries = self.geometry.refblock_entries
        buffer = bytearray(self.geometry.cluster_size)
        last = (tally.first + tally.clusters - 1) // entries
        held = -1
        for index in range(tally.first // entries, min(last + 1, len(self.tables.reftable))):
            offset = self.tables.reftable[index] & REFTABLE_OFFSET_MASK
            if not offset:
                continue
            if fault := place_fault(self.tables, offset):
                self._lost_block(tally, index, f"refcount block {index} {fault}")
                continue
            try:
                if offset != held:
                    self.tables.storage.read_into(offset, buffer)
                held = offset
            except StorageError as error:
                held = -1
                self._lost_block(tally, index, str(error))
                continue
            tally.load(index * entries, buffer, self.geometry.refcount_order)

    def _lost_block(self, tally: Tally, index: int, why: str) -> None:
        entries = self.geometry.refblock_entries
        marked = tally.unreadable(index * entries, min(entries, self.tables.clusters - index * entries))
        if marked:
            self.error(f"the refcounts of {marked} clusters cannot be known: {why}", marked)

    def _sound_areas(self) -> Iterator[Segment]:
        """The clusters of all structures but L2 tables and refcount blocks; what lies behind the file is told."""
        rules = EntryRules(self.geometry, self.tables.header.has_data_file, False, self.tables.file_length)
        spans, self._owners = [], list[str]()
        bits = self.geometry.cluster_bits
        for area in self.tables.areas:
            if area.length <= 0:
                continue
            if fault := end_fault(area.offset, area.length, rules):
                self.corruption(f"{area.owner}: {fault}", count=area.times)
                continue
            spans.append((area.offset >> bits, (area.offset + area.length - 1 >> bits) + 1, area.times))
            self._owners.append(area.owner)
        return sweep(spans)

    def _count_areas(self, tally: Tally) -> None:
        at = bisect_right(self.areas, tally.first, key=lambda segment: segment.end)
        for segment in self.areas[at:]:
            if segment.start >= tally.first + tally.clusters:
                return
            excess, cluster = tally.add(segment.start, segment.end - segment.start, segment.times)
            if excess:
                self.overflow(cluster, self._owners[segment.member], excess)

    def overflow(self, cluster: int, owner: str, count: int) -> None:
        """Tell of references beyond the refcount width. May be called by any thread."""
        most = self.geometry.max_refcount
        self.corruption(f"{owner} refers to a cluster that already has {most} references, as many as its refcount "
                         "can say", cluster, count)

    def _odd_l1_entry(self, piece: L1Piece, index: int) -> None:
        """Judge an entry of an L1 table, but for where its table lies."""
        word, tree = piece.word(index), piece.tree
        for fault in l1_faults(word, self.geometry):
            number = (piece.start - tree.offset) // 8 + index
            self.corruption(f"L1 entry {number} of {tree.owner} is {word:#018x}: {fault}", count=piece.times)

    def _tell_far_tables(self) -> None:
        """Tell of all L1 entries whose table lies behind the file."""
        for found in self.roots.sets(self.found):
            for n in range(found.find(self.tables.file_length), len(found)):
                offset, place, active, copied, times = found[n]
                end = self.tables.file_length
                self._tell_table(place, f"it points at {offset:#x}, beyond the end of the file at {end:#x}", times)
                if active:
                    stored = stored_count(self.tables, offset >> self.geometry.cluster_bits)
                    self._hold_copied(place, active, copied, stored)

    def _count_tables(self, tally: Tally, found: TableSet) -> None:
        """Count the clusters that L2 tables lie in: two of a table that is not aligned."""
        bits, size = self.geometry.cluster_bits, self.geometry.cluster_size
        low = found.find(max(0, (tally.first - 1) << bits))
        for n in range(low, found.find(min((tally.first + tally.clusters) << bits, self.tables.file_length))):
            offset, place, active, copied, times = found[n]
            first, last = offset >> bits, (offset + size - 1) >> bits
            excess, cluster = tally.add(first, last - first + 1, times)
            if excess:
                self.overflow(cluster, self._l1_entry(place), excess)
            if active and offset and first >= tally.first:
                stored = tally.get(first)[0]
                exact = stored_count(self.tables, first) if stored in (SATURATED, UNREADABLE) else stored
                self._hold_copied(place, active, copied, exact)

    def _hold_copied(self, place: int, active: int, copied: int, stored: int | None) -> None:
        """Hold the copied flags of all active L1 entries that name one table against its refcount on disk."""
        wrong = active - copied if stored == 1 else copied
        if wrong and stored is not None:
            flag = "clear" if stored == 1 else "set"
            self._tell_table(place, f"the copied flag is {flag}, but the refcount of the table is {stored}", wrong)

    def _tell_table(self, place: int, fault: str, times: int) -> None:
        self.corruption("" if self.told("corruption") else f"{self._l1_entry(place)}: {fault}", count=times)

    def _l1_entry(self, place: int) -> str:
        tree, index = self.roots.owner(place)
        return f"L1 entry {index} of {tree.owner}"

    def _is_sparse(self, tables: int) -> bool:
        """Whether some L2 tables must lie in holes, so that it is worth to ask where the holes are."""
        return tables << self.geometry.cluster_bits > max(self.tables.storage.allocated() or 0, WORTH_THREADS)

    def _chains(self, found: TableSet) -> array[int]:
        """The number of the first table of each chain of overlapping tables with data, and where the chain ends."""
        chains = array("Q")
        runs = DataRuns(self.tables.storage, ask=self.sparse)
        low, last = 0, found.find(self.tables.file_length)
        while low < last:
            high = min(found.chain(low, self.geometry.cluster_size), last)
            start, end = found[low][0], found[high - 1][0] + self.geometry.cluster_size
            with suppress(StorageError):  # it is met again when the table is read
                if next(runs.within(start, end), None) is None:
                    low = high
                    continue
            chains.extend((low, high))
            low = high
        return chains

    def _scan_tables(self, tally: Tally, found: TableSet, chains: array[int]) -> None:
        """Count what L2 tables refer to, in as many threads as are worth their while."""
        local = self.tables.storage.fileno() >= 0
        worth = len(chains) // 2 << self.geometry.cluster_bits >= WORTH_THREADS or not local
        workers = min(self.workers, len(chains) // 2) if worth else 1
        jobs = zip(chains[::2], chains[1::2], strict=True)
        total = len(found) * -(-self.universe // self.window)
        done = len(found) * (tally.first // self.window)
        failures: list[BaseException] = []

        def work() -> None:
            scan = self.scan_type(self.roots, tally, self, shared=workers > 1, sparse=self.sparse)
            try:
                while (job := self._next_job(jobs, done, total)) is not None:
                    scan.chain(found, *job)
            except BaseException as error:
                self.stopped = True
                failures.append(error)

        if workers <= 1:
            work()
        else:
            self._join([threading.Thread(target=work, daemon=True) for _ in range(workers)])
        if failures:
            raise failures[0]

    def _join(self, threads: list[threading.Thread]) -> None:
        for thread in threads:
            thread.start()
        try:
            for thread in threads:
                thread.join()
        except BaseException:
            self.stopped = True
            raise

    def _next_job(self, jobs: Iterator[tuple[int, int]], done: int, total: int) -> tuple[int, int] | None:
        """Hand out one chain of tables; None when there are no more, or nobody waits for the result."""
        with self._jobs_lock:
            job = None if self.stopped else next(jobs, None)
            if self._progress and not self.stopped:
                self._progress(done + job[0] if job else min(done + len(self.found), total), total)
            return job

    def _sound_blocks(self) -> dict[int, array[int]]:
        """Tell which refcount table entries are wrong; the indexes of the others by the window of their block."""
        blocks: dict[int, array[int]] = {}
        for index, word in enumerate(self.tables.reftable):
            if not word:
                continue
            if fault := self._block_fault(word):
                self.corruption(f"refcount table entry {index} is {word:#018x}: {fault}")
            elif offset := word & REFTABLE_OFFSET_MASK:
                window = (offset >> self.geometry.cluster_bits) // self.window
                blocks.setdefault(window, array("L")).append(index)
        return blocks

    def _count_refblocks(self, tally: Tally) -> None:
        """Count the refcount blocks last: each must be referenced once, by its table entry alone."""
        for index in self.blocks.get(tally.first // self.window, ()):
            cluster = (self.tables.reftable[index] & REFTABLE_OFFSET_MASK) >> self.geometry.cluster_bits
            if excess := tally.add(cluster)[0]:
                self.overflow(cluster, f"refcount block {index}", excess)
            references = tally.get(cluster)[1]
            if references != 1:
                self.corruption(f"refcount block {index} has {references} references, expected 1", cluster=cluster)

    def _block_fault(self, word: int) -> str:
        offset = word & REFTABLE_OFFSET_MASK
        if reserved := word & REFTABLE_RESERVED_MASK:
            return f"reserved bits {reserved:#x} are set"
        if not self.geometry.is_aligned(offset):
            return f"it points at {offset:#x}, not aligned to a cluster"
        if offset >> self.geometry.cluster_bits >= self.tables.clusters:
            return f"it points at {offset:#x}, beyond the end of the file at {self.tables.file_length:#x}"
        return ""

    def _forget_beyond(self, tally: Tally) -> None:
        """The cluster behind the last one is looked at only if something refers to it."""
        beyond = self.tables.clusters
        if tally.first <= beyond < tally.first + tally.clusters and not tally.get(beyond)[1]:
            tally.unreadable(beyond, 1)

    def _compare(self, tally: Tally) -> None:
        """Report every run of clusters whose two counts differ."""
        at = tally.first
        while run := tally.mismatch(at, leaks=not self.told("leak"), corruptions=not self.told("corruption")):
            cluster, clusters, stored, counted = run
            at = cluster + clusters
            exact = stored_count(self.tables, cluster) if stored == SATURATED else stored
            kind = "corruption" if stored < counted else "leak"
            noun = f"cluster {cluster}" if clusters == 1 else f"clusters {cluster} to {at - 1}"
            found = f"{counted} reference{'' if counted == 1 else 's'} found, the refcount is {exact}"
            what = "leaked, " if kind == "leak" else ""
            self.report.add(CheckFinding(kind, f"{noun}: {what}{found}", clusters, cluster, clusters))
        (leaks, leak_runs), (corruptions, corruption_runs) = tally.passed
        self.report.leaks += leaks
        self.report.corruptions += corruptions
        self.report.untold += leak_runs + corruption_runs

    def _name_claims(self) -> None:
        """Say for the clusters of kept findings which tables and entries refer to them."""
        wanted = sorted({
            cluster
            for told in self.report.findings if told.clusters
            for cluster in range(told.cluster, told.cluster + min(told.clusters, 16))
        })[:MAX_CLAIMED]
        if not wanted:
            return
        from cowslice.ops.claims import claims_of

        claimed = claims_of(self.roots, wanted, self.found)
        for n, told in enumerate(self.report.findings):
            if told.clusters:
                owners = [owner for k in range(told.cluster, told.cluster + min(told.clusters, 16))
                          for owner in claimed.get(k, ())]
                self.report.findings[n] = replace(told, claims=tuple(dict.fromkeys(owners))[:16])

    def add_totals(self, allocated: int, compressed: int, fragmented: int) -> None:
        """Add the numbers of one L2 table of the active disk."""
        with self._lock:
            self.report.allocated_clusters += allocated
            self.report.compressed_clusters += compressed
            self.report.fragmented_clusters += fragmented

    def told(self, kind: str) -> bool:
        """Whether no more findings of a kind are kept, so that nobody reads their message."""
        return self.report.is_full(kind)

    def corruption(self, message: str, cluster: int = -1, count: int = 1) -> None:
        """Count and keep a corruption. May be called by any thread."""
        with self._lock:
            self.report.add(CheckFinding("corruption", message, count, cluster))

    def untold(self, corruptions: int) -> None:
        """Count corruptions of which nothing more is kept. May be called by any thread."""
        with self._lock:
            self.report.corruptions += corruptions
            self.report.untold += corruptions

    def error(self, message: str, count: int = 1) -> None:
        """Count and keep something that could not be checked. May be called by any thread."""
        with self._lock:
            self.report.add(CheckFinding("error", message, count))
