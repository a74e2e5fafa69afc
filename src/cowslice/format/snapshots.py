"""The snapshot table: variable records one behind another, each starting at a multiple of 8 bytes (spec: "Snapshots").

It does not know how a snapshot is taken or read. Extra data is kept as it stands, so that records with fields of the
future encode to the same bytes; padding is written as zeros.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from cowslice.errors import BadOption
from cowslice.format.findings import Fault, Finding, escaped, raise_first
from cowslice.format.geometry import Geometry
from cowslice.format.limits import (
    MAX_L1_ENTRIES,
    MAX_OFFSET,
    MAX_SNAPSHOT_EXTRA,
    MAX_SNAPSHOT_TABLE_BYTES,
    MAX_SNAPSHOT_TEXT,
)
from cowslice.units import round_up

WHERE = "snapshot table"
FIXED_LENGTH = 40
_FIXED = struct.Struct(">QIHHIIQII")
_EXTRA = struct.Struct(">QQQ")
_NO_ICOUNT = (1 << 64) - 1
# A version 3 record carries at least the 64-bit VM state size and the disk size (spec).
MIN_EXTRA_V3 = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """One record. Offsets and sizes are bytes, `l1_size` counts entries; `id`, `name` and `extra` are as on disk."""

    l1_offset: int
    l1_size: int
    id: bytes
    name: bytes
    seconds: int = 0
    nanoseconds: int = 0
    vm_clock_ns: int = 0
    vm_state_size_32: int = 0
    extra: bytes = b""

    @property
    def vm_state_size(self) -> int:
        """Bytes of VM state; the 64-bit field counts where it is present."""
        return int.from_bytes(self.extra[:8], "big") if len(self.extra) >= 8 else self.vm_state_size_32

    @property
    def disk_size(self) -> int | None:
        """Guest bytes when the snapshot was taken, None when not recorded: then the current size holds."""
        return int.from_bytes(self.extra[8:16], "big") if len(self.extra) >= 16 else None

    @property
    def icount(self) -> int | None:
        """Guest instructions run, None when not recorded."""
        count = int.from_bytes(self.extra[16:24], "big") if len(self.extra) >= 24 else _NO_ICOUNT
        return None if count == _NO_ICOUNT else count

    @property
    def encoded_length(self) -> int:
        """Bytes it takes in the table, padding included."""
        return round_up(FIXED_LENGTH + len(self.extra) + len(self.id) + len(self.name), 8)


def encode_snapshot_extra(*, vm_state_size: int, disk_size: int, icount: int | None = None) -> tuple[int, bytes]:
    """The (vm_state_size_32, extra) of a new record; the narrow field is 0 when the size does not fit it."""
    narrow = vm_state_size if vm_state_size < 1 << 32 else 0
    return narrow, _EXTRA.pack(vm_state_size, disk_size, _NO_ICOUNT if icount is None else icount)


def decode_snapshot_table(data: bytes, count: int, *, at: int = 0) -> tuple[Snapshot, ...]:
    """Decode `count` records; `data` starts with the first, `at` is its host offset for messages.

    Raises MalformedImage when a record does not fit, has too much extra data, or the table is too long.
    """
    snapshots, _, findings = unpack_snapshots(data, count, at=at)
    raise_first(findings)
    if len(snapshots) < count:
        raise_first([_bad(f"snapshot {len(snapshots)} of {count} is cut off by the end of the table", "", at)])
    return snapshots


def unpack_snapshots(data: bytes, count: int, *, at: int = 0) -> tuple[tuple[Snapshot, ...], int, list[Finding]]:
    """Decode the whole records at the start of `data`, up to `count`: (records, bytes used, findings). Never raises.

    Fewer records without a finding mean that `data` ends too soon: read more and call again from the first record.
    """
    found: list[Snapshot] = []
    findings: list[Finding] = []
    offset = 0
    while len(found) < count and offset + FIXED_LENGTH <= len(data):
        extra = int.from_bytes(data[offset + 36 : offset + 40], "big")
        if extra > MAX_SNAPSHOT_EXTRA:
            message = f"snapshot {len(found)} has {extra} bytes of extra data, expected at most {MAX_SNAPSHOT_EXTRA}"
            findings.append(_bad(message, "extra_data_size", at + offset + 36))
            break
        snapshot = _unpack_snapshot(data, offset)
        if snapshot is None:
            break
        if offset + snapshot.encoded_length > MAX_SNAPSHOT_TABLE_BYTES:
            message = f"the snapshot table is longer than {MAX_SNAPSHOT_TABLE_BYTES} bytes"
            findings.append(_bad(message, "", at + offset))
            break
        found.append(snapshot)
        offset += snapshot.encoded_length
    return tuple(found), min(offset, len(data)), findings


def snapshot_findings(snapshot: Snapshot, geometry: Geometry, *, version: int = 3) -> Iterator[Finding]:
    """What keeps this snapshot, and only this one, from being used; and what is merely worth saying."""
    name = escaped(snapshot.name)
    if not geometry.is_aligned(snapshot.l1_offset):
        yield _unusable(name, "l1_table_offset", f"{snapshot.l1_offset:#x}, no multiple of the cluster size")
    if snapshot.l1_size > MAX_L1_ENTRIES:
        yield _unusable(name, "l1_size", f"{snapshot.l1_size}, expected at most {MAX_L1_ENTRIES}")
    if snapshot.l1_offset + snapshot.l1_size * 8 > MAX_OFFSET:
        yield _unusable(name, "l1_table_offset", f"{snapshot.l1_offset:#x}, so that the table ends beyond 2^63")
    if snapshot.disk_size is not None and geometry.l1_entries(snapshot.disk_size) > snapshot.l1_size:
        yield _unusable(name, "l1_size", f"{snapshot.l1_size}, too few for a disk of {snapshot.disk_size} bytes")
    if version >= 3 and len(snapshot.extra) < MIN_EXTRA_V3:
        message = f"snapshot '{name}' has {len(snapshot.extra)} bytes of extra data, expected {MIN_EXTRA_V3} or more"
        yield Finding(Fault.NOTE, message, WHERE, "extra_data_size")


def encode_snapshot(snapshot: Snapshot) -> bytes:
    """The record and its padding. Raises BadOption when a field does not fit its place."""
    if len(snapshot.id) > MAX_SNAPSHOT_TEXT or len(snapshot.name) > MAX_SNAPSHOT_TEXT:
        raise BadOption(f"snapshot id or name has more than {MAX_SNAPSHOT_TEXT} bytes")
    if len(snapshot.extra) > MAX_SNAPSHOT_EXTRA:
        raise BadOption(f"snapshot extra data has {len(snapshot.extra)} bytes, expected at most {MAX_SNAPSHOT_EXTRA}")
    try:
        fixed = _FIXED.pack(
            snapshot.l1_offset, snapshot.l1_size, len(snapshot.id), len(snapshot.name), snapshot.seconds,
            snapshot.nanoseconds, snapshot.vm_clock_ns, snapshot.vm_state_size_32, len(snapshot.extra),
        )  # fmt: skip
    except struct.error as error:
        raise BadOption(f"a snapshot field does not fit its width: {error}") from None
    return (fixed + snapshot.extra + snapshot.id + snapshot.name).ljust(snapshot.encoded_length, b"\0")


def encode_snapshot_table(snapshots: Iterable[Snapshot]) -> bytes:
    """The whole table. Raises BadOption when it is longer than a reader accepts."""
    table = b"".join(encode_snapshot(snapshot) for snapshot in snapshots)
    if len(table) > MAX_SNAPSHOT_TABLE_BYTES:
        raise BadOption(f"the snapshot table has {len(table)} bytes, expected at most {MAX_SNAPSHOT_TABLE_BYTES}")
    return table


def _unpack_snapshot(data: bytes, offset: int) -> Snapshot | None:
    (l1_offset, l1_size, id_length, name_length, seconds, nanoseconds, clock, state, extra_length) = _FIXED.unpack(
        data[offset : offset + FIXED_LENGTH]
    )
    extra_end = offset + FIXED_LENGTH + extra_length
    id_end = extra_end + id_length
    if id_end + name_length > len(data):
        return None
    return Snapshot(
        l1_offset=l1_offset,
        l1_size=l1_size,
        id=bytes(data[extra_end:id_end]),
        name=bytes(data[id_end : id_end + name_length]),
        seconds=seconds,
        nanoseconds=nanoseconds,
        vm_clock_ns=clock,
        vm_state_size_32=state,
        extra=bytes(data[extra_end - extra_length : extra_end]),
    )


def _bad(message: str, field: str, offset: int) -> Finding:
    return Finding(Fault.MALFORMED, message, WHERE, field, offset)


def _unusable(name: str, field: str, what: str) -> Finding:
    return Finding(Fault.UNUSABLE, f"snapshot '{name}' is unusable: {field} is {what}", WHERE, field)
