"""Images of many geometries, written at random by us: QEMU finds nothing wrong and reads the same bytes."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

import cowslice
from cowslice.testing import peers

pytestmark = peers.needs("qemu-img")
SIZE = 3 << 20
BACKED = 2 << 20

GRID = [
    ("cluster_size=65536", 65536, False),
    ("cluster_size=512", 512, False),
    ("cluster_size=4096,refcount_bits=64", 4096, True),
    ("cluster_size=65536,extended_l2=on", 65536, False),
    ("cluster_size=16384,extended_l2=on", 16384, True),
    ("compat=0.10,cluster_size=4096", 4096, False),
    ("compat=0.10,cluster_size=4096", 4096, True),
    ("cluster_size=1024,refcount_bits=2,lazy_refcounts=on", 1024, False),
    ("cluster_size=65536,refcount_bits=1", 65536, True),
    ("cluster_size=2097152", 2097152, True),
    ("cluster_size=65536,data_file={folder}/data", 65536, False),
    ("cluster_size=16384,extended_l2=on,data_file={folder}/data,data_file_raw=on", 16384, False),
]  # fmt: skip


class Twin:
    """An image and a byte array that take the same random requests."""

    def __init__(self, path: Path, content: bytes, cluster: int, *, old: bool, compresses: bool, seed: int) -> None:
        self.path = path
        self.model = bytearray(content)
        self.cluster = cluster
        self.random = random.Random(seed)
        self.blanks = not old  # version 2 cannot say that a cluster over a backing file reads as zeros
        self.disk = cowslice.open(path, "r+")
        self.steps = [self.write, self.write, self.write_clusters, self.zero, self.discard, self.flush, self.reopen]
        if compresses:
            self.steps.append(self.compress)

    def play(self, steps: int) -> None:
        for _ in range(steps):
            self.random.choice(self.steps)()
            offset = self.random.randrange(SIZE - 5000)
            assert self.disk.read(offset, 5000) == self.model[offset : offset + 5000]
        self.disk.close()

    def write(self) -> None:
        offset = self.random.randrange(SIZE)
        self._put(offset, self.random.choice((1, 512, 4096, self.cluster, 3 * self.cluster + 17)))

    def write_clusters(self) -> None:
        self._put(self._aligned(), self.cluster * self.random.randint(1, 5))

    def zero(self) -> None:
        offset = self.random.randrange(SIZE)
        length = min(SIZE - offset, self.random.choice((700, self.cluster, 5 * self.cluster)))
        self.disk.zero(offset, length, keep=self.random.random() < 0.3)
        self.model[offset : offset + length] = bytes(length)

    def discard(self) -> None:
        offset = self.random.randrange(SIZE)
        end = min(SIZE, offset + self.random.choice((700, 2 * self.cluster, 9 * self.cluster)))
        self.disk.discard(offset, end - offset)
        start = -(-offset // self.cluster) * self.cluster
        stop = end if end == SIZE else end // self.cluster * self.cluster
        if self.blanks and start < stop:
            self.model[start:stop] = bytes(stop - start)

    def compress(self) -> None:
        offset = self._aligned()
        length = min(self.cluster, SIZE - offset)
        data = (self.random.randbytes(16) * (length // 16 + 1))[:length]
        self.disk.write_compressed(offset, data)
        self.model[offset : offset + length] = data

    def flush(self) -> None:
        self.disk.flush()

    def reopen(self) -> None:
        self.disk.close()
        self.disk = cowslice.open(self.path, "r+")

    def _aligned(self) -> int:
        return self.random.randrange(SIZE) // self.cluster * self.cluster

    def _put(self, offset: int, length: int) -> None:
        data = self.random.randbytes(min(SIZE - offset, length))
        self.disk.write(offset, data)
        self.model[offset : offset + len(data)] = data


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("options, cluster, backed", GRID)
def test_qemu_finds_what_was_written(tmp_path: Path, options: str, cluster: int, backed: bool, seed: int) -> None:
    path, content = tmp_path / "disk.qcow2", bytes(SIZE)
    arguments = ["create", "-q", "-f", "qcow2", "-o", options.format(folder=tmp_path)]
    if backed:
        below = random.Random(seed).randbytes(BACKED)
        (tmp_path / "below.raw").write_bytes(below)
        content = below + bytes(SIZE - BACKED)
        arguments += ["-b", str(tmp_path / "below.raw"), "-F", "raw"]
    peers.run("qemu-img", *arguments, str(path), str(SIZE))
    old = "compat=0.10" in options
    twin = Twin(path, content, cluster, old=old and backed, compresses="data_file" not in options, seed=seed)
    twin.play(40)
    peers.run("qemu-img", "check", str(path))
    peers.run("qemu-img", "convert", "-O", "raw", str(path), str(tmp_path / "read.raw"))
    assert (tmp_path / "read.raw").read_bytes() == bytes(twin.model)
