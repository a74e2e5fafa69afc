"""Internal snapshots: listed as qemu-img lists them, found by id before name, read as the disk was then."""

from __future__ import annotations

from pathlib import Path

import pytest

import cowslice
from cowslice.errors import BadOption, MalformedImage
from cowslice.format.entries import Kind
from cowslice.format.snapshots import Snapshot, encode_snapshot_extra, encode_snapshot_table
from cowslice.image.snapshots import find_snapshot, load_snapshots
from cowslice.storage import MemoryStorage
from cowslice.testing import peers
from tests.unit.image.conftest import GEOMETRY, Maker

KiB, MiB = 1 << 10, 1 << 20


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """Three snapshots; the second is called by the id of the third, and the disk was smaller at first."""
    path = tmp_path / "disk.qcow2"
    peers.qemu_img("create", "-q", "-f", "qcow2", path, MiB)
    for number, name in enumerate(("first", "3", "third")):
        peers.qemu_io(path, f"write -P {number + 1} {number * 50}k 100k")
        peers.qemu_img("snapshot", "-c", name, path)
        if number == 0:
            peers.qemu_img("resize", "-q", "-f", "qcow2", path, 2 * MiB)
    peers.qemu_io(path, "write -P 9 0 2M")
    return path


def expected(last: int) -> bytes:
    """What the disk held after write number `last`."""
    content = bytearray(2 * MiB)
    for number in range(last):
        content[number * 50 * KiB : (number * 50 + 100) * KiB] = bytes([number + 1]) * (100 * KiB)
    return bytes(content)


@peers.needs("qemu-img", "qemu-io")
def test_snapshots_are_listed_as_qemu_lists_them(image: Path) -> None:
    listed = peers.qemu_img_json("info", image)["snapshots"]
    with cowslice.open(image) as disk:
        assert [(one.id.decode(), one.name.decode(), one.seconds) for one in disk.snapshots] == \
            [(one["id"], one["name"], one["date-sec"]) for one in listed]


@peers.needs("qemu-img", "qemu-io")
@pytest.mark.parametrize("wanted, last", [("1", 1), ("first", 1), ("2", 2), ("third", 3), ("3", 3)])
def test_a_snapshot_is_found_by_id_first_and_then_by_name(image: Path, wanted: str, last: int) -> None:
    with cowslice.open(image, snapshot=wanted) as disk:
        assert disk.read(0, disk.size) == expected(last)[: disk.size]


@peers.needs("qemu-img", "qemu-io")
def test_a_snapshot_has_the_size_that_the_disk_had_then(image: Path) -> None:
    sizes = []
    for wanted in ("1", "2"):
        with cowslice.open(image, snapshot=wanted) as disk:
            sizes.append(disk.size)
    assert sizes == [MiB, 2 * MiB]


@peers.needs("qemu-img", "qemu-io")
def test_a_snapshot_that_is_not_there_is_refused_with_those_that_are(image: Path) -> None:
    with pytest.raises(cowslice.BadOption, match=r"snapshot is 'none'.*1 'first', 2 '3', 3 'third'"):
        cowslice.open(image, snapshot="none")


def test_without_snapshots_the_refusal_says_so(make: Maker, tmp_path: Path) -> None:
    make("disk", [])
    with pytest.raises(BadOption, match="the image has no snapshots"):
        cowslice.open(tmp_path / "disk", snapshot="a")


def record(number: int, **fields: object) -> Snapshot:
    _, extra = encode_snapshot_extra(vm_state_size=0, disk_size=4096)
    plain = {"l1_offset": 3 * 4096, "l1_size": 1, "id": b"%d" % number, "name": b"n%d" % number, "extra": extra}
    return Snapshot(**{**plain, **fields})  # type: ignore[arg-type]


def with_table(make: Maker, snapshots: list[Snapshot]) -> MemoryStorage:
    """An image of one cluster with this snapshot table behind everything else."""
    file = bytearray(make("disk", [Kind.NORMAL]).file)
    file += bytes(-len(file) % GEOMETRY.cluster_size)
    file[60:64] = len(snapshots).to_bytes(4, "big")
    file[64:72] = len(file).to_bytes(8, "big")
    return MemoryStorage(bytes(file) + encode_snapshot_table(snapshots))


def test_a_table_of_thousands_is_read_whole(make: Maker) -> None:
    snapshots = [record(number) for number in range(5000)]
    with cowslice.open(with_table(make, snapshots)) as disk:
        assert disk.snapshots == tuple(snapshots)


def test_a_table_that_is_cut_off_fails_only_who_asks_for_it(make: Maker) -> None:
    storage = with_table(make, [record(1), record(2)])
    storage.truncate(storage.length() - 8)
    with cowslice.open(storage) as disk:
        assert disk.read(0, 1)
        with pytest.raises(MalformedImage, match="cut off"):
            disk.snapshots  # noqa: B018


@pytest.mark.parametrize("fields, field", [
    ({"l1_offset": 100}, "l1_table_offset"), ({"l1_size": 0}, "l1_size"), ({"l1_size": 1 << 31}, "l1_size"),
])
def test_an_unusable_snapshot_is_refused_by_its_field(make: Maker, fields: dict[str, int], field: str) -> None:
    storage = with_table(make, [record(1), record(2, **fields)])
    with cowslice.open(storage, snapshot="1") as disk:
        assert disk.size == 4096
    with pytest.raises(MalformedImage, match="n2") as refusal:
        cowslice.open(storage, snapshot="2")
    assert refusal.value.field == field


def test_a_snapshot_without_a_recorded_size_has_the_size_of_now(make: Maker) -> None:
    storage = with_table(make, [record(1, extra=b"")])
    with cowslice.open(storage, snapshot="1") as disk:
        assert disk.size == 4096


def test_an_id_wins_over_a_name() -> None:
    snapshots = [record(1, name=b"2"), record(2)]
    assert find_snapshot(snapshots, "2") is snapshots[1]


def test_no_snapshots_are_no_read(make: Maker, tmp_path: Path) -> None:
    make("disk", [])
    with cowslice.open(tmp_path / "disk") as disk:
        assert disk.header is not None
        assert load_snapshots(MemoryStorage(b""), disk.header) == ()
