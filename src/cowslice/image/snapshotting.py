"""Internal snapshots of an image that is open for writing: taking one, going back to one, deleting one.

It does not know guest bytes. The order within each operation leaves at worst leaks after a crash, and COPIED flags
that were cleared too early, which only cost a copy (I3, I5, I6; docs/invariants.md).
"""

from __future__ import annotations

import os
import time
from array import array
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace

from cowslice.errors import BadOption, StorageError, UnsupportedImage
from cowslice.format.limits import MAX_SNAPSHOTS
from cowslice.format.snapshots import MIN_EXTRA_V3, Snapshot, encode_snapshot_extra, encode_snapshot_table
from cowslice.format.words import pack_words, unpack_words
from cowslice.image.punching import Cause
from cowslice.image.roots import Roots, alone, without_copied
from cowslice.image.snapshots import check_usable, find_snapshot, load_snapshot_l1, load_snapshots, read_l1
from cowslice.image.structures import Structure
from cowslice.image.writing import Writer

MAX_NAME = 255  # bytes; QEMU shows no more of one
_SECOND = 1_000_000_000


class Snapshotting:
    """Changes the snapshots of the image of `writer`. Each call waits until it is alone inside."""

    def __init__(self, writer: Writer) -> None:
        self.writer = writer
        self.layer = writer.layer
        self._uneven = False  # COPIED may be off where a count is 1, because something failed

    def create(self, name: str) -> Snapshot:
        """Keep the disk as it is now under a name; returns the record. It is stable then.

        Raises BadOption for a name that cannot be, UnsupportedImage for an image that cannot have one more,
        RefcountOverflow where the refcount width is too narrow, CorruptImage, NoSpace, StorageError; then all is as
        before.
        """
        self._check_supported()
        _check_name(name)
        with alone(self.writer, cause=Cause.SNAPSHOT) as roots, ExitStack() as undo:
            roots.commit()
            before = self._snapshots()
            if len(before) >= MAX_SNAPSHOTS:
                raise UnsupportedImage(f"'{self.layer.name}' has {len(before)} snapshots, expected at most "
                                       f"{MAX_SNAPSHOTS - 1} before another one", features=("many snapshots",))
            words = without_copied(roots.tables.l1) or [0]
            content = pack_words(words)
            l1_offset = roots.place(content, Structure.SNAPSHOT_L1)
            undo.callback(roots.forget, l1_offset, len(content))
            record = self._record(name, before, l1_offset, len(words))
            table = self._place_table(roots, (*before, record), undo)
            roots.commit()
            tree = roots.tree(words)
            roots.raise_tree(tree)
            undo.callback(roots.take_back, tree)
            self._uneven = True
            roots.clear_copied(tree)
            roots.commit()
            self._switch_table(roots, before, table, len(before) + 1, undo)
            self._uneven = False
        return record

    def delete(self, id_or_name: str) -> None:
        """Forget the snapshot of this name, or else of this id; what only it needs is free then.

        Raises BadOption where there is none such, MalformedImage, CorruptImage, NoSpace, StorageError; then it is still
        there, unless the image takes no more writes. What cannot be freed once it is gone is left to later commits, to
        closing, or to a repair of leaks.
        """
        self._check_supported()
        with alone(self.writer, cause=Cause.SNAPSHOT) as roots, ExitStack() as undo:
            roots.commit()
            before = self._snapshots()
            gone = _by_name(before, id_or_name)
            tree = roots.tree(self._words_of(gone))
            roots.check(tree)
            table = self._place_table(roots, [one for one in before if one is not gone], undo)
            roots.commit()
            self._uneven = True
            self._switch_table(roots, before, table, len(before) - 1, undo)
            with self._done():
                roots.lower_tree(tree)
                roots.forget(gone.l1_offset, gone.l1_size * 8)
                roots.commit()
                roots.set_copied(tree)
                self._uneven = False

    def apply(self, id_or_name: str) -> None:
        """Let the disk be again what the snapshot with this id, or else of this name, holds; its size too.

        Raises BadOption where there is none such, UnsupportedImage for a version 2 image whose size has changed,
        RefcountOverflow, MalformedImage, CorruptImage, NoSpace, StorageError; then the disk is as before.
        """
        self._check_supported()
        with alone(self.writer, cause=Cause.SNAPSHOT) as roots, ExitStack() as undo:
            roots.commit()
            header = self.layer.first.header
            snapshot = find_snapshot(self._snapshots(), id_or_name)
            size, l1 = load_snapshot_l1(self.layer.storage, header, snapshot)
            self._check_size(size)
            former, words = roots.on_file(), without_copied(unpack_words(l1))
            roots.check(former)
            content = pack_words(words or [0])
            at = roots.place(content, Structure.L1_TABLE)
            undo.callback(roots.forget, at, len(content))
            tree = roots.tree(words)
            roots.raise_tree(tree)
            undo.callback(roots.take_back, tree)
            roots.fence_tables(words)
            roots.clear_copied_below(tree)
            roots.commit()
            self.writer.resizing(size)
            if self.writer.track is not None:  # what will differ is not known, so all may
                self.writer.track(0, max(size, self.layer.size))
            roots.switch(undo, l1_table_offset=at, l1_size=len(content) // 8, size=size)
            roots.show(words, size)
            self.writer.resized(size)
            with self._done():
                roots.lower_tree(former)
                roots.forget(header.l1_table_offset, header.l1_size * 8)
                roots.commit()

    def complete(self) -> None:
        """Let each record say the size of its VM state and of its disk, as version 3 demands. It is stable then.

        Raises MalformedImage, NoSpace, StorageError; then the table is as before.
        """
        with alone(self.writer, cause=Cause.SNAPSHOT) as roots, ExitStack() as undo:
            before = self._snapshots()
            after = [_completed(one, self.layer.size) for one in before]
            if after == list(before):
                return
            roots.commit()
            table = self._place_table(roots, after, undo)
            roots.commit()
            self._switch_table(roots, before, table, len(after), undo)
            roots.settle()

    def finish(self) -> None:
        """Set COPIED where an operation that failed has left it off. Raises StorageError."""
        if self._uneven and self.writer.commits.fault is None:
            with alone(self.writer, cause=Cause.SNAPSHOT) as roots:
                roots.commit()
                roots.commit()
                roots.set_copied()
                self._uneven = False

    # -- the table --------------------------------------------------------------------------------------------------

    def _snapshots(self) -> tuple[Snapshot, ...]:
        return load_snapshots(self.layer.storage, self.layer.first.header)

    def _place_table(self, roots: Roots, snapshots: Sequence[Snapshot], undo: ExitStack) -> int:
        """Write a table of these to a new place; returns where, 0 for an empty one."""
        if not snapshots:
            return 0
        content = encode_snapshot_table(snapshots)
        offset = roots.place(content, Structure.SNAPSHOT_TABLE)
        undo.callback(roots.forget, offset, len(content))
        return offset

    def _switch_table(self, roots: Roots, before: Sequence[Snapshot], offset: int, count: int,
                      undo: ExitStack) -> None:
        """Let the header name another table; that of `before` is free then."""
        old = self.layer.first.header.snapshots_offset
        roots.switch(undo, snapshots_offset=offset, snapshot_count=count)
        with self._done():
            roots.forget(old, sum(one.encoded_length for one in before))

    @contextmanager
    def _done(self) -> Iterator[None]:
        """What follows a header that is switched, stably: it cannot fail the operation, only leave counts too high on
        disk and COPIED off, which costs space and copies. Raises where the image takes no more writes (I9)."""
        try:
            yield
        except StorageError:
            if self.writer.commits.fault is not None:
                raise

    def _words_of(self, snapshot: Snapshot) -> array[int]:
        """Its whole L1 table, with the VM state behind the end of the disk."""
        check_usable(snapshot, self.layer.first.header)
        return unpack_words(read_l1(self.layer.storage, snapshot.l1_offset, snapshot.l1_size, snapshot.l1_size))

    def _record(self, name: str, others: Sequence[Snapshot], l1_offset: int, l1_size: int) -> Snapshot:
        now = time.time_ns()
        _, extra = encode_snapshot_extra(vm_state_size=0, disk_size=self.layer.size)
        return Snapshot(l1_offset=l1_offset, l1_size=l1_size, id=_next_id(others), name=os.fsencode(name),
                        seconds=now // _SECOND, nanoseconds=now % _SECOND, extra=extra)

    # -- what cannot be ---------------------------------------------------------------------------------------------

    def _check_supported(self) -> None:
        if self.layer.first.header.has_data_file:
            raise UnsupportedImage(f"'{self.layer.name}' has an external data file, so it cannot have snapshots",
                                   features=("snapshot with external data file",))

    def _check_size(self, size: int) -> None:
        if self.layer.first.header.version < 3 and size != self.layer.size:
            raise UnsupportedImage(
                f"the disk had {size} bytes when the snapshot was taken and has {self.layer.size} now, and a version 2 "
                "image with snapshots cannot change its size", features=("resize with snapshots",))


def _completed(snapshot: Snapshot, size: int) -> Snapshot:
    """The record with the fields of version 3; where it does not say how large the disk was, it was `size`."""
    if len(snapshot.extra) >= MIN_EXTRA_V3:
        return snapshot
    _, extra = encode_snapshot_extra(vm_state_size=snapshot.vm_state_size, disk_size=size)
    return replace(snapshot, extra=extra)


def _check_name(name: str) -> None:
    length = len(os.fsencode(name))
    if not 0 < length <= MAX_NAME or "\0" in name:
        raise BadOption(f"the name of the snapshot has {length} bytes, expected 1 to {MAX_NAME} and no zero byte")


def _next_id(others: Sequence[Snapshot]) -> bytes:
    """One more than the highest id that is a number."""
    return b"%d" % (max((int(one.id) for one in others if one.id.isdigit() and len(one.id) < 20), default=0) + 1)


def _by_name(snapshots: Sequence[Snapshot], wanted: str) -> Snapshot:
    """The first of this name: who deletes "2" and has a snapshot of that name means it. Else find_snapshot."""
    raw = os.fsencode(wanted)
    return next((one for one in snapshots if one.name == raw), None) or find_snapshot(snapshots, wanted)
