"""Clients that nobody here wrote write to a disk over NBD, and QEMU finds the image sound and the bytes there."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import cowslice
from cowslice.testing import peers

pytestmark = peers.needs("qemu-img", "qemu-io", "nbdinfo", "nbdcopy")
SIZE = 4 << 20


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.qcow2"
    peers.qemu_img("create", "-q", "-f", "qcow2", path, SIZE)
    return path


@contextmanager
def served(image: Path, **options: object) -> Iterator[str]:
    """The URI of the image, open for writing; after the block it is closed."""
    socket = image.with_suffix(".sock")
    with cowslice.open(image, "r+") as disk, cowslice.serve(disk, unix=str(socket), writable=True, **options):
        yield f"nbd+unix:///?socket={socket}"


def content(image: Path) -> bytes:
    """What QEMU reads, once it finds nothing wrong."""
    peers.qemu_img("check", image)
    raw = image.with_suffix(".raw")
    peers.qemu_img("convert", "-O", "raw", image, raw)
    return raw.read_bytes()


def test_qemu_io_writes_zeroes_trims_and_flushes(image: Path) -> None:
    with served(image) as uri:
        peers.qemu_io(uri, "write -P 17 0 1M", "write -P 18 -f 70000 4096", "write -z 128k 64k", "write -z -u 256k 64k",
                      "discard 512k 128k", "flush", "read -P 18 70000 4096", image_format="raw")
    expected = bytearray(b"\x11" * (1 << 20)) + bytes(SIZE - (1 << 20))
    expected[70000 : 70000 + 4096] = b"\x12" * 4096
    for start, length in ((128 << 10, 64 << 10), (256 << 10, 64 << 10), (512 << 10, 128 << 10)):
        expected[start : start + length] = bytes(length)
    assert content(image) == bytes(expected)


def test_nbdcopy_writes_over_several_connections(image: Path, tmp_path: Path) -> None:
    source = tmp_path / "source.raw"
    source.write_bytes(random.Random(1).randbytes(SIZE // 2) + bytes(SIZE // 4) + random.Random(2).randbytes(SIZE // 4))
    with served(image) as uri:
        peers.nbdcopy("--connections=4", "--flush", source, uri)
    assert content(image) == source.read_bytes()


def test_the_export_offers_what_a_writable_disk_can(image: Path) -> None:
    with served(image) as uri:
        told = peers.nbdinfo_json(uri)["exports"][0]
    assert not told["is_read_only"]
    assert all(told[can] for can in ("can_flush", "can_fua", "can_trim", "can_zero", "can_multi_conn"))


def test_an_image_that_only_reads_is_not_served_for_writing(image: Path) -> None:
    with cowslice.open(image) as disk, pytest.raises(cowslice.BadOption, match="opened for reading only"):
        cowslice.serve(disk, unix=str(image.with_suffix(".sock")), writable=True)
