"""Headers that are right, for tests that break them one field at a time."""

from __future__ import annotations

from dataclasses import replace

from cowslice.format.header import Header

GOOD = Header(
    size=1 << 30,
    l1_size=2,
    l1_table_offset=0x30000,
    refcount_table_offset=0x10000,
    refcount_table_clusters=1,
)
GOOD_V2 = replace(GOOD, version=2, header_length=72, tail=b"")
