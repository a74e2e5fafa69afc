"""A check reads what a file holds about once, however often its tables are named."""

from __future__ import annotations

import struct

import pytest

from cowslice.format.header import Header, encode_header
from cowslice.ops.check import CheckReport, check
from cowslice.storage.memory import MemoryStorage

BITS = 16
CLUSTER = 1 << BITS


class Counted(MemoryStorage):
    """Counts the bytes that are read."""

    read_bytes = 0

    def pread(self, offset: int, buffer: memoryview) -> int:
        self.read_bytes += len(buffer)
        return super().pread(offset, buffer)


def image(entries: int, tables: bytes, *, step: int = 0, snapshots: int = 0) -> Counted:
    """An L1 table of many entries, each `step` bytes behind the one before, and L2 tables from cluster 20 on."""
    size = entries << (BITS - 3 + BITS)
    fixed = struct.pack(">QIHHIIQIIQQ", 4 * CLUSTER, entries, 4, 0, 0, 0, 0, 0, 16, 0, size)
    records = b"".join(fixed + b"%04d" % n + bytes(4) for n in range(snapshots))
    header = Header(version=3, cluster_bits=BITS, size=size, l1_size=entries, l1_table_offset=4 * CLUSTER,
                    refcount_table_offset=CLUSTER, refcount_table_clusters=1, snapshot_count=snapshots,
                    snapshots_offset=10 * CLUSTER if snapshots else 0)
    content = bytearray(20 * CLUSTER)
    raw = encode_header(header)
    content[: len(raw)] = raw
    content[10 * CLUSTER : 10 * CLUSTER + len(records)] = records
    span = max(1, len(tables) - CLUSTER)
    l1 = struct.pack(f">{entries}Q", *(20 * CLUSTER + step * n % span for n in range(entries)))
    content[4 * CLUSTER : 4 * CLUSTER + len(l1)] = l1
    return Counted(bytes(content) + tables)


def checked(storage: Counted) -> CheckReport:
    report = check(storage)
    assert storage.read_bytes < 6 * storage.length()
    return report


@pytest.mark.parametrize("step", [0, 512])
def test_entries_that_name_the_same_bytes_as_tables_do_not_multiply_the_work(step: int) -> None:
    assert checked(image(20000, b"\x3f" * (4 * CLUSTER), step=step)).corruptions > 20000 * 8192


def test_snapshots_that_share_one_l1_table_do_not_multiply_the_work() -> None:
    one = checked(image(3000, b"\x3f" * CLUSTER, snapshots=1)).corruptions
    many = checked(image(3000, b"\x3f" * CLUSTER, snapshots=3000)).corruptions
    assert many > 1000 * one
