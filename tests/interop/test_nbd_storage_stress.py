"""Many threads on one NBD storage that is closed under them: every byte right, and nothing left behind."""

from __future__ import annotations

import os
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cowslice.errors import Closed
from cowslice.storage import NbdStorage, Storage
from cowslice.testing import peers

pytestmark = [pytest.mark.long, peers.needs("qemu-nbd")]
SIZE = 16 << 20
READERS = 8
ROUNDS = 40


def read_until_closed(storage: Storage, content: bytes, seed: int) -> int:
    """Read at random until somebody closes the storage; how many reads were wrong."""
    rng, wrong = random.Random(seed), 0
    try:
        while True:
            at, length = rng.randrange(SIZE), rng.choice([1, 512, 4096, 70_000, 3 << 20])
            wrong += storage.read(at, length) != content[at : at + length].ljust(length, b"\0")
            assert sum(span.length for span in storage.extents(at, length)) == length
    except Closed:
        return wrong


def test_a_storage_closed_under_its_readers_leaves_nothing(tmp_path: Path) -> None:
    content = random.Random(1).randbytes(SIZE)
    (tmp_path / "disk").write_bytes(content)
    rng = random.Random(2)
    with peers.qemu_nbd(tmp_path / "disk", "--read-only", image_format="raw") as uri:
        before = threading.active_count(), len(os.listdir("/proc/self/fd"))
        for number in range(ROUNDS):
            storage = NbdStorage(uri)
            with ThreadPoolExecutor(READERS) as pool:
                seeds = range(number * READERS, (number + 1) * READERS)
                readers = [pool.submit(read_until_closed, storage, content, seed) for seed in seeds]
                threading.Event().wait(rng.random() / 4)
                storage.close()
                assert [one.result() for one in readers] == [0] * READERS
        assert (threading.active_count(), len(os.listdir("/proc/self/fd"))) == before
