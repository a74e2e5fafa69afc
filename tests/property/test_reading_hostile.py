"""Images that lie: a clear error of ours or some bytes, never another exception, and the neighbours still read."""

from __future__ import annotations

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

import cowslice
from cowslice.format.entries import Kind, bitmap_fault, decode_entry
from cowslice.format.geometry import Geometry
from cowslice.format.header import CompressionType
from cowslice.storage import MemoryStorage
from cowslice.testing.model import Cell, ModelImage, build_image, cluster_content
from cowslice.testing.strategies import hostile_l2_words, mutated

KINDS = (Kind.NORMAL, Kind.COMPRESSED, Kind.ZERO, Kind.UNALLOCATED, Kind.ZERO_ALLOCATED)
STANDARD = Geometry(12)
EXTENDED = Geometry(14, extended_l2=True)


def sample(geometry: Geometry, *, compression: CompressionType = CompressionType.DEFLATE) -> ModelImage:
    """Ten clusters of every kind, with a piece of an eleventh."""
    cells = [Cell(kind) for kind in KINDS * 2] + [Cell(Kind.NORMAL)]
    return build_image(geometry, cells, size=10 * geometry.cluster_size + 512, order=7, compression=compression)


SAMPLES = (sample(STANDARD), sample(EXTENDED), sample(STANDARD, compression=CompressionType.ZSTD), sample(Geometry(9)))


def read_all(file: bytes) -> None:
    """Open, map and read everything; a CowsliceError ends it."""
    try:
        with cowslice.open(MemoryStorage(file), warmup="off") as disk:
            assert 0 <= disk.size < 1 << 63
            size = min(disk.size, 1 << 20)
            for step in (lambda: list(disk.extents(0, size)), lambda: disk.read(0, size), lambda: disk.snapshots,
                         lambda: disk.bitmaps, lambda: disk.read(disk.size - min(512, size), min(512, size))):
                try:
                    step()
                except cowslice.CowsliceError as error:
                    assert str(error)
    except cowslice.CowsliceError as error:
        assert str(error)


@given(data=st.data(), image=st.sampled_from(SAMPLES))
def test_damaged_images_raise_only_our_errors(data: st.DataObject, image: ModelImage) -> None:
    read_all(data.draw(mutated(image.file)))


@pytest.mark.long
@given(data=st.data(), image=st.sampled_from(SAMPLES))
def test_damaged_headers_and_tables_raise_only_our_errors(data: st.DataObject, image: ModelImage) -> None:
    """The first cluster and the L1 table are a small part of a file, so they are damaged on their own."""
    cluster = image.geometry.cluster_size
    head, rest = image.file[: 4 * cluster], image.file[4 * cluster :]
    read_all(data.draw(mutated(head[:256])).ljust(256, b"\0") + head[256:] + rest)
    read_all(head[: 3 * cluster] + data.draw(mutated(head[3 * cluster :])).ljust(cluster, b"\0") + rest)


def with_entry(image: ModelImage, cluster: int, word: int, bitmap: int) -> tuple[MemoryStorage, int]:
    """The image with one L2 entry replaced, and the host offset of that entry."""
    size = image.geometry.l2_entry_size
    with cowslice.open(MemoryStorage(image.file), warmup="off") as disk:
        place = disk.layers[0].entry_place(cluster)  # type: ignore[attr-defined]
    entry = (word.to_bytes(8, "big") + bitmap.to_bytes(8, "big"))[:size]
    return MemoryStorage(image.file[:place] + entry + image.file[place + size :]), place


@given(words=hostile_l2_words(), cluster=st.integers(0, 9), image=st.sampled_from(SAMPLES[:2]))
def test_a_bad_entry_is_refused_with_its_place_and_harms_no_neighbour(
        words: tuple[int, int], cluster: int, image: ModelImage) -> None:
    geometry = image.geometry
    word, bitmap = words[0], words[1] if geometry.extended_l2 else 0
    storage, place = with_entry(image, cluster, word, bitmap)
    try:
        decode_entry(word, bitmap, geometry)
        legal = True
    except cowslice.CorruptImage:
        legal = False
    size = geometry.cluster_size
    with cowslice.open(storage, warmup="off") as disk:
        if not legal:
            with pytest.raises(cowslice.CorruptImage) as refusal:
                disk.read(cluster * size + 5, 1)
            assert (refusal.value.structure, refusal.value.offset) == ("L2 table", place)
            assert hex(place) in str(refusal.value)
            with pytest.raises(cowslice.CorruptImage):
                list(disk.extents(cluster * size, size))
        expected = image.over(b"")
        for other in set(range(10)) - {cluster}:
            assert disk.read(other * size, size) == expected[other * size : (other + 1) * size]


