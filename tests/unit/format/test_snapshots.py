"""The snapshot table: fields, extra data old and new, and limits."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cowslice.errors import BadOption, MalformedImage
from cowslice.format.findings import Fault
from cowslice.format.geometry import Geometry
from cowslice.format.snapshots import (
    Snapshot,
    decode_snapshot_table,
    encode_snapshot,
    encode_snapshot_extra,
    encode_snapshot_table,
    snapshot_findings,
    unpack_snapshots,
)

ONE = Snapshot(l1_offset=0x50000, l1_size=2, id=b"1", name=b"first", extra=bytes(8) + (1 << 30).to_bytes(8, "big"))


def test_the_wide_size_of_the_vm_state_counts() -> None:
    narrow, extra = encode_snapshot_extra(vm_state_size=5 << 30, disk_size=1 << 30, icount=7)
    snapshot = replace(ONE, vm_state_size_32=narrow, extra=extra)
    assert (narrow, snapshot.vm_state_size, snapshot.disk_size, snapshot.icount) == (0, 5 << 30, 1 << 30, 7)


def test_a_small_vm_state_is_told_twice() -> None:
    narrow, extra = encode_snapshot_extra(vm_state_size=4096, disk_size=512)
    assert (narrow, extra[:8], replace(ONE, extra=extra).icount) == (4096, (4096).to_bytes(8, "big"), None)


@pytest.mark.parametrize("length, disk_size", [(0, None), (8, None), (15, None), (16, 0), (24, 0)])
def test_extra_data_that_is_too_short_for_a_field_does_not_record_it(length: int, disk_size: int | None) -> None:
    snapshot = replace(ONE, extra=bytes(length), vm_state_size_32=9)
    assert snapshot.disk_size == disk_size
    assert snapshot.vm_state_size == (9 if length < 8 else 0)


def test_records_start_at_multiples_of_eight() -> None:
    table = encode_snapshot_table([ONE, replace(ONE, name=b"x")])
    assert len(table) == 64 + 64
    assert table[64:72] == (0x50000).to_bytes(8, "big")


def test_a_table_that_is_cut_off_is_malformed() -> None:
    with pytest.raises(MalformedImage, match="snapshot 1 of 2"):
        decode_snapshot_table(encode_snapshot(ONE), 2)


def test_too_much_extra_data_is_malformed_and_says_where() -> None:
    raw = bytearray(encode_snapshot(ONE))
    raw[36:40] = (1025).to_bytes(4, "big")
    with pytest.raises(MalformedImage, match="1025"):
        decode_snapshot_table(bytes(raw), 1)
    assert unpack_snapshots(bytes(raw), 1, at=0x1000)[2][0].offset == 0x1000 + 36


UNUSABLE = [
    {"l1_offset": 0x50001},
    {"l1_size": 1 << 23},
    {"l1_offset": 0xFFFF_FFFF_FFFF_0000},
    {"l1_size": 1},
]


@pytest.mark.parametrize("change", UNUSABLE)
def test_a_bad_l1_table_spoils_only_its_snapshot(change: dict[str, int]) -> None:
    snapshot = replace(ONE, **change)
    assert decode_snapshot_table(encode_snapshot(snapshot), 1) == (snapshot,)
    assert {finding.fault for finding in snapshot_findings(snapshot, Geometry(16))} == {Fault.UNUSABLE}


def test_a_sound_snapshot_has_no_findings() -> None:
    assert list(snapshot_findings(ONE, Geometry(16))) == []


@pytest.mark.parametrize("version, faults", [(2, []), (3, [Fault.NOTE])])
def test_version_3_wants_extra_data(version: int, faults: list[Fault]) -> None:
    found = snapshot_findings(replace(ONE, extra=b""), Geometry(16), version=version)
    assert [finding.fault for finding in found] == faults


@pytest.mark.parametrize("change", [{"id": bytes(65536)}, {"extra": bytes(1025)}, {"l1_offset": 1 << 64}])
def test_what_no_record_can_say_is_not_encoded(change: dict[str, object]) -> None:
    with pytest.raises(BadOption):
        encode_snapshot(replace(ONE, **change))  # type: ignore[arg-type]


def test_a_table_that_no_reader_accepts_is_not_encoded() -> None:
    big = replace(ONE, name=bytes(65535))
    with pytest.raises(BadOption):
        encode_snapshot_table(big for _ in range(1024))
    assert len(unpack_snapshots(encode_snapshot(big) * 1024, 1024)[2]) == 1
