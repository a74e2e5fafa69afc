"""Attacks by hand: endless streams, keys that take a year, files that are no files, tables that eat themselves."""

from __future__ import annotations

import os
import socket
import struct
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import cowslice
from cowslice.codec.compression import compress_cluster
from cowslice.format.entries import ALL_SUBCLUSTERS, encode_compressed, encode_normal
from cowslice.format.first_cluster import decode_first_cluster
from cowslice.format.header import FIELD_OFFSETS, CompressionType, Incompatible
from cowslice.image.reading import read_into
from cowslice.ops.layout import populated_content, write_populated_image
from cowslice.testing import peers, recipes
from cowslice.testing.fixtures import ORDINARY
from cowslice.testing.limited import put_through
from cowslice.testing.mutations import Mutation
from cowslice.units import GiB, KiB, MiB

CLUSTER_BITS = 16
CLUSTER = 1 << CLUSTER_BITS
SIZE = 4 * CLUSTER
LONGEST = 128 * KiB  # what an entry can say about a stream with these clusters


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """Four clusters with content; the third and fourth of them are free to be spoiled."""
    write_populated_image(tmp_path / "image", size=SIZE, cluster_bits=CLUSTER_BITS, populate=True)
    return tmp_path / "image"


def spoil(path: Path, cluster: int, payload: bytes, kind: CompressionType) -> None:
    """Append a stream and let a guest cluster be what it holds."""
    header = decode_first_cluster(path.read_bytes()).header
    with path.open("r+b") as file:
        stream = file.seek(0, os.SEEK_END)
        file.write(payload)
        _set_entry(file, header.l1_table_offset, cluster, encode_compressed(stream, len(payload), CLUSTER_BITS))
        file.seek(FIELD_OFFSETS["incompatible"])
        file.write(struct.pack(">Q", Incompatible.COMPRESSION if kind else 0))
        file.seek(FIELD_OFFSETS["compression_type"])
        file.write(bytes([kind]))


def _set_entry(file: Any, l1_offset: int, cluster: int, word: int) -> None:
    file.seek(l1_offset)
    table = int.from_bytes(file.read(8), "big") & ~(1 << 63)
    file.seek(table + cluster * 8)
    file.write(word.to_bytes(8, "big"))


def deflate_of(content: bytes, times: int = 1) -> bytes:
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    return b"".join(packer.compress(content) for _ in range(times)) + packer.flush()


def zstd_of(content: bytes, times: int = 1) -> bytes:
    zstd = pytest.importorskip("backports.zstd")
    packer = zstd.ZstdCompressor()
    return b"".join(packer.compress(content) for _ in range(times)) + bytes(packer.flush())


