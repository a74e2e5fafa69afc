"""Copying and comparing raw disks: no peer needed, every size and any number of workers."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cowslice.errors import BadOption, StorageError
from cowslice.image.image import Image, open_image
from cowslice.ops.compare import Difference, ReadFailed, compare
from cowslice.ops.convert import CHUNK, ConvertOptions, convert
from cowslice.storage.base import Storage
from cowslice.storage.memory import MemoryStorage

SECTOR = 512


class _Target:
    """Collects what is written; starts as bytes that are not zero."""

    ordered = False

    def __init__(self, size: int) -> None:
        self.bytes = bytearray(b"\xee" * size)

    def write(self, offset: int, data: memoryview) -> None:
        self.bytes[offset : offset + len(data)] = data

    def zero(self, offset: int, length: int) -> None:
        self.bytes[offset : offset + length] = bytes(length)


class _OrderedTarget(_Target):
    ordered = True

    def __init__(self) -> None:
        super().__init__(0)

    def write(self, offset: int, data: memoryview) -> None:
        assert offset == len(self.bytes)
        self.bytes += data


class _Broken(MemoryStorage):
    """Fails where a read touches one sector."""

    bad = 3 * SECTOR

    def pread(self, offset: int, buffer: memoryview) -> int:
        if offset <= self.bad < offset + len(buffer):
            raise StorageError("a sector cannot be read", errno=5)
        return super().pread(offset, buffer)


def _disk(content: bytes | Storage) -> Image:
    return open_image(MemoryStorage(content) if isinstance(content, bytes) else content, format="raw")


def _content(seed: int, sectors: int) -> bytes:
    chance = random.Random(seed)
    return b"".join(bytes(SECTOR) if chance.random() < 0.5 else chance.randbytes(SECTOR) for _ in range(sectors))


@given(seed=st.integers(0, 1000), sizes=st.lists(st.integers(0, 40), min_size=1, max_size=3),
       workers=st.integers(1, 3), sparse=st.sampled_from([0, 512, 4096]))
def test_a_copy_has_the_bytes_of_its_sources(seed: int, sizes: list[int], workers: int, sparse: int) -> None:
    contents = [_content(seed + n, sectors) for n, sectors in enumerate(sizes)]
    target, ordered = _Target(sum(sizes) * SECTOR), _OrderedTarget()
    options = ConvertOptions(workers=workers, sparse=sparse)
    disks = [_disk(content) for content in contents]
    convert(disks, target, options)
    convert(disks, ordered, options)
    assert target.bytes == ordered.bytes == b"".join(contents)


def test_a_copy_of_several_chunks_is_told_to_its_end() -> None:
    content = _content(1, 5 * CHUNK // SECTOR)
    told: list[tuple[int, int]] = []
    target = _Target(len(content))
    convert([_disk(content)], target, ConvertOptions(workers=2), progress=lambda *counts: told.append(counts))
    assert target.bytes == content
    assert told[0] == (0, len(content))
    assert told[-1] == (len(content), len(content))
    assert told == sorted(told)


def test_an_unreadable_sector_stops_the_copy() -> None:
    with pytest.raises(StorageError):
        convert([_disk(_Broken(_content(2, 8)))], _Target(8 * SECTOR), ConvertOptions(workers=2))


def test_salvage_loses_only_the_unreadable_sector() -> None:
    content = bytearray(b"\x11" * 8 * SECTOR)
    target = _Target(len(content))
    warnings: list[str] = []
    convert([_disk(_Broken(bytes(content)))], target, ConvertOptions(workers=1, salvage=True), warn=warnings.append)
    content[3 * SECTOR : 4 * SECTOR] = bytes(SECTOR)
    assert target.bytes == content
    assert len(warnings) == 1


@pytest.mark.parametrize("options", [{"sparse": 100}, {"sparse": 32 << 20}, {"workers": 17}, {"workers": -1}])
def test_impossible_options_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(BadOption):
        ConvertOptions(**options)  # type: ignore[arg-type]


@given(seed=st.integers(0, 1000), sectors=st.integers(1, 40), longer=st.integers(0, 8), workers=st.integers(1, 3),
       flips=st.lists(st.integers(0, 48 * SECTOR - 1), max_size=3))
def test_the_lowest_difference_is_found(seed: int, sectors: int, longer: int, workers: int, flips: list[int]) -> None:
    one = _content(seed, sectors)
    other = bytearray(one + bytes(longer * SECTOR))
    for flip in flips:
        other[flip % len(other)] ^= 1
    padded = one + bytes(len(other) - len(one))
    at = next((n for n in range(0, len(other), SECTOR) if padded[n : n + SECTOR] != other[n : n + SECTOR]), None)
    result = compare(_disk(one), _disk(bytes(other)), workers=workers)
    assert result.difference == (None if at is None else Difference("content", at))
    assert result.sizes_differ == (longer > 0)
    assert compare(_disk(bytes(other)), _disk(one), workers=workers) == result


def test_strict_needs_the_same_size() -> None:
    result = compare(_disk(bytes(512)), _disk(bytes(1024)), strict=True)
    assert result.difference == Difference("size", 512)


def test_an_unreadable_sector_fails_the_comparison() -> None:
    with pytest.raises(ReadFailed):
        compare(_disk(_Broken(_content(3, 8))), _disk(_content(3, 8)))


def test_overlays_of_one_file_are_compared_without_reading_it(tmp_path: Path) -> None:
    path = tmp_path / "disk.raw"
    path.write_bytes(_content(4, 64))
    with open_image(path, format="raw") as one, open_image(path, format="raw") as other:
        one.read_into = other.read_into = None  # type: ignore[method-assign, assignment]
        assert compare(one, other).difference is None
