"""Check a qcow2 file: count every reference to every host cluster and hold the counts against those on disk.

It changes nothing and opens nothing that the image names. Memory is bounded: counts are held for one window of host
clusters at a time, findings up to a limit, and the totals count them all, by the same rules as `qemu-img check`.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

from cowslice.errors import StorageError, UnsupportedImage
from cowslice.format.entries import COPIED, L1_OFFSET_MASK, L1_RESERVED_MASK
from cowslice.format.limits import MAX_FINDINGS
from cowslice.format.refcounts import REFTABLE_OFFSET_MASK, REFTABLE_RESERVED_MASK
from cowslice.ops.l2rules import EntryRules, end_fault, judge_entry, start_cluster
from cowslice.ops.refcheck import SATURATED, Tally
from cowslice.ops.references import load_tables, place_fault, stored_count
from cowslice.ops.tables import Area, L1Tree, Tables, most_tables
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
Job = tuple[L1Tree, int, int]


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
        if self._told[finding.kind] < limit:
            self._told[finding.kind] += 1
            self.findings.append(finding)
        else:
            self.untold += 1


def check(storage: Storage, *, workers: int = 2, window: int = WINDOW, progress: Progress | None = None) -> CheckReport:
    """Check a qcow2 file for leaks and corruption. `progress(done, total)` counts L2 tables over all passes.

    Raises ImageError when the header does not allow a check, StorageError when nothing can be read.
    """
    tables = load_tables(storage)
    if tables.clusters > MAX_CLUSTERS:
        raise UnsupportedImage(f"'{storage.name}' has {tables.clusters} host clusters, more than the {MAX_CLUSTERS} "
                               "that can be checked", features=("huge file",))
    run = _Run(tables, workers=workers, window=window, progress=progress)
    run.everything()
    return run.report


class _Run:
    """One check under way. Threads share the tally (atomic counts) and the report (under `_lock`)."""

    def __init__(self, tables: Tables, *, workers: int, window: int, progress: Progress | None) -> None:
        self.tables = tables
        self.geometry = tables.geometry
        self.report = CheckReport(cluster_size=tables.geometry.cluster_size)
        self.report.total_clusters = self.geometry.clusters(tables.header.size // SECTOR * SECTOR)
        # One more than the file has: a span may begin in the last, incomplete cluster and end behind it.
        self.universe = tables.clusters + 1
        self.window = window
        self._entries = sum(tree.entries for tree in tables.trees)
        self.workers = self._worth(workers)
        self._progress = progress
        self._done = 0
        self._total = self._entries * -(-self.universe // window)
        self._jobs_lock = threading.Lock()
        self.stopped = False
        self._lock = threading.Lock()

    def everything(self) -> None:
        """Run every pass, then find out who claims the clusters whose counts differ."""
        for fault in self.tables.faults:
            self.corruption(fault)
        for error in self.tables.errors:
            self.error(error)
        highest = -1
        for first in range(0, self.universe, self.window):
            tally = Tally(first, min(self.window, self.universe - first), self.geometry.max_refcount)
            highest = max(highest, self._pass(tally))
        self.report.image_end_offset = (max(highest, 0) + 1) << self.geometry.cluster_bits
        self._name_claims()

    def _worth(self, workers: int) -> int:
        tables = min(self._entries, self.tables.clusters)
        local = self.tables.storage.fileno() >= 0
        worth = tables << self.geometry.cluster_bits >= WORTH_THREADS or not local
        return min(workers, max(tables, 1)) if worth else 1

    def _pass(self, tally: Tally) -> int:
        """Count into one window and compare it. Returns the highest cluster in use in it, or -1."""
        self._load_stored(tally)
        first = tally.first == 0
        for area in self.tables.areas:
            self.count_area(tally, area, tell=first)
        self._scan_tables(tally)
        self._count_refblocks(tally, tell=first)
        self._forget_beyond(tally)
        self._compare(tally)
        return tally.highest()

    def _load_stored(self, tally: Tally) -> None:
        """Bring the refcounts on disk of this window into the tally."""
        entries = self.geometry.refblock_entries
        buffer = bytearray(self.geometry.cluster_size)
        last = (tally.first + tally.clusters - 1) // entries
        for index in range(tally.first // entries, min(last + 1, len(self.tables.reftable))):
            offset = self.tables.reftable[index] & REFTABLE_OFFSET_MASK
            if not offset:
                continue
            if fault := place_fault(self.tables, offset):
                self._lost_block(tally, index, f"refcount block {index} {fault}")
                continue
            try:
                self.tables.storage.read_into(offset, buffer)
            except StorageError as error:
                self._lost_block(tally, index, str(error))
                continue
            tally.load(index * entries, buffer, self.geometry.refcount_order)

    def _lost_block(self, tally: Tally, index: int, why: str) -> None:
        entries = self.geometry.refblock_entries
        marked = tally.unreadable(index * entries, min(entries, self.tables.clusters - index * entries))
        if marked:
            self.error(f"the refcounts of {marked} clusters cannot be known: {why}", marked)

    def count_area(self, tally: Tally, area: Area, *, tell: bool) -> None:
        """Count the references of one structure other than an L2 entry."""
        if area.length <= 0:
            return
        if fault := end_fault(area.offset, area.length, self.rules(active=False)):
            if tell:
                self.corruption(f"{area.owner}: {fault}")
            return
        first = area.offset >> self.geometry.cluster_bits
        last = (area.offset + area.length - 1) >> self.geometry.cluster_bits
        self.overflows(tally.add(first, last - first + 1), area.owner)

    def overflows(self, clusters: list[int], owner: str) -> None:
        for cluster in clusters:
            most = self.geometry.max_refcount
            self.corruption(f"{owner} refers to a cluster that already has {most} references, as many as its refcount "
                             "can say", cluster=cluster)

    def rules(self, *, active: bool) -> EntryRules:
        """What entries of the active disk, or of a snapshot, are held against."""
        return EntryRules(self.geometry, self.tables.header.has_data_file, active, self.tables.file_length)

    def _scan_tables(self, tally: Tally) -> None:
        """Count what all L2 tables refer to, in as many threads as are worth their while."""
        jobs = self._jobs(tell=tally.first == 0)
        if self.workers == 1:
            _Scan(self, tally, shared=False).everything(jobs)
            return
        scans = [_Scan(self, tally, shared=True) for _ in range(self.workers)]
        threads = [threading.Thread(target=scan.everything, args=(jobs,), daemon=True) for scan in scans]
        for thread in threads:
            thread.start()
        try:
            for thread in threads:
                thread.join()
        except BaseException:
            self.stopped = True
            raise
        for scan in scans:
            if scan.failure is not None:
                raise scan.failure

    def next_job(self, jobs: Iterator[Job]) -> Job | None:
        """Hand out one L2 table; None when there are no more, or nobody waits for the result."""
        with self._jobs_lock:
            job = None if self.stopped else next(jobs, None)
            if self._progress and not self.stopped:
                self._progress(self._done + (job[1] if job else 0), self._total)
            return job

    def _jobs(self, *, tell: bool) -> Iterator[Job]:
        """Walk every L1 table. One with more L2 tables than the file could hold is left where that shows."""
        for tree in self.tables.trees:
            try:
                for number, (index, word) in enumerate(tree.tables()):
                    if number == most_tables(self.tables):
                        if tell:
                            self.corruption(f"the L1 table of {tree.owner} has more L2 tables than the file has "
                                            "clusters; the rest of it is not checked")
                        break
                    yield tree, index, word
            except StorageError as error:
                if tell:
                    self.error(str(error))
            self._done += tree.entries

    def _count_refblocks(self, tally: Tally, *, tell: bool) -> None:
        """Count the refcount blocks last: each must be referenced once, by its table entry alone."""
        for index, word in enumerate(self.tables.reftable):
            if not word:
                continue
            offset = word & REFTABLE_OFFSET_MASK
            fault = self._block_fault(word)
            if fault:
                if tell:
                    self.corruption(f"refcount table entry {index} is {word:#018x}: {fault}")
                continue
            cluster = offset >> self.geometry.cluster_bits
            if not offset or not tally.first <= cluster < tally.first + tally.clusters:
                continue
            self.count_area(tally, Area(offset, self.geometry.cluster_size, f"refcount block {index}"), tell=tell)
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
        while run := tally.mismatch(at):
            cluster, clusters, stored, counted = run
            at = cluster + clusters
            exact = stored_count(self.tables, cluster) if stored == SATURATED else stored
            kind = "corruption" if stored < counted else "leak"
            noun = f"cluster {cluster}" if clusters == 1 else f"clusters {cluster} to {at - 1}"
            found = f"{counted} reference{'' if counted == 1 else 's'} found, the refcount is {exact}"
            what = "leaked, " if kind == "leak" else ""
            self.report.add(CheckFinding(kind, f"{noun}: {what}{found}", clusters, cluster, clusters))

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

        claimed = claims_of(self.tables, wanted)
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

    def corruption(self, message: str, cluster: int = -1) -> None:
        """Count and keep one corruption. May be called by any thread."""
        with self._lock:
            self.report.add(CheckFinding("corruption", message, cluster=cluster))

    def error(self, message: str, count: int = 1) -> None:
        """Count and keep something that could not be checked. May be called by any thread."""
        with self._lock:
            self.report.add(CheckFinding("error", message, count))


class _Scan:
    """One thread's work: read L2 tables and count what they refer to."""

    def __init__(self, run: _Run, tally: Tally, *, shared: bool) -> None:
        self.run = run
        self.tally = tally
        self.shared = shared
        self.failure: BaseException | None = None
        self.tables = run.tables
        self.geometry = run.geometry
        self.buffer = bytearray(self.geometry.cluster_size)

    def everything(self, jobs: Iterator[Job]) -> None:
        """Take tables until there are none. A failure stops this thread and is kept for the caller."""
        try:
            while (job := self.run.next_job(jobs)) is not None:
                self._table(*job)
        except BaseException as error:
            self.run.stopped = True
            if not self.shared:
                raise
            self.failure = error

    def _table(self, tree: L1Tree, index: int, word: int) -> None:
        rules = self.run.rules(active=tree.active)
        where = f"L1 entry {index} of {tree.owner}"
        offset = word & L1_OFFSET_MASK
        first = self.tally.first == 0
        self.run.count_area(self.tally, Area(offset, self.geometry.cluster_size, where), tell=first)
        if first:
            for fault in self._l1_faults(word, tree):
                self.run.corruption(f"{where} is {word:#018x}: {fault}")
        try:
            self.tables.storage.read_into(offset, self.buffer)
        except StorageError as error:
            if first:
                self.run.error(str(error))
            return
        if not offset:  # the header read as a table: nothing there can own a cluster alone
            rules = self.run.rules(active=False)
        self._entries(tree, index, rules)

    def _l1_faults(self, word: int, tree: L1Tree) -> Iterator[str]:
        offset = word & L1_OFFSET_MASK
        if reserved := word & L1_RESERVED_MASK:
            yield f"reserved bits {reserved:#x} are set"
        if not self.geometry.is_aligned(offset):
            yield f"the L2 table at {offset:#x} is not aligned to a cluster"
        if not tree.active or not offset:
            return
        count = stored_count(self.tables, offset >> self.geometry.cluster_bits)
        if count is not None and (count == 1) != bool(word & COPIED):
            yield f"the copied flag is {'set' if word & COPIED else 'clear'}, but the refcount of the table is {count}"

    def _entries(self, tree: L1Tree, index: int, rules: EntryRules) -> None:
        geometry = self.geometry
        odd, overflowed, allocated, compressed, fragmented = self.tally.scan(
            self.buffer, cluster_bits=geometry.cluster_bits, extended=geometry.extended_l2, data_file=rules.data_file,
            file_length=rules.file_length, active=rules.active, shared=self.shared)
        for entry, cluster in overflowed:
            self.run.overflows([cluster], self._place(tree, index, entry))
        for entry in odd:
            self._judge(tree, index, entry, rules)
        if tree.active and self.tally.first == 0:
            self.run.add_totals(allocated, compressed, fragmented)

    def _judge(self, tree: L1Tree, index: int, entry: int, rules: EntryRules) -> None:
        """Judge one entry by the plain rules and count it. It is told in the window where its span begins."""
        size = self.geometry.l2_entry_size
        raw = self.buffer[entry * size : (entry + 1) * size]
        word, bitmap = int.from_bytes(raw[:8], "big"), int.from_bytes(raw[8:], "big")
        verdict = judge_entry(word, bitmap, rules, lambda cluster: stored_count(self.tables, cluster))
        start, tally = start_cluster(word, rules), self.tally
        here = tally.first <= start < tally.first + tally.clusters
        place = self._place(tree, index, entry)
        if here or (start >= self.run.universe and tally.first == 0):
            for fault in verdict.faults:
                self.run.corruption(f"{place} is {raw.hex()}: {fault}", cluster=start)
        if verdict.span:
            offset, length = verdict.span
            last = (offset + length - 1) >> self.geometry.cluster_bits
            self.run.overflows(tally.add(start, last - start + 1), place)

    def _place(self, tree: L1Tree, index: int, entry: int) -> str:
        guest = (index << self.geometry.l2_bits | entry) << self.geometry.cluster_bits
        return f"the entry of guest offset {guest:#x} of {tree.owner}"
