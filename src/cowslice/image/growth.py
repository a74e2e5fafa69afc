"""Another size for a disk that is open for writing: its L1 table, what is behind the new end, and the file's length.

It does not know who asks. The order leaves at worst leaks after a crash (docs/invariants.md): a larger disk is shown
when all of it reads as zeros stably; a smaller one when nothing behind its end is referred to any more.
"""

from __future__ import annotations

from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING

from cowslice.errors import BadOption, CowsliceError, RequestError, UnsupportedImage
from cowslice.format.entries import ALL_SUBCLUSTERS, COPIED, ZERO
from cowslice.format.header import CryptMethod
from cowslice.format.limits import MAX_L1_ENTRIES
from cowslice.format.words import pack_words
from cowslice.image.filling import provide_space
from cowslice.image.punching import Cause
from cowslice.image.roots import Roots, alone
from cowslice.image.structures import Structure
from cowslice.image.writing import Writer
from cowslice.image.zeroing import Zeroing
from cowslice.units import SECTOR, round_up

if TYPE_CHECKING:
    from cowslice.image.qcow2 import Qcow2Layer

PREALLOCATIONS = ("off", "metadata", "falloc", "full")
_CLUSTERS_AT_ONCE = 1024  # that are preallocated together


def check_resize(before: int, size: int, *, shrink: bool, preallocation: str) -> None:
    """Raise BadOption or RequestError for a size that cannot be, or that was not meant."""
    if size < 0 or size % SECTOR or size >= 1 << 63:
        raise BadOption(f"size is {size}, expected a multiple of {SECTOR} bytes")
    if preallocation not in PREALLOCATIONS:
        raise BadOption(f"preallocation is '{preallocation}', expected one of {', '.join(PREALLOCATIONS)}")
    if size < before and not shrink:
        raise RequestError(f"the disk has {before} bytes, and {size} are fewer: what lies behind them would be lost",
                           hint="shrink=True permits it.")
    if size < before and preallocation != "off":
        raise BadOption(f"preallocation is '{preallocation}', expected off: the disk does not grow")


