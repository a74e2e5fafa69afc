"""A populated image is clean for qemu-img, maps as its layout says and holds the bytes that it promises."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cowslice.errors import BadOption
from cowslice.format.header import decode_header
from cowslice.ops.layout import LAYOUTS, populated_content, write_populated_image
from cowslice.storage import MemoryStorage
from cowslice.testing import peers
from cowslice.units import GiB, KiB, MiB

CLUSTER_BITS = (9, 10, 12, 14, 16, 18, 21)


def image(**options: object) -> MemoryStorage:
    storage = MemoryStorage()
    write_populated_image(storage, **options)  # type: ignore[arg-type]
    return storage


def host_offsets(storage: MemoryStorage) -> list[int]:
    """Where each guest cluster lies, read straight from the L1 and L2 tables."""
    header = decode_header(storage.read(0, 112))
    geometry, found = header.geometry, []
    for index in range(header.l1_size):
        l1 = int.from_bytes(storage.read(header.l1_table_offset + index * 8, 8), "big") & ~(1 << 63)
        table = storage.read(l1, geometry.cluster_size)
        words = [table[at : at + 8] for at in range(0, geometry.cluster_size, geometry.l2_entry_size)]
        found += [int.from_bytes(word, "big") & ~(1 << 63) for word in words]
    return found[: geometry.clusters(header.size)]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("cluster_bits", CLUSTER_BITS)
@peers.needs("qemu-img")
def test_qemu_finds_nothing_to_complain_about_and_reads_the_promised_bytes(
    tmp_path: Path, cluster_bits: int, layout: str
) -> None:
    path, size = tmp_path / "image", max(3 * MiB, 5 << cluster_bits) - 512
    write_populated_image(
        path,
        size=size,
        cluster_bits=cluster_bits,
        layout=layout,  # type: ignore[arg-type]
        fragment_bytes=4 << cluster_bits,
        extended_l2=cluster_bits >= 14,
        populate=True,
        seed=7,
    )
    checked = peers.qemu_img_json("check", path)
    assert checked["allocated-clusters"] == checked["total-clusters"] == -(-size >> cluster_bits)
    peers.qemu_img("convert", "-O", "raw", path, tmp_path / "raw")
    assert (tmp_path / "raw").read_bytes() == populated_content(0, size, seed=7)


@pytest.mark.parametrize("cluster_bits", [16, 18])
@pytest.mark.parametrize("layout", LAYOUTS)
@peers.needs("qemu-img")
def test_forty_gigabytes_are_clean_and_wholly_allocated(tmp_path: Path, cluster_bits: int, layout: str) -> None:
    size = 40 * GiB if layout == "sequential" else 2 * GiB  # qemu-img check takes minutes over a large shuffled image
    made = write_populated_image(tmp_path / "image", size=size, cluster_bits=cluster_bits, layout=layout)  # type: ignore[arg-type]
    checked = peers.qemu_img_json("check", tmp_path / "image")
    assert checked["allocated-clusters"] == size >> cluster_bits
    assert checked["image-end-offset"] == made.file_bytes
    assert (tmp_path / "image").stat().st_blocks * 512 < 200 * MiB


@peers.needs("qemu-img", "qemu-io")
def test_the_sequential_layout_is_the_one_that_qemu_makes(tmp_path: Path) -> None:
    size = 9 * MiB
    made = MemoryStorage()
    write_populated_image(made, size=size, cluster_bits=12)
    peers.qemu_img("create", "-q", "-f", "qcow2", "-o", "cluster_size=4k", tmp_path / "qemu", size)
    peers.qemu_io(tmp_path / "qemu", *(f"write -q {at} {MiB}" for at in range(0, size, MiB)))
    theirs = peers.qemu_img_json("map", tmp_path / "qemu")
    ours = host_offsets(made)
    for extent in theirs:
        for at in range(0, extent["length"], 4096):
            # The table's first growth moves QEMU's blocks by a few clusters: the order and the breaks are the same.
            assert abs(ours[(extent["start"] + at) >> 12] - extent["offset"] - at) <= 2 << 12


def test_sequential_is_in_guest_order() -> None:
    offsets = host_offsets(image(size=4 * MiB, cluster_bits=9))
    assert offsets == sorted(offsets)


def test_random_uses_the_same_host_clusters_in_another_order() -> None:
    ordered = host_offsets(image(size=4 * MiB, cluster_bits=9))
    shuffled = host_offsets(image(size=4 * MiB, cluster_bits=9, layout="random", seed=1))
    assert shuffled != ordered
    assert sorted(shuffled) == ordered


def test_fragments_stay_whole_and_are_shuffled() -> None:
    offsets = host_offsets(image(size=16 * MiB, cluster_bits=14, layout="fragments", fragment_bytes=64 * KiB))
    ordered = host_offsets(image(size=16 * MiB, cluster_bits=14))
    place = {host: slot for slot, host in enumerate(ordered)}
    slots = [place[host] for host in offsets]
    assert all(slots[at + 1] == slots[at] + 1 for at in range(len(slots) - 1) if at % 4 != 3)
    assert slots != sorted(slots)


def test_the_seed_decides_the_image() -> None:
    def written(seed: int) -> bytes:
        storage = image(size=MiB, cluster_bits=9, layout="random", seed=seed)
        return storage.read(0, storage.length())

    assert written(3) == written(3) != written(4)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_progress_ends_at_the_guest_size(layout: str) -> None:
    said: list[tuple[int, int]] = []
    storage = MemoryStorage()
    write_populated_image(
        storage,
        size=9 * MiB + 512,
        layout=layout,  # type: ignore[arg-type]
        populate=True,
        on_progress=lambda done, total: said.append((done, total)),
    )
    assert said[-1] == (9 * MiB + 512, 9 * MiB + 512)
    assert said == sorted(said)


@given(offset=st.integers(0, 1 << 40), length=st.integers(0, 4096), seed=st.integers(0, 1 << 70))
@settings(deadline=None)
def test_content_of_a_span_is_the_same_however_it_is_cut(offset: int, length: int, seed: int) -> None:
    whole = populated_content(offset, length, seed=seed)
    cut = length // 3
    assert len(whole) == length
    assert populated_content(offset, cut, seed=seed) + populated_content(offset + cut, length - cut, seed=seed) == whole


def test_no_two_words_of_the_content_are_alike() -> None:
    content = populated_content(0, MiB)
    assert len({content[at : at + 8] for at in range(0, MiB, 8)}) == MiB // 8


@pytest.mark.parametrize(
    "options, named",
    [
        ({"size": 0}, "size is 0"),
        ({"size": 1000}, "size is 1000"),
        ({"size": 1 << 62}, "size is"),
        ({"size": MiB, "cluster_bits": 8}, "cluster_bits is 8"),
        ({"size": MiB, "cluster_bits": 22}, "cluster_bits is 22"),
        ({"size": MiB, "cluster_bits": 13, "extended_l2": True}, "cluster_bits is 13"),
        ({"size": MiB, "layout": "spiral"}, "layout is 'spiral'"),
        ({"size": MiB, "layout": "fragments", "fragment_bytes": 1000}, "fragment_bytes is 1000"),
    ],
)
def test_impossible_images_are_refused_before_anything_is_written(options: dict[str, object], named: str) -> None:
    storage = MemoryStorage()
    with pytest.raises(BadOption, match=named):
        write_populated_image(storage, **options)  # type: ignore[arg-type]
    assert storage.length() == 0
