"""Chains of model images read, by the compiled path and by the plain one, as their cells say."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

import cowslice
from cowslice.format.entries import Kind
from cowslice.format.geometry import SUBCLUSTERS, Geometry
from cowslice.format.header import CompressionType
from cowslice.image.layer import Layer
from cowslice.image.qcow2 import Qcow2Layer
from cowslice.image.reading import read_into
from cowslice.testing.model import Cell, DictSliceMap, ModelImage, build_image

PLAIN_KINDS = (Kind.UNALLOCATED, Kind.ZERO, Kind.ZERO_ALLOCATED, Kind.NORMAL, Kind.COMPRESSED)
PARTS = (Kind.UNALLOCATED, Kind.ZERO, Kind.NORMAL)


@dataclass(frozen=True, slots=True)
class ModelChain:
    """Images, top first, a raw file below them or nothing, and what the top disk must read as."""

    images: tuple[ModelImage, ...]
    raw: bytes | None = field(repr=False)
    content: bytes = field(repr=False)


@st.composite
def cells(draw: st.DrawFn, geometry: Geometry, count: int, *, compressed: bool) -> list[Cell]:
    """Runs of like clusters, as real images have them, and single odd ones."""
    found: list[Cell] = []
    while len(found) < count:
        cell = draw(_cell(geometry, compressed=compressed))
        found += [cell] * draw(st.sampled_from((1, 1, 2, 5, 40)))
    return found[:count]


@st.composite
def _cell(draw: st.DrawFn, geometry: Geometry, *, compressed: bool) -> Cell:
    if geometry.extended_l2 and draw(st.booleans()):
        runs = draw(st.lists(st.tuples(st.sampled_from(PARTS), st.integers(1, 12)), min_size=3, max_size=9))
        parts = [kind for kind, length in runs for _ in range(length)]
        return Cell(Kind.MIXED, tuple((parts * SUBCLUSTERS)[:SUBCLUSTERS]))
    kinds = PLAIN_KINDS if compressed else PLAIN_KINDS[:-1]
    if geometry.extended_l2:
        kinds = (*kinds, Kind.RESERVED)
    return Cell(draw(st.sampled_from(kinds)))


@st.composite
def images(draw: st.DrawFn, *, salt: int, backing: tuple[bytes, bytes] | None) -> ModelImage:
    extended = draw(st.booleans())
    geometry = Geometry(draw(st.sampled_from((14, 15))) if extended else draw(st.integers(9, 13)), extended)
    version = 3 if extended else draw(st.sampled_from((2, 3)))
    sectors = draw(st.integers(1, 300 if not extended else 160))
    named = b"data.bin" if version == 3 and salt == 1 and draw(st.integers(0, 3)) == 0 else b""
    size = sectors * 512
    kinds = draw(cells(geometry, geometry.clusters(size), compressed=not named))
    if version == 2:
        kinds = [Cell(Kind.NORMAL) if cell.kind in (Kind.ZERO, Kind.ZERO_ALLOCATED) else cell for cell in kinds]
    return build_image(
        geometry, kinds, size=size, salt=salt, order=draw(st.integers(0, 3)), version=version, data_file=named,
        compression=CompressionType(draw(st.integers(0, version - 2))), backing=backing)


@st.composite
def chains(draw: st.DrawFn) -> ModelChain:
    depth = draw(st.integers(1, 4))
    raw = draw(st.none() | st.integers(0, 200_000).map(lambda length: bytes(range(1, 252)) * (length // 251 + 1)))
    made = []
    for level in range(depth):
        last = level == depth - 1
        below = (b"base.raw", b"raw") if raw is not None else None
        made.append(draw(images(salt=level + 1, backing=below if last else (b"%d.qcow2" % (level + 1), b"qcow2"))))
    content = raw or b""
    for image in reversed(made):
        content = image.over(content)
    return ModelChain(tuple(made), raw, content)


@contextmanager
def written(chain: ModelChain) -> Iterator[Path]:
    """The files of the chain in a folder; yields the top one."""
    with tempfile.TemporaryDirectory(prefix="cowslice-") as name:
        folder = Path(name)
        for level, image in enumerate(chain.images):
            (folder / f"{level}.qcow2").write_bytes(image.file)
            if image.data_file:
                (folder / "data.bin").write_bytes(image.data_file)
        (folder / "data.bin").touch()
        if chain.raw is not None:
            (folder / "base.raw").write_bytes(chain.raw)
        yield folder / "0.qcow2"


def plain(layers: tuple[Layer, ...]) -> list[Layer]:
    """The same layers over slice maps that cache nothing."""
    return [_uncached(layer) if isinstance(layer, Qcow2Layer) else layer for layer in layers]


def _uncached(layer: Qcow2Layer) -> Qcow2Layer:
    slices = DictSliceMap(layer.storage, layer.geometry, layer.l1)
    return Qcow2Layer(layer.storage, layer.first, size=layer.size, l1=layer.l1, slices=slices, data=layer.data,
                      compressed=layer.compressed)


@given(chain=chains())
def test_the_whole_disk_reads_as_its_cells_say_on_both_paths(chain: ModelChain) -> None:
    with written(chain) as path, cowslice.open(path, warmup="off") as disk:
        assert disk.size == len(chain.content)
        assert disk.read(0, disk.size) == chain.content
        buffer = bytearray(disk.size)
        read_into(plain(disk.layers), 0, memoryview(buffer))
        assert buffer == chain.content


@given(chain=chains(), choices=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 70_000)), min_size=1, max_size=8))
def test_any_span_reads_as_the_whole_does(chain: ModelChain, choices: list[tuple[float, int]]) -> None:
    options = {"l2_cache_size": "64k", "l2_cache_entry_size": 512, "policy": "lru"}
    with written(chain) as path, cowslice.open(path, **options) as disk:
        for place, length in choices:
            offset = int(place * disk.size)
            length = min(length, disk.size - offset)
            assert disk.read(offset, length) == chain.content[offset : offset + length]


@given(chain=chains(), seed=st.integers(0, 99), depth=st.sampled_from((1, 3)))
def test_many_reads_at_once_are_the_single_reads(chain: ModelChain, seed: int, depth: int) -> None:
    with written(chain) as path, cowslice.open(path) as disk:
        length = min(disk.size, 700)
        offsets = np.random.default_rng(seed).integers(0, disk.size - length + 1, 150)
        out = np.empty((150, length), np.uint8)
        disk.read_many(offsets, length, out, depth=depth)
        for offset, piece in zip(offsets, out, strict=True):
            assert piece.tobytes() == chain.content[offset : offset + length]


@given(chain=chains())
def test_extents_cover_the_disk_and_tell_the_truth(chain: ModelChain) -> None:
    with written(chain) as path, cowslice.open(path) as disk:
        found = list(disk.extents())
        assert [extent.start for extent in found] == [0, *(extent.end for extent in found[:-1])]
        assert found[-1].end == disk.size
        assert not any(before.continued_by(after) for before, after in pairwise(found))
        for extent in found:
            content = chain.content[extent.start : extent.end]
            assert not extent.zero or not any(content)
            assert extent.present or extent.zero
            if extent.data and extent.offset is not None and extent.filename:
                stored = Path(extent.filename).read_bytes()[extent.offset : extent.offset + extent.length]
                assert stored.ljust(extent.length, b"\0") == content


@given(chain=chains(), places=st.tuples(st.floats(0, 1), st.floats(0, 1)))
def test_extents_of_a_part_are_the_part_of_all_extents(chain: ModelChain, places: tuple[float, float]) -> None:
    with written(chain) as path, cowslice.open(path) as disk:
        start, end = sorted(int(place * disk.size) for place in places)
        part = [(one.start, one.end, one.depth, one.data, one.zero) for one in disk.extents(start, end - start)]
        clipped = [(max(one.start, start), min(one.end, end), one.depth, one.data, one.zero)
                   for one in disk.extents() if max(one.start, start) < min(one.end, end)]
        assert part == clipped