class Growth:
    """Changes the size of the image of `writer`. Each call waits until it is alone inside."""

    def __init__(self, writer: Writer, zeroing: Zeroing) -> None:
        self.writer = writer
        self.zeroing = zeroing
        self.tables = writer.tables
        self.layer: Qcow2Layer = writer.layer
        self._geometry = self.layer.geometry

    def resize(self, size: int, *, shrink: bool, preallocation: str) -> None:
        """Give the disk `size` bytes; what is added reads as zeros. It is stable then.

        Raises BadOption, RequestError, UnsupportedImage, CorruptImage, NoSpace, StorageError; then the size is as
        before.
        """
        with alone(self.writer, cause=Cause.SHRINKING) as roots:
            check_resize(self.layer.size, size, shrink=shrink, preallocation=preallocation)
            self._check_supported(size, preallocation)
            roots.commit()
            self.writer.resizing(size)
            try:
                if size > self.layer.size:
                    self._grow(roots, size, preallocation)
                elif size < self.layer.size:
                    self._shrink(roots, size)
            except BaseException:
                self.writer.resized(self.layer.size)
                raise

    def _check_supported(self, size: int, preallocation: str) -> None:
        header = self.layer.first.header
        if header.version < 3 and header.snapshot_count and size != self.layer.size:
            raise UnsupportedImage(f"'{self.layer.name}' is of version 2 and has snapshots, so its size cannot change",
                                   features=("resize with snapshots",))
        if self._geometry.l1_entries(size) > MAX_L1_ENTRIES:
            most = MAX_L1_ENTRIES * self._geometry.l2_span
            raise BadOption(f"size is {size}, expected at most {most} with clusters of {self._geometry.cluster_size} "
                            "bytes")
        if preallocation != "off" and header.version < 3 and header.crypt_method != CryptMethod.NONE:
            raise UnsupportedImage("an encrypted image of version 2 cannot have clusters that read as zeros",
                                   features=("preallocation with encryption",))

    # -- larger -----------------------------------------------------------------------------------------------------

    def _grow(self, roots: Roots, size: int, preallocation: str) -> None:
        before, header = self.layer.size, self.layer.first.header
        needed = self._geometry.l1_entries(size)
        words = self.tables.l1
        if needed > header.l1_size or any(roots.on_file()[len(words) :]):
            self._move_l1(roots, needed)
        roots.show([*self.tables.l1, *[0] * (needed - len(self.tables.l1))], size)
        try:
            self._fill(before, size, preallocation)
            roots.commit()
            roots.switch(size=size)
        except BaseException:
            with suppress(CowsliceError):
                self._cut(roots, before)
            self.layer.size = before  # also where nothing can be undone: what is behind it reads as zeros
            raise
        self.writer.resized(size)

    def _move_l1(self, roots: Roots, needed: int) -> None:
        """Continue with a longer L1 table, without VM state that would become part of the disk."""
        header = self.layer.first.header
        state = roots.tree(roots.on_file()[len(self.tables.l1) :])
        roots.check(state)
        words = [*self.tables.l1, *[0] * (needed - len(self.tables.l1))]
        content = pack_words(words)
        with ExitStack() as undo:
            at = roots.place(content, Structure.L1_TABLE)
            undo.callback(roots.forget, at, len(content))
            roots.commit()
            roots.switch(undo, l1_table_offset=at, l1_size=len(words))
        roots.show(words, self.layer.size)
        roots.lower_tree(state)
        roots.forget(header.l1_table_offset, header.l1_size * 8)

    def _fill(self, before: int, size: int, preallocation: str) -> None:
        """Let the new part read as zeros, whatever lies below or behind the former end, and have its space."""
        layer = self.layer
        below = self.writer.layers[1].size if len(self.writer.layers) > 1 else 0
        end = max(min(round_up(before, self._geometry.cluster_size), size), min(below, size))
        if self.writer.planner.data_file:
            end = max(end, min(size, layer.data.length()))
        if end > before:
            self.zeroing.zero(before, end - before)
        if self.writer.planner.data_file and layer.data.length() < size:
            layer.data.truncate(size)
        if preallocation != "off":
            first, last = self._geometry.clusters(before), self._geometry.clusters(size)
            while first < last:
                stop = min(last, first + _CLUSTERS_AT_ONCE, round_up(first + 1, self._geometry.l2_entries))
                self._preallocate(first, stop, preallocation)
                self.writer.relieve()
                first = stop

    def _preallocate(self, first: int, end: int, mode: str) -> None:
        """Give host clusters to guest clusters of one L2 table that have none."""
        bare = [cluster for cluster, words in enumerate(self.writer.entries(first, end - first), first)
                if words == (0, 0)]
        while bare:
            run = next((n for n, cluster in enumerate(bare) if cluster != bare[0] + n), len(bare))
            bare = bare[self._provide(bare[0], run, mode) :]

    def _provide(self, first: int, count: int, mode: str) -> int:
        """The same for neighbours, as far as the host has room in a row; returns how many."""
        bits = self._geometry.cluster_bits
        self.writer.own_table(first)
        if self.writer.planner.data_file:
            host = first << bits
            provide_space(self.layer.data, mode, host, min(count << bits, self.layer.size - host))
            words = self._blanks(host, count)
        else:
            start, count = self.tables.allocator.take(count)
            host = start << bits
            try:
                self.layer.storage.zero(host, count << bits)
                provide_space(self.layer.storage, mode, host, count << bits)
                words = self._blanks(host, count)  # here: it takes a while, in which Ctrl-C may come
            except BaseException:
                self.tables.allocator.give_back(start, count)
                raise
        self.tables.slices.store(first, words)
        return count

    def _blanks(self, host: int, count: int) -> bytes:
        """The entries of so many clusters in a row, as the map stores them."""
        return self.writer.packed([self._blank(host + (n << self._geometry.cluster_bits)) for n in range(count)])

    def _blank(self, host: int) -> tuple[int, int]:
        """The entry of a cluster whose host bytes are zeros: of an encrypted image they are not what is read."""
        encrypted = self.layer.first.header.crypt_method != CryptMethod.NONE
        if self._geometry.extended_l2:
            return host | COPIED, ALL_SUBCLUSTERS << 32 if encrypted else ALL_SUBCLUSTERS
        return host | COPIED | (ZERO if encrypted else 0), 0

    # -- smaller ----------------------------------------------------------------------------------------------------

    def _shrink(self, roots: Roots, size: int) -> None:
        before = self.layer.size
        end = min(round_up(size, self._geometry.cluster_size), before)
        if end > size:
            self.zeroing.zero(size, end - size)  # so that it is zeros when the disk grows again, under QEMU too
        self._cut(roots, size)
        if self.writer.planner.data_file:
            self.layer.data.truncate(size)

    def _cut(self, roots: Roots, size: int) -> None:
        """Refer to nothing behind `size`, then end the disk there, then give the space back."""
        header, geometry = self.layer.first.header, self._geometry
        needed = geometry.l1_entries(size)
        self._vacate(geometry.clusters(size), min(needed * geometry.l2_entries, geometry.clusters(self.layer.size)))
        roots.commit()
        tail = roots.on_file()[needed:]
        tree = roots.tree(tail)
        roots.check(tree)
        try:
            if any(tail):
                roots.storage.pwrite(header.l1_table_offset + 8 * needed, bytes(8 * len(tail)))
                roots.sync()
            roots.switch(size=size)
        except BaseException:
            self.tables.changed_l1.update(range(needed, len(self.tables.l1)))
            raise
        roots.show(self.tables.l1[:needed], size)
        self.writer.resized(size)
        roots.lower_tree(tree)
        roots.commit()
        self._give_tail_back(roots)

    def _vacate(self, first: int, end: int) -> None:
        """Let clusters of one L2 table refer to nothing."""
        if first >= end or not self.tables.l1[first >> self._geometry.l2_bits]:
            return
        words = self.writer.entries(first, end - first)
        if not any(word or bitmap for word, bitmap in words):
            return
        spans = [self.writer.planner.span_of(self.writer.planner.decode(word, bitmap)) for word, bitmap in words]
        self.writer.own_table(first)
        self.tables.slices.store(first, self.writer.packed([(0, 0)] * len(words)))
        for span in spans:
            if span is not None:
                self.tables.drop(span[0], count=span[1] >> self._geometry.cluster_bits, cause=Cause.SHRINKING)

    def _give_tail_back(self, roots: Roots) -> None:
        """Counts that only count themselves, and what is free at the end of the file, go."""
        runs = self.tables.allocator.drop_empty_blocks()
        roots.commit()
        self.tables.allocator.free(runs)
        self.writer.commits.release()
        self.tables.allocator.truncate_to_used()