BOMBS: dict[str, tuple[CompressionType, Callable[[], bytes]]] = {
    "deflate of 100 MiB": (CompressionType.DEFLATE, lambda: deflate_of(bytes(MiB), 100)),
    "zstd of 2 GiB": (CompressionType.ZSTD, lambda: zstd_of(bytes(16 * MiB), 2 * GiB // (16 * MiB))),
    "zstd frame that declares 1 EiB": (
        CompressionType.ZSTD,
        lambda: b"\x28\xb5\x2f\xfd\xe0" + struct.pack("<Q", 1 << 60) + b"\x02\x00\x10" + bytes(2),
    ),
    "zstd window of 2 GiB": (CompressionType.ZSTD, lambda: b"\x28\xb5\x2f\xfd\x00\xa8\x01\x00\x00"),
    "empty zstd frames": (CompressionType.ZSTD, lambda: zstd_of(b"") * 9000),
    "skippable zstd frames": (CompressionType.ZSTD, lambda: b"\x50\x2a\x4d\x18\x00\x00\x00\x00" * 9000),
    "a skippable zstd frame longer than all": (CompressionType.ZSTD, lambda: b"\x50\x2a\x4d\x18\xff\xff\xff\xff" * 9),
    "empty deflate blocks": (CompressionType.DEFLATE, lambda: b"\x00\x00\x00\xff\xff" * 20000),
    "deflate that ends early": (CompressionType.DEFLATE, lambda: deflate_of(b"short")),
    "zstd that ends early": (CompressionType.ZSTD, lambda: zstd_of(b"short")),
    "no bytes of a stream": (CompressionType.DEFLATE, lambda: bytes(512)),
    "noise": (CompressionType.ZSTD, lambda: populated_content(0, LONGEST - 512)),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_hostile_stream_costs_bounded_memory_and_spares_its_neighbours(image: Path, name: str) -> None:
    kind, make = BOMBS[name]
    payload = make()[: LONGEST - 512]
    spoil(image, 2, payload, kind)
    answer = put_through(image, [Mutation("untouched")])[0]
    assert answer["read"].startswith(("ok", "CorruptImage")), answer
    with cowslice.open(image) as disk:
        assert disk.read(0, 2 * CLUSTER) == populated_content(0, 2 * CLUSTER)
        assert disk.read(3 * CLUSTER, CLUSTER) == populated_content(3 * CLUSTER, CLUSTER)


@pytest.mark.parametrize("kind", list(CompressionType))
def test_a_stream_that_the_file_cuts_off_is_refused(image: Path, kind: CompressionType) -> None:
    payload = compress_cluster(kind, populated_content(0, CLUSTER // 2) + bytes(CLUSTER // 2))
    assert payload is not None
    spoil(image, 2, payload, kind)
    os.truncate(image, image.stat().st_size - len(payload) // 2)
    with cowslice.open(image) as disk, pytest.raises(cowslice.ImageError):
        disk.read(2 * CLUSTER, 1)


def test_a_file_that_ends_inside_a_data_cluster_reads_zeros_behind_its_end(tmp_path: Path) -> None:
    path = tmp_path / "image"
    write_populated_image(path, size=SIZE, cluster_bits=CLUSTER_BITS, populate=True)
    os.truncate(path, path.stat().st_size - CLUSTER + 100)
    with cowslice.open(path) as disk:
        assert disk.read(SIZE - CLUSTER, CLUSTER) == populated_content(SIZE - CLUSTER, 100) + bytes(CLUSTER - 100)


@pytest.mark.parametrize("beyond", [1 * MiB, 1 << 40, (1 << 56) - CLUSTER])
def test_a_cluster_beyond_the_end_of_the_file_reads_zeros_as_in_qemu(image: Path, beyond: int) -> None:
    header = decode_first_cluster(image.read_bytes()).header
    with image.open("r+b") as file:
        _set_entry(file, header.l1_table_offset, 2, encode_normal(beyond, copied=True))
    with cowslice.open(image) as disk:
        assert disk.read(2 * CLUSTER, CLUSTER) == bytes(CLUSTER)
        assert disk.read(CLUSTER, CLUSTER) == populated_content(CLUSTER, CLUSTER)


def test_tables_that_are_their_own_clusters_read_as_data(image: Path) -> None:
    """An L1 table that is its own L2 table, which is its own data: odd, finite, and read like anything else."""
    header = decode_first_cluster(image.read_bytes()).header
    word = encode_normal(header.l1_table_offset, copied=True).to_bytes(8, "big")
    with image.open("r+b") as file:
        file.seek(header.l1_table_offset)
        file.write(word)
    answer = put_through(image, [Mutation("untouched")])[0]
    assert answer["read"].startswith("ok")
    with cowslice.open(image) as disk:
        assert disk.read(0, 16) == word + bytes(8)


@pytest.mark.parametrize("l2", ["standard", "extended"])
@pytest.mark.parametrize("zero", [0, 1])
@peers.needs("qemu-img", "qemu-io")
def test_a_data_file_cluster_at_another_place_is_refused_whatever_it_holds(tmp_path: Path, l2: str, zero: int) -> None:
    made = recipes.make(replace(ORDINARY, data_file="mapped", l2=l2), tmp_path)
    header = decode_first_cluster(made.path.read_bytes()).header
    with made.path.open("r+b") as file:
        file.seek(header.l1_table_offset)
        table = int.from_bytes(file.read(8), "big") & ~(1 << 63)
        file.seek(table + 4 * header.geometry.l2_entry_size)
        file.write((encode_normal(9 * CLUSTER, copied=True) | (zero if l2 == "standard" else 0)).to_bytes(8, "big"))
        if l2 == "extended":
            file.write((ALL_SUBCLUSTERS << 32 if zero else ALL_SUBCLUSTERS).to_bytes(8, "big"))
    peers.qemu_io(made.path, f"read {4 * CLUSTER} 512", options=["-r"], expect=1)
    with cowslice.open(made.path) as disk:
        for read in (disk.read, lambda offset, length: read_into(disk.layers, offset, memoryview(bytearray(length)))):
            with pytest.raises(cowslice.CorruptImage, match="expected the same offset"):
                read(4 * CLUSTER, 512)
            read(3 * CLUSTER, 512)


SLOT = 208
LUKS_FIELDS = {
    "iterations of the first slot": (SLOT + 4, 4),
    "iterations of the digest": (164, 4),
    "stripes": (SLOT + 44, 4),
    "key material offset": (SLOT + 40, 4),
    "key bytes": (108, 4),
    "payload offset": (104, 4),
    "version": (6, 2),
    "cipher name": (8, 4),
    "cipher mode": (40, 4),
    "hash": (72, 4),
}


@peers.needs("qemu-img", "qemu-io")
def test_a_hostile_key_header_is_refused_before_it_costs_much(tmp_path: Path) -> None:
    made = recipes.make(replace(ORDINARY, encryption="luks"), tmp_path)
    pointer = decode_first_cluster(made.path.read_bytes()).crypto
    assert pointer is not None
    mutations = [
        Mutation(f"{field} = {value:#x}", ((pointer.offset + at, value.to_bytes(width, "big")),))
        for field, (at, width) in LUKS_FIELDS.items()
        for value in (0, 1, (1 << 8 * width - 1) - 1, (1 << 8 * width) - 1)
    ]
    every_slot = tuple((pointer.offset + SLOT + 48 * n, struct.pack(">II", 0xAC71F3, (1 << 32) - 1)) for n in range(8))
    mutations.append(Mutation("eight slots of 2^32 rounds", every_slot))
    answers = put_through(made.path, mutations, made.secret)
    for mutation, answer in zip(mutations, answers, strict=True):
        told = answer["read"].split(":")[0]
        assert told in ("CryptoError", "MalformedImage", "UnsupportedImage", "CorruptImage") or "ok" in told, mutation


def _bind(path: Path) -> None:
    """Leave a socket there."""
    with socket.socket(socket.AF_UNIX) as listener:
        here = os.getcwd()
        os.chdir(path.parent)  # the kernel takes short names only
        try:
            listener.bind(path.name)
        finally:
            os.chdir(here)


STRANGE: dict[str, Callable[[Path], object]] = {
    "fifo": os.mkfifo,
    "directory": os.mkdir,
    "nothing": lambda path: None,
    "socket": _bind,
    "empty": Path.touch,
}


@pytest.mark.parametrize("kind", STRANGE)
@pytest.mark.parametrize("backing_format", ["raw", "qcow2"])
@peers.needs("qemu-img")
def test_a_backing_file_that_is_no_file_does_not_hang_or_crash(
    tmp_path: Path, kind: str, backing_format: str
) -> None:
    STRANGE[kind](tmp_path / "base")
    peers.qemu_img("create", "-q", "-u", "-f", "qcow2", "-b", "base", "-F", backing_format, tmp_path / "image", "1M")
    answer = put_through(tmp_path / "image", [Mutation("untouched")])[0]
    if kind == "empty" and backing_format == "raw":
        assert answer["read"].startswith("ok")
    else:
        assert answer["read"].startswith(("StorageError", "NotAnImage")), answer


@pytest.mark.parametrize("kind", STRANGE)
def test_an_image_that_is_no_file_does_not_hang_or_crash(tmp_path: Path, kind: str) -> None:
    STRANGE[kind](tmp_path / "image")
    with pytest.raises((cowslice.StorageError, cowslice.NotAnImage)):
        cowslice.open(tmp_path / "image")


@peers.needs("qemu-img", "qemu-io")
def test_a_bitmap_directory_with_one_bad_record_does_not_hide_the_image(tmp_path: Path) -> None:
    made = recipes.make(replace(ORDINARY, bitmaps="several"), tmp_path)
    pointer = decode_first_cluster(made.path.read_bytes()).bitmaps
    assert pointer is not None
    with made.path.open("r+b") as file:
        file.seek(pointer.directory_offset + 12)
        file.write(struct.pack(">I", 4))
    peers.qemu_img("info", made.path, expect=1)
    with cowslice.open(made.path) as disk:
        assert made.guest.differs(disk.read(0, disk.size)) is None
        assert [bitmap.usable for bitmap in disk.bitmaps].count(False) <= 1
