"""The format against QEMU: what it writes decodes and encodes to its own bytes, and what we encode it accepts."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from cowslice.format.bitmaps import decode_bitmap_directory, encode_bitmap_directory
from cowslice.format.entries import (
    ALL_SUBCLUSTERS,
    Kind,
    decode_entry,
    encode_bitmap,
    encode_l1,
    encode_normal,
    l2_table_offset,
    subcluster_runs,
)
from cowslice.format.extensions import Extension, ExtensionType, encode_feature_names
from cowslice.format.findings import Fault
from cowslice.format.first_cluster import (
    FirstCluster,
    decode_first_cluster,
    encode_first_cluster,
    first_cluster_length,
    inspect_first_cluster,
    lay_out,
)
from cowslice.format.geometry import Geometry
from cowslice.format.header import CompressionType, Header, Incompatible
from cowslice.format.refcounts import decode_reftable, encode_reftable_entry, set_refcount, unpack_refblock
from cowslice.format.snapshots import encode_snapshot_table, unpack_snapshots
from cowslice.format.words import pack_words, unpack_words
from cowslice.testing.peers import needs, qemu_img, qemu_img_json, qemu_io

pytestmark = needs("qemu-img", "qemu-io")

SECRET = ("--object", "secret,id=s,data=open sesame")
LUKS = ("encrypt.format=luks", "encrypt.key-secret=s", "encrypt.iter-time=10")
CREATED = {
    "default": (),
    "version 2": ("compat=0.10",),
    **{f"cluster size {1 << bits}": (f"cluster_size={1 << bits}",) for bits in range(9, 22)},
    **{f"refcounts of {1 << order} bits": (f"refcount_bits={1 << order}",) for order in range(7)},
    "lazy refcounts": ("lazy_refcounts=on",),
    "zstd": ("compression_type=zstd",),
    "extended L2": ("extended_l2=on",),
    "extended L2, 16K": ("extended_l2=on", "cluster_size=16k"),
    "preallocated": ("preallocation=metadata",),
    "AES": ("encrypt.format=aes", "encrypt.key-secret=s"),
}


def create(path: Path, *options: str, size: str = "64M", more: tuple[str, ...] = ()) -> Path:
    chosen = [word for option in options for word in ("-o", option)]
    secret = SECRET if any("secret" in option for option in options) else ()
    qemu_img("create", "-q", *secret, "-f", "qcow2", *chosen, *more, path, size)
    return path


def first_of(path: Path) -> FirstCluster:
    """Decode, and hold that encoding gives the same first cluster."""
    raw = path.read_bytes()
    cluster = raw[: first_cluster_length(raw[:512])]
    first = decode_first_cluster(cluster)
    assert encode_first_cluster(first).ljust(len(cluster), b"\0") == cluster
    assert not [finding for finding in inspect_first_cluster(cluster, file_length=len(raw))[1] if finding.fatal]
    return first


@pytest.mark.parametrize("options", CREATED.values(), ids=CREATED)
def test_a_created_image_encodes_to_its_own_bytes_and_says_what_qemu_says(
    tmp_path: Path, options: tuple[str, ...]
) -> None:
    path = create(tmp_path / "i.qcow2", *options)
    header = first_of(path).header
    told = qemu_img_json("info", path)
    specific = told["format-specific"]["data"]
    assert (header.size, 1 << header.cluster_bits) == (told["virtual-size"], told["cluster-size"])
    assert {2: "0.10", 3: "1.1"}[header.version] == specific["compat"]
    assert header.geometry.refcount_bits == specific["refcount-bits"]
    assert header.extended_l2 == specific.get("extended-l2", False)
    assert bool(header.compatible) == specific.get("lazy-refcounts", False)
    assert CompressionType(header.compression_type).name == {"zlib": "DEFLATE", "zstd": "ZSTD"}[
        specific.get("compression-type", "zlib")
    ]


@pytest.mark.parametrize("order", range(7))
def test_every_cluster_of_a_new_image_is_counted_once(tmp_path: Path, order: int) -> None:
    path = create(tmp_path / "i.qcow2", f"refcount_bits={1 << order}", "cluster_size=4k")
    raw, header = path.read_bytes(), first_of(path).header
    table = raw[header.refcount_table_offset :][: header.refcount_table_clusters << header.cluster_bits]
    (offset,) = [offset for offset in decode_reftable(table) if offset]
    counts = unpack_refblock(raw[offset : offset + 4096], header.refcount_order)
    assert list(counts) == [1] * -(-len(raw) // 4096) + [0] * (len(counts) - -(-len(raw) // 4096))


def test_names_of_files_are_found(tmp_path: Path) -> None:
    create(tmp_path / "base.qcow2")
    path = create(tmp_path / "i.qcow2", more=("-b", "base.qcow2", "-F", "qcow2"))
    first = first_of(path)
    assert (first.backing_name, first.backing_format) == (b"base.qcow2", "qcow2")


@pytest.mark.parametrize("raw", ["on", "off"])
def test_the_name_of_a_data_file_is_found(tmp_path: Path, raw: str) -> None:
    path = create(tmp_path / "i.qcow2", f"data_file={tmp_path}/data", f"data_file_raw={raw}")
    first = first_of(path)
    assert first.data_file_name == f"{tmp_path}/data".encode()
    assert bool(first.header.autoclear & 2) == (raw == "on")


def test_the_luks_header_is_found(tmp_path: Path) -> None:
    path = create(tmp_path / "i.qcow2", *LUKS)
    crypto = first_of(path).crypto
    assert crypto is not None
    assert path.read_bytes()[crypto.offset :][:6] == b"LUKS\xba\xbe"


@pytest.mark.parametrize("options", [(), ("compat=0.10",), ("extended_l2=on",)])
def test_snapshots_encode_to_their_own_bytes_and_say_what_qemu_says(tmp_path: Path, options: tuple[str, ...]) -> None:
    path = create(tmp_path / "i.qcow2", *options)
    for name in ("first", "zweiter Ü"):
        qemu_img("snapshot", "-c", name, path)
    header = first_of(path).header
    table = path.read_bytes()[header.snapshots_offset :]
    snapshots, used, findings = unpack_snapshots(table, header.snapshot_count)
    assert encode_snapshot_table(snapshots)[:used] == table[:used]  # no padding behind the last one where the file ends
    assert findings == []
    told = qemu_img_json("info", path)["snapshots"]
    assert [(s.id.decode(), s.name.decode(), s.seconds, s.vm_state_size) for s in snapshots] == [
        (t["id"], t["name"], t["date-sec"], t["vm-state-size"]) for t in told
    ]
    assert {snapshot.disk_size for snapshot in snapshots} == {header.size}


def test_qemu_reads_a_snapshot_table_that_we_wrote(tmp_path: Path) -> None:
    path = create(tmp_path / "i.qcow2")
    qemu_img("snapshot", "-c", "first", path)
    raw = bytearray(path.read_bytes())
    offset = decode_first_cluster(bytes(raw)).header.snapshots_offset
    (one,), _, _ = unpack_snapshots(bytes(raw[offset:]), 1)
    table = encode_snapshot_table([replace(one, name=b"renamed", seconds=86400, extra=one.extra + b"future!!")])
    raw[offset : offset + len(table)] = table
    path.write_bytes(raw)
    (told,) = qemu_img_json("info", path)["snapshots"]
    assert (told["name"], told["date-sec"]) == ("renamed", 86400)


def test_a_bitmap_directory_encodes_to_its_own_bytes_and_says_what_qemu_says(tmp_path: Path) -> None:
    path = create(tmp_path / "i.qcow2")
    qemu_img("bitmap", "--add", "-g", "32k", path, "one")
    qemu_img("bitmap", "--add", "--disable", path, "two")
    first = first_of(path)
    pointer = first.bitmaps
    assert pointer is not None
    raw = path.read_bytes()[pointer.directory_offset :][: pointer.directory_size]
    directory = decode_bitmap_directory(raw, pointer.count, first.header.geometry, first.header.size)
    assert encode_bitmap_directory(directory) == raw
    assert directory.findings == ()
    told = qemu_img_json("info", path)["format-specific"]["data"]["bitmaps"]
    assert [(b.name.decode(), b.granularity, b.flags & 2 == 2) for b in directory.bitmaps] == [
        (t["name"], t["granularity"], "auto" in t["flags"]) for t in told
    ]


def test_a_dirty_image_is_noted_and_readable(tmp_path: Path) -> None:
    path = create(tmp_path / "i.qcow2", "lazy_refcounts=on")
    qemu_io(path, "write 0 64k", "flush", "abort", expect=None)
    first = first_of(path)
    assert first.header.is_dirty
    assert Fault.NOTE in {finding.fault for finding in inspect_first_cluster(path.read_bytes())[1]}


def entries_of(path: Path) -> list[tuple[int, int, Kind, int]]:
    """(guest offset, length, kind, host offset) of every subcluster run of the first L2 table."""
    raw, header = path.read_bytes(), first_of(path).header
    geometry = header.geometry
    (l1,) = unpack_words(raw[header.l1_table_offset :][:8])
    words = unpack_words(raw[l2_table_offset(l1, geometry) :][: geometry.cluster_size])
    step = geometry.l2_entry_size // 8
    found = []
    for index in range(16):
        word, bitmap = words[index * step], words[index * step + 1] if geometry.extended_l2 else 0
        entry = decode_entry(word, bitmap, geometry, version=header.version)
        for first, count, kind in subcluster_runs(entry, geometry):
            inside = first * geometry.subcluster_size
            host = entry.host_offset + inside if entry.host_offset >= 0 else -1
            found.append((index * geometry.cluster_size + inside, count * geometry.subcluster_size, kind, host))
    return found


@pytest.mark.parametrize("options", [(), ("extended_l2=on",), ("cluster_size=2M",)])
def test_entries_say_what_the_map_of_qemu_says(tmp_path: Path, options: tuple[str, ...]) -> None:
    path = create(tmp_path / "i.qcow2", *options)
    qemu_io(path, "write 2k 4k", "write -z 128k 64k", "write 256k 192k", "write -z 300k 64k", "write -c 0x200000 2M")
    told = qemu_img_json("map", path)
    for offset, length, kind, host in entries_of(path):
        for byte in (offset, offset + length - 1):
            (span,) = [s for s in told if s["start"] <= byte < s["start"] + s["length"]]
            assert span["data"] == (kind in (Kind.NORMAL, Kind.COMPRESSED))
            assert span["present"] == (kind not in (Kind.UNALLOCATED, Kind.RESERVED))
            if kind is Kind.NORMAL:
                assert span["offset"] + byte - span["start"] == host + byte - offset


def build(geometry: Geometry, *, version: int = 3) -> bytes:
    """A whole image made of our encoders alone: 1 MiB, with its second cluster full of 0x5a."""
    size, step = 1 << 20, geometry.cluster_size
    header = Header(
        version=version, cluster_bits=geometry.cluster_bits, size=size, l1_size=geometry.l1_entries(size),
        l1_table_offset=3 * step, refcount_table_offset=step, refcount_table_clusters=1,
        incompatible=Incompatible.EXTENDED_L2 if geometry.extended_l2 else Incompatible(0),
        refcount_order=geometry.refcount_order,
    )  # fmt: skip
    if version == 2:
        header = replace(header, header_length=72, tail=b"")
    extensions = [Extension(0xCAFE, b"kept")] + ([encode_feature_names()] if step > 4096 else [])
    block = bytearray(step)
    for index in range(6):
        set_refcount(block, index, geometry.refcount_order, 1)
    entry = [encode_normal(5 * step, copied=True)]
    hole = [0]
    if geometry.extended_l2:
        entry, hole = [*entry, encode_bitmap(ALL_SUBCLUSTERS, 0)], [0, 0]
    clusters = (
        encode_first_cluster(lay_out(header, extensions)),
        pack_words([encode_reftable_entry(2 * step)]),
        bytes(block),
        pack_words([encode_l1(4 * step, copied=True)]),
        pack_words([*hole, *entry]),
        b"\x5a" * step,
    )
    return b"".join(cluster.ljust(step, b"\0") for cluster in clusters)


BUILT = {
    "version 2": functools.partial(build, Geometry(16), version=2),
    "512-byte clusters": functools.partial(build, Geometry(9)),
    "2 MiB clusters": functools.partial(build, Geometry(21)),
    "extended L2": functools.partial(build, Geometry(14, extended_l2=True)),
    **{f"{1 << n}-bit refcounts": functools.partial(build, Geometry(16, refcount_order=n)) for n in range(7)},
}


@pytest.mark.parametrize("make", BUILT.values(), ids=BUILT)
def test_qemu_finds_no_fault_in_an_image_of_our_encoders(tmp_path: Path, make: Callable[[], bytes]) -> None:
    path = tmp_path / "i.qcow2"
    path.write_bytes(make())
    qemu_img("check", path)
    step = 1 << first_of(path).header.cluster_bits
    if step < 1 << 20:
        qemu_io(path, f"read -P 0 0 {step}", f"read -P 0x5a {step} {step}", f"read -P 0 {2 * step} {step}")


def test_unknown_extensions_survive_a_write_by_qemu(tmp_path: Path) -> None:
    path = tmp_path / "i.qcow2"
    path.write_bytes(build(Geometry(16)))
    qemu_img("amend", "-o", "lazy_refcounts=on", path)
    assert Extension(0xCAFE, b"kept") in first_of(path).extensions


def test_qemu_and_we_find_the_same_names_in_a_first_cluster(tmp_path: Path) -> None:
    path = tmp_path / "i.qcow2"
    raw = bytearray(build(Geometry(16)))
    first = decode_first_cluster(bytes(raw))
    extensions = [Extension(ExtensionType.BACKING_FORMAT, b"raw"), *first.extensions]
    start = encode_first_cluster(lay_out(first.header, extensions, b"some base.raw"))
    path.write_bytes(start.ljust(65536, b"\0") + raw[65536:])
    told = qemu_img_json("info", path)
    assert (told["backing-filename"], told["backing-filename-format"]) == ("some base.raw", "raw")
