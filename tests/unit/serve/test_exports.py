"""What can be asked about a disk: contexts, bitmaps, holes; bounded, and always a step further."""

from __future__ import annotations

from pathlib import Path

import pytest

import cowslice
from cowslice.errors import BadOption
from cowslice.nbd.wire import ALLOCATION_DEPTH, BASE_ALLOCATION, ExportFlag
from cowslice.serve import exports
from cowslice.serve.exports import Export
from cowslice.testing import peers
from tests.unit.serve.rawclient import in_memory, model

K = 1 << 16
MiB = 1 << 20
HOLE_AND_ZERO, ZERO = 3, 2


def test_base_allocation_says_what_qemu_map_says() -> None:
    with cowslice.open(in_memory(model("NNZ.CN"))) as disk:
        states = Export(disk).states(BASE_ALLOCATION, 0, 6 * K, most=99)
    assert states == [(2 * K, 0), (2 * K, HOLE_AND_ZERO), (2 * K, 0)]


def test_states_begin_where_they_are_asked() -> None:
    with cowslice.open(in_memory(model("NNZ."))) as disk:
        assert Export(disk).states(BASE_ALLOCATION, K + 5, K, most=99) == [(K - 5, 0), (5, HOLE_AND_ZERO)]


def test_no_more_states_are_given_than_asked_for() -> None:
    with cowslice.open(in_memory(model("N.N.N."))) as disk:
        assert len(Export(disk).states(BASE_ALLOCATION, 0, 6 * K, most=2)) == 2


def test_a_long_description_ends_early_but_never_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exports, "MOST_SECONDS", -1)
    monkeypatch.setattr(exports, "WINDOW", 2)
    with cowslice.open(in_memory(model("N.N.NNNNNN"))) as disk:
        export, found, at = Export(disk), [], 0
        while at < disk.size:
            (state,) = export.states(BASE_ALLOCATION, at, disk.size - at, most=99)
            found.append(state)
            at += state[0]
    assert found == [(K, 0), (K, 3), (K, 0), (K, 3), (2 * K, 0), (2 * K, 0), (2 * K, 0)]


def test_stored_covers_the_span_exactly() -> None:
    with cowslice.open(in_memory(model("NZ.N"))) as disk:
        assert list(Export(disk).stored(1, 4 * K - 2)) == [(K - 1, False), (2 * K, True), (K - 1, False)]


def test_allocation_depth_counts_layers_from_one(tmp_path: Path) -> None:
    (tmp_path / "base.raw").write_bytes(bytes(4 * K))
    top = model("N.Z.")
    with cowslice.open(in_memory(top), backing=tmp_path / "base.raw", backing_format="raw") as disk:
        found = Export(disk, allocation_depth=True).states(ALLOCATION_DEPTH, 0, 4 * K, most=9)
    assert found == [(K, 1), (K, 2), (K, 1), (K, 2)]


def test_without_several_clients_several_connections_are_not_offered() -> None:
    with cowslice.open(in_memory(model("N"))) as disk:
        assert Export(disk).offer.flags & ExportFlag.CAN_MULTI_CONN
        assert not Export(disk, multi_conn=False).offer.flags & ExportFlag.CAN_MULTI_CONN


@pytest.mark.parametrize("text", ["a\0b", "x" * 5000, "\udc80"])
def test_a_name_that_the_protocol_cannot_carry_is_refused(text: str) -> None:
    with cowslice.open(in_memory(model("N"))) as disk, pytest.raises(BadOption):
        Export(disk, text)


def test_a_bitmap_that_is_not_there_is_refused() -> None:
    with cowslice.open(in_memory(model("N"))) as disk, pytest.raises(BadOption, match="has no bitmaps"):
        Export(disk, bitmaps=["day"])


@pytest.fixture
def marked(tmp_path: Path) -> Path:
    base, top = tmp_path / "base.qcow2", tmp_path / "top.qcow2"
    peers.qemu_img("create", "-q", "-f", "qcow2", base, 4 * MiB)
    peers.qemu_img("bitmap", "--add", "-g", K, base, "below")
    peers.qemu_io(base, "write 1M 64k")
    peers.qemu_img("create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", base, top, 8 * MiB)
    peers.qemu_img("bitmap", "--add", "-g", K, top, "day")
    peers.qemu_io(top, "write 0 1k", "write 6M 128k")
    return top


@peers.needs("qemu-img", "qemu-io")
def test_a_bitmap_says_where_the_disk_is_dirty(marked: Path) -> None:
    with cowslice.open(marked) as disk:
        export = Export(disk, bitmaps=["day"])
        assert export.offer.contexts == (BASE_ALLOCATION, "qemu:dirty-bitmap:day")
        found = export.states("qemu:dirty-bitmap:day", 0, 8 * MiB, most=99)
    assert found == [(K, 1), (6 * MiB - K, 0), (2 * K, 1), (2 * MiB - 2 * K, 0)]


@peers.needs("qemu-img", "qemu-io")
def test_a_bitmap_of_a_layer_below_is_found_and_clean_beyond_its_end(marked: Path) -> None:
    with cowslice.open(marked) as disk:
        found = Export(disk, bitmaps=["below"]).states("qemu:dirty-bitmap:below", MiB, 7 * MiB, most=99)
    assert found == [(K, 1), (7 * MiB - K, 0)]


@peers.needs("qemu-img", "qemu-io")
def test_a_bitmap_in_use_is_refused(marked: Path) -> None:
    file = bytearray(marked.read_bytes())
    with cowslice.open(marked) as disk:
        assert disk.first_cluster is not None
        assert disk.first_cluster.bitmaps is not None
        at = disk.first_cluster.bitmaps.directory_offset
    file[at + 15] |= 1
    marked.write_bytes(file)
    with cowslice.open(marked) as disk, pytest.raises(BadOption, match="did not finish"):
        Export(disk, bitmaps=["day"])
