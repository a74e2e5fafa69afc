"""Threads that write one image: each finds its own bytes, and afterwards nothing is wrong with the image."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import cowslice
from cowslice.testing import peers
from cowslice.testing.modeldisk import ModelDisk
from cowslice.testing.twin import Files, Shape, judge, make_files

pytestmark = peers.needs("qemu-img")
THREADS = 4
UNIT = 1000  # of no cluster size: threads meet in their clusters
SHAPES = [
    Shape(512, guest_bytes=300_032),
    Shape(512, guest_bytes=300_032, refcount_bits=64, lazy=True),
    Shape(4096, backing="raw", guest_bytes=1_000_448),
    Shape(16384, extended_l2=True, backing="qcow2", guest_bytes=1_000_448),
    Shape(1024, 2, guest_bytes=300_032),
    Shape(4096, encryption="aes", guest_bytes=300_032),
    Shape(512, data_file="mapped", guest_bytes=300_032),
]  # fmt: skip


class Owner:
    """One thread: it owns runs of units all over the disk, and remembers what it put there."""

    def __init__(self, disk: cowslice.Image, files: Files, number: int, steps: int) -> None:
        self.disk, self.steps = disk, steps
        self.dice = random.Random(number)
        self.cluster = files.shape.cluster_size
        span = max(3 * self.cluster, 3 * UNIT) // UNIT * UNIT + UNIT
        size = files.shape.size
        self.spans = [(start, min(start + span, size)) for start in range(number * span, size, THREADS * span)]
        self.model = bytearray(files.content)
        self.forgets = files.shape.version == 3 or files.shape.backing == "none"

    def play(self) -> Owner:
        moves = [self.write, self.write, self.write, self.zero, self.discard, self.read, self.read]
        if self.cluster <= 4096 and self.disk.header and not self.disk.header.crypt_method:
            moves.append(self.compress)
        for step in range(self.steps):
            if step % 13 == 7:
                self.disk.flush()
            self.dice.choice(moves)()
        return self

    def part(self) -> tuple[int, int]:
        first, end = self.dice.choice(self.spans)
        start = self.dice.randrange(first, end)
        return start, min(end - start, self.dice.choice((1, 300, UNIT, 3 * self.cluster)))

    def whole_clusters(self, start: int, length: int) -> tuple[int, int]:
        end = start + length
        stop = end if end == self.disk.size else end // self.cluster * self.cluster
        return -(-start // self.cluster) * self.cluster, stop

    def write(self) -> None:
        start, length = self.part()
        data = self.dice.randbytes(length)
        self.disk.write(start, data)
        self.model[start : start + length] = data

    def zero(self) -> None:
        start, length = self.part()
        self.disk.zero(start, length, keep=self.dice.random() < 0.5)
        self.model[start : start + length] = bytes(length)

    def discard(self) -> None:
        start, length = self.part()
        self.disk.discard(start, length)
        first, end = self.whole_clusters(start, length)
        if first < end and self.forgets:
            self.model[first:end] = bytes(end - first)

    def compress(self) -> None:
        first, end = self.whole_clusters(*self.part())
        if first + self.cluster <= end and not (self.disk.header and self.disk.header.has_data_file):
            data = bytes([self.dice.randrange(256)]) * self.cluster
            self.disk.write_compressed(first, data)
            self.model[first : first + self.cluster] = data

    def read(self) -> None:
        start, length = self.part()
        assert self.disk.read(start, length) == self.model[start : start + length]


def check_threads(files: Files, steps: int, **options: object) -> None:
    with files.open(**options) as disk:
        with ThreadPoolExecutor(THREADS) as threads:
            owners = [Owner(disk, files, number, steps) for number in range(THREADS)]
            for one in [threads.submit(owner.play) for owner in owners]:
                one.result()
        model = ModelDisk(files.content)
        for owner in owners:
            for start, end in owner.spans:
                model.write(start, bytes(owner.model[start:end]))
        assert model.differs(0, disk.read(0, disk.size)) is None
    judge(files, model)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"{shape.cluster_size}-{shape.version}-{shape.data_file}")
def test_threads_find_what_they_wrote_and_qemu_does_too(shape: Shape, tmp_path: Path) -> None:
    check_threads(make_files(shape, tmp_path), 150, l2_cache_size=4096, l2_cache_entry_size=512)


@pytest.mark.long
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"{shape.cluster_size}-{shape.version}-{shape.data_file}")
@pytest.mark.parametrize("l2_cache_size", [1024, 1 << 20])
def test_threads_find_what_they_wrote_in_longer_lives(shape: Shape, l2_cache_size: int, tmp_path: Path) -> None:
    check_threads(make_files(shape, tmp_path), 2000, l2_cache_size=l2_cache_size, l2_cache_entry_size=512)
