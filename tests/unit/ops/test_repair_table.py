"""docs/repair.md says of every finding what a repair does with it: each is made here, and the page is held to that."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

import cowslice
from cowslice.errors import CowsliceError
from cowslice.format.bitmaps import (
    BitmapDirectory,
    BitmapFlags,
    decode_bitmap_directory,
    encode_bitmap_directory,
)
from cowslice.format.entries import COMPRESSED, COPIED, ZERO
from cowslice.format.extensions import BitmapsPointer, ExtensionType, with_extension
from cowslice.format.first_cluster import encode_first_cluster
from cowslice.format.header import Incompatible
from cowslice.format.snapshots import decode_snapshot_table, encode_snapshot_table
from cowslice.ops.check import CheckReport, check
from cowslice.ops.references import load_tables, read_first_cluster
from cowslice.ops.repair import repair
from cowslice.ops.undojournal import undo
from cowslice.storage.file import FileStorage

PAGE = Path(__file__).parents[3] / "docs" / "repair.md"
KiB, MiB = 1 << 10, 1 << 20
FAR = 1 << 40  # beyond the end of any image here
UNUSED = 200  # an entry of the refcount table that counts nothing
OWN, SHARED, PACKED = 0, 1, 128  # guest clusters: of the disk alone, also of the snapshot, compressed


def make_disk(path: Path) -> None:
    """A disk with clusters of its own, shared with a snapshot, and compressed, and with two bitmaps."""
    cowslice.create(path, MiB, format="qcow2", cluster_size=4096)
    with cowslice.open(path, "r+") as disk:
        disk.add_bitmap("day", granularity=512)
        disk.add_bitmap("kept", granularity=512)
        disk.write(0, b"s" * 64 * KiB)
        disk.write_compressed(512 * KiB, b"c" * 4096)
        disk.snapshot("one")
        disk.write(0, b"o" * 4096)


def make_extended(path: Path) -> None:
    cowslice.create(path, MiB, format="qcow2", cluster_size=16 * KiB, extended_l2=True)
    with cowslice.open(path, "r+") as disk:
        disk.write(0, b"s" * 64 * KiB)
        disk.write_compressed(512 * KiB, b"c" * 16 * KiB)


def make_external(path: Path) -> None:
    cowslice.create(path, MiB, format="qcow2", cluster_size=4096, data_file=path.with_suffix(".data"))
    with cowslice.open(path, "r+") as disk:
        disk.write(0, b"s" * 64 * KiB)


class Damaging:
    """The places of an image that is about to be damaged. Offsets are host bytes."""

    def __init__(self, storage: FileStorage) -> None:
        self.storage = storage
        self.tables = load_tables(storage)
        self.header, self.geometry = self.tables.header, self.tables.geometry

    def get(self, at: int, length: int = 8) -> int:
        return int.from_bytes(self.storage.read(at, length), "big")

    def put(self, at: int, value: int, length: int = 8) -> None:
        self.storage.pwrite(at, value.to_bytes(length, "big"))

    @property
    def l1(self) -> int:
        return self.header.l1_table_offset

    @property
    def reftable(self) -> int:
        return self.header.refcount_table_offset

    @property
    def behind(self) -> int:
        """The first cluster behind the file."""
        return self.tables.clusters << self.geometry.cluster_bits

    def entry(self, cluster: int) -> int:
        """Where the L2 entry of a guest cluster lies."""
        return (self.get(self.l1) & 0xFFFFFFFFFFFE00) + cluster * self.geometry.l2_entry_size

    def change_entry(self, cluster: int, change: Callable[[int], int]) -> None:
        self.put(self.entry(cluster), change(self.get(self.entry(cluster))))

    def count(self, host: int) -> int:
        """Where the refcount of the cluster at a host offset lies."""
        return self.get(self.reftable) + 2 * (host >> self.geometry.cluster_bits)

    def host(self, cluster: int) -> int:
        return self.get(self.entry(cluster)) & 0xFFFFFFFFFFFE00

    def change_snapshot(self, **fields: object) -> None:
        at = self.header.snapshots_offset
        table = decode_snapshot_table(self.storage.read(at, 4096), self.header.snapshot_count)
        self.storage.pwrite(at, encode_snapshot_table([replace(table[0], **fields)]).ljust(200, b"\0"))  # type: ignore[arg-type]

    @property
    def pointer(self) -> BitmapsPointer:
        found = self.tables.first.bitmaps
        assert found is not None
        return found

    def change_bitmap(self, **fields: object) -> None:
        """Change the record of the first bitmap."""
        at, length = self.pointer.directory_offset, self.pointer.directory_size
        directory = decode_bitmap_directory(self.storage.read(at, length), 2, self.geometry, self.header.size)
        first, second = directory.bitmaps
        changed = BitmapDirectory((replace(first, **fields), second))  # type: ignore[arg-type]
        self.storage.pwrite(at, encode_bitmap_directory(changed))

    def change_first(self, **fields: object) -> None:
        """Change the header."""
        first = self.tables.first
        self.storage.pwrite(0, encode_first_cluster(replace(first, header=replace(self.header, **fields))))  # type: ignore[arg-type]

    @property
    def bitmap_table(self) -> int:
        at, length = self.pointer.directory_offset, self.pointer.directory_size
        found = decode_bitmap_directory(self.storage.read(at, length), 2, self.geometry, self.header.size)
        return found.bitmaps[0].table_offset


Act = Callable[[Damaging], None]


@dataclass(frozen=True, slots=True)
class Row:
    """`finding` as the page names it, `told` as a check tells it; what the two repairs do, in the page's words."""

    finding: str
    told: str
    leaks: str
    all: str
    act: Act
    make: Callable[[Path], None] = make_disk


