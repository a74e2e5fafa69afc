"""Making guest bytes read as zeros, or forgetting them, without writing them where the format can say so.

It does not know how bytes are written: what the format cannot say (less than a subcluster, version 2) goes to the
writer as zeros. Freed host clusters become drops of the next commit (I3).
"""

from __future__ import annotations

from collections.abc import Callable

from cowslice.format.entries import ALL_SUBCLUSTERS, L1_OFFSET_MASK, Entry, Kind
from cowslice.format.header import Autoclear
from cowslice.image.mapping import resolve
from cowslice.image.plan import Blank
from cowslice.image.punching import Cause
from cowslice.image.writing import Writer
from cowslice.units import MiB, round_up

CLUSTERS_AT_ONCE = 1024  # under one hold of the lock
_ZEROS = memoryview(bytes(MiB))

Change = Callable[[int, Entry, int], Blank | None]


class Zeroing:
    """Zeroes and discards spans of the disk that `writer` writes to.

    `keep_reference`: clusters that are discarded stay with their guest cluster, so that the file does not fragment
    (discard-no-unref).
    """

    def __init__(self, writer: Writer, *, keep_reference: bool) -> None:
        self.writer = writer
        self.tables = writer.tables
        self.planner = writer.planner
        self._keep_reference = keep_reference
        first = writer.layer.first
        self._geometry = first.header.geometry
        self._bits = self._geometry.cluster_bits
        self._size = self._geometry.cluster_size
        self._raw_data = bool(first.header.autoclear & Autoclear.RAW_EXTERNAL)
        self._old = first.header.version < 3

    def zero(self, offset: int, length: int, *, keep: bool = False) -> None:
        """Make the span read as zeros. `keep` holds on to host clusters, so that later writes need no allocation."""
        if not length:
            return
        self._track(offset, length)
        end = offset + length
        unit = self._size if self._old else self._geometry.subcluster_size
        first, last = round_up(offset, unit), end // unit * unit
        if end == self.writer.layer.size:
            last = round_up(end, unit)
        if first >= last or (self._old and self.writer.covered(first >> self._bits)):
            self._write_zeros(offset, end)
            return
        self._write_zeros(offset, first)
        self._blank(first, last, keep=keep)
        self._write_zeros(last, end)

    def discard(self, offset: int, length: int) -> None:
        """Forget the whole clusters of the span: they read as zeros then, and their host clusters become free.

        Parts of clusters stay as they are, and so does a version 2 image over a backing file: it cannot say it.
        """
        end = offset + length
        first, last = round_up(offset, self._size), end // self._size * self._size
        if end == self.writer.layer.size:
            last = round_up(end, self._size)
        if first >= last or (self._old and self.writer.covered(first >> self._bits)):
            return
        self._track(first, min(last, self.writer.layer.size) - first)
        self._blank(first, last, keep=self._keep_reference, give_back=self.tables.punching.request)

    def _track(self, offset: int, length: int) -> None:
        """All that was asked counts as changed, also what reads as zeros already: so QEMU does it."""
        if self.writer.track is not None:
            self.writer.track(offset, length)

    def _blank(self, offset: int, end: int, *, keep: bool, give_back: bool = False) -> None:
        """Let the entries say zeros for whole (sub)clusters."""
        writer = self.writer
        writer.commits.check()
        if self._raw_data:
            data = writer.layer.data
            blank = data.punch if give_back and not keep else data.zero
            blank(offset, min(end, writer.layer.size) - offset)
            if writer.layer.cipher is None:
                return  # zeros that are deciphered are none: then the entries must say so
        while offset < end:
            first = offset >> self._bits
            stop = min(end, (first + CLUSTERS_AT_ONCE) << self._bits, self._table_end(first))
            self._blank_some(offset, stop, keep=keep)
            offset = stop
            writer.relieve()

    def _table_end(self, cluster: int) -> int:
        return ((cluster >> self._geometry.l2_bits) + 1) << self._geometry.l2_bits + self._bits

    def _blank_some(self, offset: int, end: int, *, keep: bool) -> None:
        """Entries of one L2 table. A compressed cluster of which only a part is meant is written instead."""
        first, last = offset >> self._bits, (end - 1 >> self._bits) + 1
        with self.writer.claims.on(first, last), self.tables.lock:
            if not self._mapped(first) and not self.writer.covered(first):
                return
            changes, written = self._changes(first, last, offset, end, keep=keep)
            if changes:
                self.writer.own_table(first)
                self._apply(first, changes)
        for start, stop in written:
            self._write_zeros(start, stop)

    def _mapped(self, cluster: int) -> bool:
        return bool(self.tables.l1[cluster >> self._geometry.l2_bits] & L1_OFFSET_MASK)

    def _changes(self, first: int, last: int, offset: int, end: int, *, keep: bool
                 ) -> tuple[list[tuple[int, Blank]], list[tuple[int, int]]]:
        changes, written = [], []
        for cluster, (word, bitmap) in enumerate(self.writer.entries(first, last - first), first):
            start = cluster << self._bits
            begin, stop = max(offset - start, 0), min(end - start, self._size)
            entry = self.writer.layer.checked(self.planner.decode(word, bitmap), cluster)
            mask = self.planner.mask(begin, stop) if self._geometry.extended_l2 else 1
            if entry.kind is Kind.COMPRESSED and self._geometry.extended_l2 and mask != ALL_SUBCLUSTERS:
                written.append((start + begin, start + stop))
                continue
            blank = self._blanked(entry, mask, cluster, keep=keep)
            if blank is None:
                continue
            if blank.dropped is not None:
                self.writer.check_fence(*blank.dropped)
            changes.append((cluster, blank))
        return changes, written

    def _blanked(self, entry: Entry, mask: int, cluster: int, *, keep: bool) -> Blank | None:
        if self._old:
            return self.planner.vacated(entry)
        return self.planner.blank(entry, mask, covered=self.writer.covered(cluster), keep=keep)

    def _apply(self, first: int, changes: list[tuple[int, Blank]]) -> None:
        """Store runs of neighbours together, and drop what they owned."""
        run: list[Blank] = []
        for index, (cluster, blank) in enumerate(changes):
            run.append(blank)
            if index + 1 == len(changes) or changes[index + 1][0] != cluster + 1:
                words = [(one.word, one.bitmap) for one in run]
                self.tables.slices.store(cluster + 1 - len(run), self.writer.packed(words))
                for host, length in (one.dropped for one in run if one.dropped is not None):  # only now: I3
                    self.tables.drop(host, count=length >> self._bits, cause=Cause.REQUEST)
                run = []

    def _write_zeros(self, offset: int, end: int) -> None:
        """Write zeros where the span does not read as zeros already."""
        end = min(end, self.writer.layer.size)
        while offset < end:
            _, piece = resolve(self.writer.layers, offset, min(end - offset, len(_ZEROS)))
            if piece.kind in (Kind.NORMAL, Kind.COMPRESSED) and not piece.hole:
                self.writer.write(offset, _ZEROS[: piece.length])
            offset += piece.length