@given(allocated=st.integers(0, 2**32 - 1), zero=st.integers(0, 2**32 - 1), owned=st.booleans())
def test_every_subcluster_bitmap_reads_as_the_specification_says_or_is_refused(
        allocated: int, zero: int, owned: bool) -> None:
    image = SAMPLES[1]
    with cowslice.open(MemoryStorage(image.file), warmup="off") as disk:
        host = next(iter(disk.extents(0, 1))).offset
    assert host is not None
    word, bitmap = host if owned else 0, zero << 32 | allocated
    storage, _ = with_entry(image, 0, word, bitmap)
    with cowslice.open(storage, warmup="off") as disk:
        if bitmap_fault(word, bitmap):
            with pytest.raises(cowslice.CorruptImage):
                disk.read(0, 1)
            return
        content = cluster_content(EXTENDED, 1, 0)
        for index in range(32):
            part = slice(index * 512, (index + 1) * 512)
            assert disk.read(index * 512, 512) == (content[part] if allocated >> index & 1 else bytes(512))


@given(cut=st.integers(0, 1 << 18), image=st.sampled_from(SAMPLES))
def test_a_file_cut_short_reads_as_if_zeros_followed_or_is_refused(cut: int, image: ModelImage) -> None:
    """Only a map that is cut off is refused at open; a stream that is cut off fails its own cluster."""
    assume(cut < len(image.file))
    padded = image.file[:cut].ljust(len(image.file), b"\0")
    try:
        disk = cowslice.open(MemoryStorage(image.file[:cut]), warmup="off")
    except cowslice.ImageError:
        return
    with disk, cowslice.open(MemoryStorage(padded), warmup="off") as whole:
        for offset in range(0, disk.size, image.geometry.cluster_size):
            length = min(image.geometry.cluster_size, disk.size - offset)
            assert _outcome(disk, offset, length) == _outcome(whole, offset, length)


def _outcome(disk: cowslice.Image, offset: int, length: int) -> bytes | str:
    try:
        return disk.read(offset, length)
    except cowslice.CowsliceError as error:
        return type(error).__name__


def test_a_version_2_image_with_a_zero_flag_is_corrupt() -> None:
    image = build_image(STANDARD, [Cell(Kind.NORMAL)], size=4096, version=2)
    storage, place = with_entry(image, 0, 1, 0)
    with cowslice.open(storage) as disk, pytest.raises(cowslice.CorruptImage, match="version 2") as refusal:
        disk.read(0, 1)
    assert refusal.value.offset == place


def test_a_data_file_entry_that_maps_elsewhere_is_corrupt() -> None:
    image = build_image(STANDARD, [Cell(Kind.NORMAL)] * 2, size=8192, data_file=b"d")
    storage, place = _moved(image)
    with cowslice.open(storage, data_file=MemoryStorage(image.data_file)) as disk:
        assert disk.read(0, 4096) == image.over(b"")[:4096]
        with pytest.raises(cowslice.CorruptImage, match="expected the same offset") as refusal:
            disk.read(4096, 1)
        assert refusal.value.offset == place


def _moved(image: ModelImage) -> tuple[MemoryStorage, int]:
    """The second cluster's entry points at the first cluster of the data file."""
    with cowslice.open(MemoryStorage(image.file), data_file=MemoryStorage(image.data_file)) as disk:
        place = disk.layers[0].entry_place(1)  # type: ignore[attr-defined]
    entry = (1 << 63).to_bytes(8, "big")
    return MemoryStorage(image.file[:place] + entry + image.file[place + 8 :]), place