def cut_directory(damaging: Damaging) -> None:
    pointer = replace(damaging.pointer, count=3).encode()
    first = damaging.tables.first
    extensions = with_extension(first.extensions, ExtensionType.BITMAPS, pointer.payload)
    damaging.storage.pwrite(0, encode_first_cluster(replace(first, extensions=extensions)))


def twice_named_block(damaging: Damaging) -> None:
    damaging.put(damaging.reftable + 8 * UNUSED, damaging.get(damaging.reftable))


def far_block(damaging: Damaging) -> None:
    damaging.put(damaging.reftable + 8 * UNUSED, FAR)


def lost_block(damaging: Damaging) -> None:
    damaging.put(damaging.reftable, 0)


ROWS = (
    Row("a cluster counts more than its references", r"leaked, 1 reference found, the refcount is 2", "repaired",
        "repaired", lambda d: d.put(d.count(d.header.snapshots_offset), 2, 2)),
    Row("a cluster counts fewer than its references", r"2 references found, the refcount is 1", "left", "repaired",
        lambda d: d.put(d.count(d.host(SHARED)), 1, 2)),
    Row("a cluster in use counts zero", r"1 reference found, the refcount is 0", "refused", "repaired",
        lambda d: d.put(d.count(d.host(OWN)), 0, 2)),
    Row("clusters in use have no refcount block", r"the refcount is 0", "refused", "rebuilt", lost_block),
    Row("an entry of the refcount table has reserved bits, or is not aligned", r"refcount table entry 0 is .*reserved",
        "refused", "rebuilt", lambda d: d.put(d.reftable, d.get(d.reftable) | 1)),
    Row("an entry of the refcount table points behind the file", r"refcount table entry 200 is .*beyond the end",
        "left", "rebuilt", far_block),
    Row("a refcount block has another reference", r"refcount block 200 has 2 references, expected 1", "refused",
        "rebuilt", twice_named_block),
    Row("the copied flag of an L1 entry does not fit the refcount", r"L1 entry 0 of active: the copied flag is clear",
        "repaired", "repaired", lambda d: d.put(d.l1, d.get(d.l1) ^ COPIED)),
    Row("the copied flag of an L2 entry does not fit the refcount", r"the copied flag is set, but the refcount is 2",
        "repaired", "repaired", lambda d: d.change_entry(SHARED, lambda word: word ^ COPIED)),
    Row("the copied flag of a compressed cluster is set", r"the copied flag is set on a compressed cluster", "repaired",
        "repaired", lambda d: d.change_entry(PACKED, lambda word: word | COPIED)),
    Row("reserved bits of an L1 entry are set", r"L1 entry 0 .*reserved bits 0x1 ", "left", "left",
        lambda d: d.put(d.l1, d.get(d.l1) | 1)),
    Row("reserved bits of an L2 entry are set", r"reserved bits 0x2 ", "left", "left",
        lambda d: d.change_entry(OWN, lambda word: word | 2)),
    Row("an L2 table is not aligned", r"the L2 table at 0x\w+ is not aligned", "left", "left",
        lambda d: d.put(d.l1, d.get(d.l1) | 0x200)),
    Row("a cluster of data is not aligned", r"host offset 0x\w+ is not aligned", "left", "left",
        lambda d: d.change_entry(OWN, lambda word: word | 0x200)),
    Row("a cluster of zeros owns space that is not aligned", r"host offset 0x\w+ is not aligned", "left", "repaired",
        lambda d: d.change_entry(OWN, lambda word: word | 0x200 | ZERO)),
    Row("an L1 entry points behind the file", r"L1 entry 0 of active: it points at 0x\w+, beyond the end", "left",
        "left", lambda d: d.put(d.l1, FAR | COPIED)),
    Row("an L2 entry points behind the file", r"it points at 0x10000000000, beyond the end", "left", "left",
        lambda d: d.put(d.entry(OWN), FAR | COPIED)),
    Row("a subcluster is both allocated and zero", r"subclusters 0x00000001 are both allocated and zero", "left",
        "left", lambda d: d.put(d.entry(OWN) + 8, 1 << 32 | 0xFFFFFFFF), make_extended),
    Row("a subcluster is allocated, its cluster is not", r"are allocated, but there is no host cluster", "left", "left",
        lambda d: d.put(d.entry(10) + 8, 1), make_extended),
    Row("a compressed cluster has a subcluster bitmap", r"it is compressed, but has the subcluster bitmap", "left",
        "left", lambda d: d.put(d.entry(32) + 8, 1), make_extended),
    Row("a cluster is compressed beside a data file", r"it is compressed, but guest data lies in an external file",
        "left", "left", lambda d: d.put(d.entry(3), COMPRESSED | 0x5000), make_external),
    Row("there are snapshots beside a data file", r"1 snapshots, but guest data lies in an external file", "left",
        "left", lambda d: d.change_first(incompatible=Incompatible.DATA_FILE)),
    Row("a snapshot lacks its sizes", r"snapshot 'one' has 0 bytes of extra data, expected 16", "left", "rebuilt",
        lambda d: d.change_snapshot(extra=b"")),
    Row("the L1 table of a snapshot is not aligned", r"snapshot 'one' has its L1 table at 0x\w+, not aligned", "left",
        "left", lambda d: d.change_snapshot(l1_offset=0x1200)),
    Row("the L1 table of a snapshot is larger than any", r"snapshot 'one' has \d+ L1 entries, expected at most", "left",
        "left", lambda d: d.change_snapshot(l1_size=1 << 23)),
    Row("a snapshot cannot be read", r"only 0 of 1 snapshot records", "refused", "refused",
        lambda d: d.put(d.header.snapshots_offset + 36, 1 << 30, 4)),
    Row("a structure ends behind the file", r"the L1 table of snapshot 'one': it points at 0x\w+, beyond", "left",
        "left", lambda d: d.change_snapshot(l1_offset=FAR)),
    Row("a bitmap is damaged", r"bitmap 'day' is unusable: its table is at 0x1200", "left", "removed",
        lambda d: d.change_bitmap(table_offset=0x1200)),
    Row("a bitmap's table has impossible entries", r"an entry of bitmap 'day'", "left", "removed",
        lambda d: d.put(d.bitmap_table, 2)),
    Row("a bitmap lies behind the file", r"the table of bitmap 'day': it points at 0x\w+, beyond", "left", "removed",
        lambda d: d.change_bitmap(table_offset=FAR)),
    Row("the bitmap directory is cut off", r"record 2 of 3 is cut off", "left", "repaired", cut_directory),
    Row("a bitmap is of an unknown kind", r"bitmap 'day' is unusable: type is 7", "left", "left",
        lambda d: d.change_bitmap(type=7)),
    Row("a bitmap has unknown flags", r"bitmap 'day' is unusable: unknown flags", "left", "left",
        lambda d: d.change_bitmap(flags=BitmapFlags(8))),
)


