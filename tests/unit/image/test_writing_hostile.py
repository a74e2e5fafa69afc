"""Images made to be written to at their own cost: refused when opened, or marked corrupt before a byte is harmed."""

from __future__ import annotations

import functools
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

import cowslice
from cowslice.errors import CowsliceError, ImageError
from cowslice.format.entries import COMPRESSED, COPIED
from cowslice.storage import MemoryStorage
from cowslice.testing import peers

pytestmark = peers.needs("qemu-img", "qemu-io")
CLUSTER = 65536
CORRUPT_BYTE, CORRUPT = 79, 2


@functools.cache
def image() -> bytes:
    """A cluster of data, a snapshot that shares it, and another one written since."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "disk.qcow2")
        peers.qemu_img("create", "-q", "-f", "qcow2", path, "16M")
        peers.qemu_io(path, "write -P 1 0 64k")
        peers.qemu_img("snapshot", "-c", "kept", path)
        peers.qemu_io(path, "write -P 2 64k 64k")
        return path.read_bytes()


def word(content: bytes, offset: int) -> int:
    return int(struct.unpack_from(">Q", content, offset)[0])


@functools.cache
def places() -> dict[str, int]:
    content = image()
    table = word(content, 48)
    l1 = word(content, 40)
    snapshots = word(content, 64)
    return {
        "refcount table": table, "refcount block": word(content, table), "L1 table": l1, "snapshot table": snapshots,
        "L2 table": word(content, l1) & 0x00FF_FFFF_FFFF_FE00, "L1 table of a snapshot": word(content, snapshots),
    }


def put(content: bytearray, offset: int, value: int, size: int = 8) -> None:
    content[offset : offset + size] = value.to_bytes(size, "big")


DAMAGES: dict[str, Callable[[bytearray, dict[str, int]], None]] = {
    "block unaligned": lambda raw, at: put(raw, at["refcount table"], at["refcount block"] + 512),
    "block shared": lambda raw, at: put(raw, at["refcount table"] + 8, at["refcount block"]),
    "block beyond the file": lambda raw, at: put(raw, at["refcount table"] + 8, 1 << 40),
    "block far beyond the file": lambda raw, at: put(raw, at["refcount table"] + 8, 0xFF_FFFF_FFFF_0000),
    "block on the L1 table": lambda raw, at: put(raw, at["refcount table"], at["L1 table"]),
    "block on an L2 table": lambda raw, at: put(raw, at["refcount table"] + 80, at["L2 table"]),
    "block on the refcount table": lambda raw, at: put(raw, at["refcount table"], at["refcount table"]),
    "block on the snapshot table": lambda raw, at: put(raw, at["refcount table"] + 8, at["snapshot table"]),
    "no table": lambda raw, at: put(raw, 56, 0, 4),
    "table of absurd size": lambda raw, at: put(raw, 56, 0x7FFF_FFFF, 4),
    "table too large": lambda raw, at: put(raw, 56, 129, 4),
    "table over its neighbours": lambda raw, at: put(raw, 56, 3, 4),
    "table at the header": lambda raw, at: put(raw, 48, 0),
    "table on the L1 table": lambda raw, at: put(raw, 48, at["L1 table"]),
    "table unaligned": lambda raw, at: put(raw, 48, at["refcount table"] + 8),
    "table beyond the file": lambda raw, at: put(raw, 48, 1 << 40),
    "L1 table on the refcount table": lambda raw, at: put(raw, 40, at["refcount table"]),
    "L2 table on the L1 table": lambda raw, at: put(raw, at["L1 table"], COPIED | at["L1 table"]),
    "L2 table at the header": lambda raw, at: put(raw, at["L1 table"], COPIED | 0x200),
    "L1 table of a snapshot on the active one": lambda raw, at: put(raw, at["snapshot table"], at["L1 table"]),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("autoclear", [0, 1 << 40])
def test_metadata_that_overlaps_is_refused_and_stays_as_it_is(damage: str, autoclear: int, tmp_path: Path) -> None:
    content, path = bytearray(image()), tmp_path / "disk"
    DAMAGES[damage](content, places())
    put(content, 88, autoclear)
    path.write_bytes(content)
    with pytest.raises(ImageError):
        cowslice.open(path, "r+").close()
    assert path.read_bytes() == content


def hostile(target: int, *, copied: bool = True, stream: bool = False) -> bytearray:
    """Guest clusters 2 and 3 point at a metadata cluster."""
    content = bytearray(image())
    entry = COMPRESSED | target if stream else target | (COPIED if copied else 0)
    put(content, places()["L2 table"] + 16, entry)
    put(content, places()["L2 table"] + 24, entry)
    return content


Act = Callable[[cowslice.Image], object]
ACTS: dict[str, Act] = {
    "write a cluster": lambda disk: disk.write(2 * CLUSTER, b"\xee" * CLUSTER),
    "write some bytes": lambda disk: disk.write(2 * CLUSTER + 700, b"\xee" * 100),
    "write many": lambda disk: disk.write_many([2 * CLUSTER, 3 * CLUSTER], 512, b"\xee" * 1024),
    "write over it": lambda disk: disk.write(0, b"\xee" * 4 * CLUSTER),
    "write compressed": lambda disk: disk.write_compressed(2 * CLUSTER, b"\xee" * CLUSTER),
    "zero": lambda disk: disk.zero(2 * CLUSTER, CLUSTER),
    "discard": lambda disk: disk.discard(2 * CLUSTER, CLUSTER),
}


def harmed(before: bytes, after: bytes) -> list[str]:
    """The structures that changed, the corrupt bit aside."""
    found = [name for name, at in places().items() if before[at : at + CLUSTER] != after[at : at + CLUSTER]]
    header = bytearray(after[:CLUSTER])
    header[CORRUPT_BYTE] &= ~CORRUPT
    return found + ["header"] * (header != before[:CLUSTER])


@pytest.mark.parametrize("target", [
    "refcount table", "refcount block", "L1 table", "snapshot table", "L2 table", "L1 table of a snapshot"])
@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("kind", ["copied", "shared", "stream"])
@pytest.mark.parametrize("compiled", [False, True])
def test_an_entry_that_points_at_metadata_is_refused(
    target: str, act: str, kind: str, compiled: bool, tmp_path: Path
) -> None:
    content = hostile(places()[target], copied=kind == "copied", stream=kind == "stream")
    path, storage = tmp_path / "disk", MemoryStorage(content)
    path.write_bytes(content)
    disk = cowslice.open(path if compiled else storage, "r+", format="qcow2", warmup="off")
    with pytest.raises(CowsliceError):
        ACTS[act](disk)
    with pytest.raises(CowsliceError):
        disk.write(5 * CLUSTER, b"\1")
    with pytest.raises(CowsliceError):
        disk.close()
    after = path.read_bytes() if compiled else storage.read(0, storage.length())
    assert harmed(content, after) == []
    assert after[CORRUPT_BYTE] & CORRUPT
    with pytest.raises(cowslice.CorruptImage, match="marked corrupt"):
        cowslice.open(MemoryStorage(after), "r+", format="qcow2")


@pytest.mark.parametrize("target", ["refcount table", "L1 table", "snapshot table", "L2 table"])
@pytest.mark.parametrize("act", [
    lambda disk: disk.write(8 << 20, b"\xee"), lambda disk: disk.write_compressed(8 << 20, b"\xee" * CLUSTER)])
def test_metadata_that_counts_as_free_is_not_overwritten(target: str, act: Act) -> None:
    content = bytearray(image())
    put(content, places()["refcount block"] + 2 * (places()[target] // CLUSTER), 0, 2)
    storage = MemoryStorage(content)
    disk = cowslice.open(storage, "r+", format="qcow2", warmup="off")
    with pytest.raises(cowslice.CorruptImage):
        act(disk)
    with pytest.raises(CowsliceError):
        disk.close()
    after = storage.read(0, storage.length())
    assert harmed(content, after) == []
    assert after[CORRUPT_BYTE] & CORRUPT


def test_data_that_counts_as_free_stops_the_writer_when_it_is_dropped() -> None:
    content = bytearray(image())
    data = word(content, places()["L2 table"] + 8) & 0x00FF_FFFF_FFFF_FE00
    put(content, places()["refcount block"] + 2 * (data // CLUSTER), 0, 2)
    disk = cowslice.open(MemoryStorage(content), "r+", format="qcow2", warmup="off")
    disk.discard(CLUSTER, CLUSTER)
    disk.flush()
    with pytest.raises(cowslice.CorruptImage, match="refcount is 0"):
        disk.write(0, b"\1")
    with pytest.raises(cowslice.CorruptImage):
        disk.close()


def test_an_l1_table_that_is_too_short_is_refused(tmp_path: Path) -> None:
    content = bytearray(image())
    put(content, 24, 1 << 40)  # a larger disk than the L1 table has entries for
    (tmp_path / "disk").write_bytes(content)
    with pytest.raises(ImageError):
        cowslice.open(tmp_path / "disk", "r+")
