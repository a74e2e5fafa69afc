"""What a qcow2 file refers to, apart from the clusters behind L2 entries: each area with its owner's name.

It counts nothing and judges nothing. Only the file itself is read; what it names is never opened.
"""

from __future__ import annotations

from cowslice.errors import StorageError
from cowslice.format.findings import Finding, escaped
from cowslice.format.first_cluster import (
    PREFIX_LENGTH,
    FirstCluster,
    decode_first_cluster,
    first_cluster_length,
)
from cowslice.format.limits import MAX_L1_ENTRIES, MAX_OFFSET
from cowslice.format.refcounts import REFTABLE_OFFSET_MASK, get_refcount
from cowslice.format.snapshots import FIXED_LENGTH, MIN_EXTRA_V3, Snapshot, unpack_snapshots
from cowslice.format.words import unpack_words
from cowslice.ops.tables import Area, L1Tree, Tables
from cowslice.storage.base import Storage
from cowslice.units import KiB

_SNAPSHOT_READ = 64 * KiB
REFTABLE_OWNER = "the refcount table"


def read_first_cluster(storage: Storage) -> FirstCluster:
    """Decode the first cluster of a qcow2 file. Raises ImageError or StorageError."""
    prefix = storage.read(0, min(PREFIX_LENGTH, storage.length()))
    length = first_cluster_length(prefix)
    whole = prefix if length <= len(prefix) else storage.read(0, min(length, storage.length()))
    return decode_first_cluster(whole)


def load_tables(storage: Storage) -> Tables:
    """Read header, L1 tables, snapshot table, refcount table and bitmaps. Raises ImageError for an unusable header.

    What is wrong further down is told in `faults` (corruptions, with how many) and `errors` (could not be read).
    """
    first = read_first_cluster(storage)
    header, geometry = first.header, first.header.geometry
    reftable = unpack_words(
        storage.read(header.refcount_table_offset, header.refcount_table_clusters << header.cluster_bits)
    )
    tables = Tables(storage, first, storage.length(), [], [], reftable, ())
    tables.areas.append(Area(0, geometry.cluster_size, "the header"))
    _take_tree(tables, "active", header.l1_table_offset, header.l1_size)
    _take_snapshots(tables)
    length = len(reftable) * 8
    tables.areas.append(Area(header.refcount_table_offset, length, REFTABLE_OWNER))
    if crypto := first.crypto:
        tables.areas.append(Area(crypto.offset, crypto.length, "the encryption header"))
    if pointer := first.bitmaps:
        from cowslice.ops.bitmaprefs import take_bitmaps

        take_bitmaps(tables, pointer)
    return tables


def stored_count(tables: Tables, cluster: int) -> int | None:
    """The refcount on disk of any host cluster, None where its refcount block cannot be read."""
    geometry = tables.geometry
    index, entry = divmod(cluster, geometry.refblock_entries)
    if index >= len(tables.reftable):
        return 0
    offset = tables.reftable[index] & REFTABLE_OFFSET_MASK
    if not offset:
        return 0
    if place_fault(tables, offset):
        return None
    try:  # eight entries are whole bytes at any width
        raw = tables.storage.read(offset + (entry >> 3 << geometry.refcount_order), 1 << geometry.refcount_order)
    except StorageError:
        return None
    return get_refcount(raw, entry & 7, geometry.refcount_order)


def place_fault(tables: Tables, offset: int) -> str:
    """Why a table cannot be read at this host offset, or ''. Behind the end of the file it can: as zeros."""
    if not tables.geometry.is_aligned(offset):
        return f"is at {offset:#x}, not aligned to a cluster"
    if offset + tables.geometry.cluster_size > MAX_OFFSET:
        return f"is at {offset:#x}, so that it ends beyond 2^63"
    return ""


def _take_tree(tables: Tables, owner: str, offset: int, entries: int) -> None:
    if not entries:
        return
    tables.areas.append(Area(offset, entries * 8, f"the L1 table of {owner}"))
    tables.trees.append(L1Tree(owner, owner == "active", offset, entries))


def _take_snapshots(tables: Tables) -> None:
    header = tables.header
    if not header.snapshot_count:
        return
    try:
        tables.snapshots, length = _read_snapshots(tables)
    except StorageError as error:
        tables.errors.append(str(error))
        return
    if len(tables.snapshots) < header.snapshot_count:
        tables.errors.append(f"only {len(tables.snapshots)} of {header.snapshot_count} snapshot records can be read")
    if header.has_data_file:
        tables.fault(f"there are {header.snapshot_count} snapshots, but guest data lies in an external file")
    for snapshot in tables.snapshots:
        _take_snapshot(tables, snapshot)
    tables.areas.append(Area(header.snapshots_offset, length, "the snapshot table"))


def _take_snapshot(tables: Tables, snapshot: Snapshot) -> None:
    """Follow the L1 table of a snapshot, unless its place or size is impossible."""
    owner = f"snapshot '{escaped(snapshot.name)}'"
    if tables.header.version >= 3 and len(snapshot.extra) < MIN_EXTRA_V3:
        tables.fault(f"{owner} has {len(snapshot.extra)} bytes of extra data, expected {MIN_EXTRA_V3} or more")
    if not tables.geometry.is_aligned(snapshot.l1_offset):
        tables.fault(f"{owner} has its L1 table at {snapshot.l1_offset:#x}, not aligned to a cluster")
    elif snapshot.l1_size > MAX_L1_ENTRIES:
        tables.fault(f"{owner} has {snapshot.l1_size} L1 entries, expected at most {MAX_L1_ENTRIES}")
    elif snapshot.l1_offset + snapshot.l1_size * 8 > MAX_OFFSET:
        tables.fault(f"{owner} has its L1 table at {snapshot.l1_offset:#x}, so that it ends beyond 2^63")
    else:
        _take_tree(tables, owner, snapshot.l1_offset, snapshot.l1_size)


def _read_snapshots(tables: Tables) -> tuple[list[Snapshot], int]:
    """The records that can be read, and the bytes they take without the padding of the last one."""
    header = tables.header
    found: list[Snapshot] = []
    findings: list[Finding] = []
    used, want = 0, _SNAPSHOT_READ
    while len(found) < header.snapshot_count and not findings:
        at = header.snapshots_offset + used
        data = tables.storage.read(at, max(0, min(want, tables.file_length - at)))
        records, length, findings = unpack_snapshots(data, header.snapshot_count - len(found), at=at)
        if not records and len(data) < want:
            break
        want = want if records else want * 2
        found.extend(records)
        used += length
    tables.errors.extend(finding.message for finding in findings)
    if found:
        last = found[-1]
        used += FIXED_LENGTH + len(last.extra) + len(last.id) + len(last.name) - last.encoded_length
    return found, used