def findings(report: CheckReport) -> list[str]:
    return [told.message for told in report.findings]


def guest(path: Path) -> list[bytes]:
    """All clusters as they are read, b'' for one that cannot be; none of a disk that does not open."""
    try:
        with cowslice.open(path, warmup="off") as disk:
            return [cluster(disk, at) for at in range(0, disk.size, 4096)]
    except CowsliceError:
        return []


def cluster(disk: cowslice.Image, at: int) -> bytes:
    try:
        return disk.read(at, 4096)
    except CowsliceError:
        return b""


def damaged(row: Row, path: Path) -> Path:
    row.make(path)
    with FileStorage(path, "r+") as storage:
        assert check(storage).corruptions == check(storage).leaks == 0
        row.act(Damaging(storage))
    return path


def outcome(row: Row, path: Path, mode: str) -> str:
    """What a repair does, once a dry run has planned the same and an undo has taken it back."""
    before, reads = path.read_bytes(), guest(path)
    with FileStorage(path) as storage:
        plan = repair(storage, mode, dry_run=True)
    assert path.read_bytes() == before
    with FileStorage(path, "r+") as storage:
        done = repair(storage, mode)
        bitmaps = read_first_cluster(storage).bitmaps
    assert (plan.edits, plan.left, plan.rebuilt) == (done.edits, done.left, done.rebuilt)
    assert all(old in (b"", new) for old, new in zip(reads, guest(path), strict=bool(reads)))
    if done.journal:
        with FileStorage(path, "r+") as storage:
            undo(storage, done.journal)
    assert path.read_bytes() == before
    if any(re.search(row.told, message) for message in findings(done.after)):
        return "refused" if done.after.check_errors else "left"
    assert (done.after.corruptions, done.after.leaks, done.after.check_errors) == (0, 0, 0)
    if done.rebuilt:
        return "rebuilt"
    return "removed" if bitmaps is not None and bitmaps.count == 1 else "repaired"


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.finding)
def test_a_repair_does_what_the_page_says_and_can_be_taken_back(row: Row, tmp_path: Path) -> None:
    path = damaged(row, tmp_path / "disk.qcow2")
    with FileStorage(path) as storage:
        found = check(storage)
    assert any(re.search(row.told, message) for message in findings(found)), findings(found)
    assert (outcome(row, path, "leaks"), outcome(row, path, "all")) == (row.leaks, row.all)


