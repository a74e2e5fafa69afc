"""Internal snapshots: listing them, finding one, and the L1 table that shows the disk as it was.

It does not know how entries are read. A damaged snapshot fails only who asks for it.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from cowslice.errors import BadOption, CorruptImage, MalformedImage, UnsupportedImage
from cowslice.format.findings import Fault, escaped
from cowslice.format.header import Header
from cowslice.format.limits import MAX_SNAPSHOT_TABLE_BYTES
from cowslice.format.snapshots import Snapshot, decode_snapshot_table, snapshot_findings, unpack_snapshots
from cowslice.storage.base import Storage
from cowslice.units import KiB

_FIRST_READ = 64 * KiB  # holds some 600 ordinary records; a larger table is read in doubling steps


def load_snapshots(storage: Storage, header: Header) -> tuple[Snapshot, ...]:
    """Read the snapshot table, in the order of the file. Raises MalformedImage, UnsupportedImage or StorageError."""
    if not header.snapshot_count:
        return ()
    at = header.snapshots_offset
    left = max(storage.length() - at, 0)
    length = _FIRST_READ
    while length < min(left, MAX_SNAPSHOT_TABLE_BYTES):
        found, _, findings = unpack_snapshots(storage.read(at, length), header.snapshot_count, at=at)
        if len(found) == header.snapshot_count or findings:
            return _decoded(storage.read(at, length), header)
        length *= 2
    return _decoded(storage.read(at, min(left, MAX_SNAPSHOT_TABLE_BYTES)), header)


def find_snapshot(snapshots: Sequence[Snapshot], wanted: str) -> Snapshot:
    """Return the snapshot with this id, or else the first with this name. Raises BadOption that lists what there is."""
    raw = os.fsencode(wanted)
    for snapshot in snapshots:
        if snapshot.id == raw:
            return snapshot
    for snapshot in snapshots:
        if snapshot.name == raw:
            return snapshot
    if not snapshots:
        raise BadOption(f"snapshot is '{escaped(raw)}', but the image has no snapshots")
    names = ", ".join(f"{escaped(one.id)} '{escaped(one.name)}'" for one in snapshots[:20])
    raise BadOption(f"snapshot is '{escaped(raw)}', expected the id or name of one of: {names}")


def load_snapshot_l1(storage: Storage, header: Header, snapshot: Snapshot) -> tuple[int, bytes]:
    """Return (guest bytes of the disk then, its L1 table). Raises MalformedImage when the record cannot be used.

    The size is the recorded one; where none is recorded the disk had the size it has now.
    """
    if header.has_data_file:
        raise UnsupportedImage("internal snapshots of an image with an external data file cannot be read: their data "
                               "is not kept", features=("snapshot with external data file",))
    check_usable(snapshot, header)
    size = header.size if snapshot.disk_size is None else snapshot.disk_size
    return size, read_l1(storage, snapshot.l1_offset, header.geometry.l1_entries(size), snapshot.l1_size)


def check_usable(snapshot: Snapshot, header: Header) -> None:
    """Raise MalformedImage when the record cannot be used."""
    for finding in snapshot_findings(snapshot, header.geometry, version=header.version):
        if finding.fault is Fault.UNUSABLE:
            raise MalformedImage(finding.message, where=finding.where, field=finding.field)


def read_l1(storage: Storage, offset: int, needed: int, available: int) -> bytes:
    """Return the first `needed` entries of an L1 table of `available`, as they stand in the file.

    Raises CorruptImage when the file ends before them: a map that is cut off would read as an empty disk.
    """
    if needed > available:
        raise MalformedImage(f"the L1 table has {available} entries, but the disk needs {needed}", where="L1 table",
                             field="l1_size")
    length = storage.length()
    if offset + needed * 8 > length:
        raise CorruptImage(f"the L1 table at {offset:#x} with {needed} entries ends beyond the end of the file at "
                           f"{length:#x}", structure="L1 table", offset=offset)
    return storage.read(offset, needed * 8)


def _decoded(table: bytes, header: Header) -> tuple[Snapshot, ...]:
    return decode_snapshot_table(table, header.snapshot_count, at=header.snapshots_offset)