def test_the_page_names_each_finding_and_no_other() -> None:
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in PAGE.read_text().splitlines()
             if line.startswith("|")]
    assert [cell[:3] for cell in cells[2:]] == [[row.finding, row.leaks, row.all] for row in ROWS]


@pytest.mark.parametrize("bit", [Incompatible.DIRTY, Incompatible.CORRUPT])
@pytest.mark.parametrize("mode", ["leaks", "all"])
def test_an_image_that_is_sound_is_called_so(bit: Incompatible, mode: str, tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    make_disk(path)
    with FileStorage(path, "r+") as storage:
        Damaging(storage).change_first(incompatible=bit)
        assert repair(storage, mode).bits_cleared
        assert not read_first_cluster(storage).header.incompatible


def test_the_last_bitmap_that_is_damaged_leaves_an_image_without_any(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    make_disk(path)
    with cowslice.open(path, "r+") as disk:
        disk.remove_bitmap("kept")
    with FileStorage(path, "r+") as storage:
        at = load_tables(storage).first.bitmaps
        assert at is not None
        storage.pwrite(at.directory_offset, (0x1200).to_bytes(8, "big"))
        done = repair(storage, "all")
        assert (done.after.corruptions, done.after.leaks) == (0, 0)
        assert read_first_cluster(storage).bitmaps is None
    with cowslice.open(path) as disk:
        assert disk.bitmaps == ()


def test_a_directory_that_shares_its_cluster_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    make_disk(path)
    with FileStorage(path, "r+") as storage:
        damaging = Damaging(storage)
        damaging.put(damaging.entry(OWN), damaging.pointer.directory_offset)
        damaging.put(damaging.count(damaging.pointer.directory_offset), 2, 2)
        damaging.change_bitmap(table_offset=0x1200)
        before = damaging.storage.read(damaging.pointer.directory_offset, 4096)
        done = repair(storage, "all")
        assert storage.read(damaging.pointer.directory_offset, 4096) == before
    assert any("used for something else" in why for why in done.left)
