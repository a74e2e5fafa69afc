"""Commits: how many barriers they take, whom they serve, what a failure leaves, and when space is used again."""

from __future__ import annotations

import functools
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest

import cowslice
from cowslice.image.writes import Qcow2Writes
from cowslice.ops.check import check
from cowslice.storage import CountingStorage, MemoryStorage, Storage
from cowslice.storage.wrappers import WrappedStorage
from cowslice.testing import peers
from cowslice.testing.faults import Fault, FaultyStorage, Operation

pytestmark = peers.needs("qemu-img", "qemu-io")
CLUSTER = 65536
DIRTY_BYTE = CORRUPT_BYTE = 79
TINY = {"l2_cache_size": 1024, "l2_cache_entry_size": 512, "refcount_cache_size": 2048}


@functools.cache
def image(options: str = "", size: str = "8M", commands: Sequence[str] = (), snapshot: bool = False) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "disk.qcow2")
        peers.qemu_img("create", "-q", "-f", "qcow2", *(["-o", options] if options else []), path, size)
        if commands:
            peers.qemu_io(path, *commands)
        if snapshot:
            peers.qemu_img("snapshot", "-c", "kept", path)
        return path.read_bytes()


def opened(storage: Storage, mode: str = "r+", **options: int) -> cowslice.Image:
    return cowslice.open(storage, mode, format="qcow2", warmup="off", **options)  # type: ignore[arg-type]


def host_of(disk: cowslice.Image, offset: int) -> int | None:
    return next(iter(disk.extents(offset, 512))).offset


def findings(storage: Storage) -> list[str]:
    return [str(one) for one in check(storage).findings]


@pytest.mark.parametrize("whole", [True, False])
def test_many_overwrites_of_what_a_snapshot_shares_take_two_syncs(whole: bool) -> None:
    storage = CountingStorage(MemoryStorage(image(commands=("write -P 1 0 2M",), snapshot=True)))
    with opened(storage) as disk:
        before = storage.counts().syncs
        for number in range(32):
            disk.write(number * CLUSTER, b"\2" * (CLUSTER if whole else 4096))
        assert storage.counts().syncs == before
        disk.flush()
        assert storage.counts().syncs == before + 2
    assert findings(storage) == []


def test_a_flush_of_what_was_written_in_place_takes_one_sync() -> None:
    storage = CountingStorage(MemoryStorage(image(commands=("write -P 1 0 2M",))))
    with opened(storage) as disk:
        before = storage.counts().syncs
        disk.write(0, b"\2" * CLUSTER)
        disk.flush()
        assert storage.counts().syncs == before + 1


class SlowSync(WrappedStorage):
    """The first sync after `hold` waits until it is let go."""

    def __init__(self, inner: Storage) -> None:
        super().__init__(inner)
        self.hold, self.held, self.let_go = False, threading.Event(), threading.Event()
        self.syncs = 0

    def sync(self) -> None:
        self.syncs += 1
        if self.hold and not self.held.is_set():
            self.held.set()
            assert self.let_go.wait(60)
        self.inner.sync()


def test_one_commit_serves_all_who_came_while_another_ran() -> None:
    storage = SlowSync(MemoryStorage(image(commands=("write -P 1 0 2M",))))
    with opened(storage) as disk, ThreadPoolExecutor(9) as threads:
        writes = disk._writes
        assert isinstance(writes, Qcow2Writes)
        storage.hold, storage.syncs = True, 0
        flushes = [threads.submit(disk.flush)]
        assert storage.held.wait(60)
        flushes += [threads.submit(disk.flush) for _ in range(8)]
        while len(writes.writer.commits._turn._waiters) < 8:  # type: ignore[attr-defined]
            time.sleep(0.001)
        storage.let_go.set()
        for flush in flushes:
            flush.result()
        assert storage.syncs == 2


def test_after_a_failed_sync_nothing_is_written_until_the_image_is_opened_again() -> None:
    inner = MemoryStorage(image())
    storage = FaultyStorage(inner)
    disk = opened(storage)
    disk.write(0, b"\1" * CLUSTER)
    storage.add(Fault("sync", times=1))
    with pytest.raises(cowslice.StorageError):
        disk.flush()
    content = inner.read(0, inner.length())
    for act in (disk.flush, lambda: disk.write(0, b"\2" * CLUSTER), lambda: disk.write(5 * CLUSTER, b"\2"),
                lambda: disk.zero(0, CLUSTER), lambda: disk.discard(0, CLUSTER),
                lambda: disk.write_compressed(0, bytes(CLUSTER)), disk.close):
        with pytest.raises(cowslice.StorageError, match="no more writes"):
            act()
    assert inner.read(0, inner.length()) == content
    with opened(inner) as again:
        again.write(0, b"\3" * CLUSTER)


@pytest.mark.parametrize("skip", range(4))
def test_a_flush_that_could_not_write_is_made_good_by_the_next(skip: int) -> None:
    inner = MemoryStorage(image(options="cluster_size=512", size="256k", commands=("write -P 1 0 64k",), snapshot=True))
    storage = FaultyStorage(inner)
    with opened(storage) as disk:
        disk.write(0, b"\2" * 100_000)
        disk.discard(150_000, 40_000)
        disk.zero(512, 512)
        storage.add(Fault("pwrite", skip=skip, times=1))
        with pytest.raises(cowslice.StorageError):
            disk.flush()
        storage.heal()
        disk.write(200_000, b"\3" * 5000)
        disk.flush()
        stable = MemoryStorage(inner.read(0, inner.length()))
    for storage in (stable, inner):
        with opened(storage, "r") as disk:
            assert disk.read(0, 100_000) == b"\2" * 512 + bytes(512) + b"\2" * (100_000 - 1024)
            assert disk.read(200_000, 5000) == b"\3" * 5000
        assert check(storage).corruptions == 0
    assert findings(inner) == []


ACTS: dict[str, Callable[[cowslice.Image, int], object]] = {
    "write": lambda disk, at: disk.write(at, b"\2" * 3000),
    "write clusters": lambda disk, at: disk.write(at // 512 * 512, b"\2" * 2560),
    "write compressed": lambda disk, at: disk.write_compressed(at // 512 * 512, b"\2" * 2560),
    "zero": lambda disk, at: disk.zero(at, 3000),
    "discard": lambda disk, at: disk.discard(at, 3000),
}


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("operation", ["pwrite", "pread", "zero"])
@pytest.mark.parametrize("skip", range(8))
def test_a_request_that_fails_costs_no_space(act: str, operation: Operation, skip: int) -> None:
    inner = MemoryStorage(image(options="cluster_size=512", size="256k", commands=("write -P 1 0 64k",), snapshot=True))
    storage = FaultyStorage(inner)
    with opened(storage, **TINY) as disk:
        storage.add(Fault(operation, skip=skip, times=2))  # a map tries again once
        for offset in (300, 40_000, 90_000):
            with suppress(cowslice.StorageError):
                ACTS[act](disk, offset)
        storage.heal()
    assert findings(inner) == []


@pytest.mark.parametrize("skip", range(0, 24, 3))
def test_a_flush_that_could_not_read_counts_forgets_no_drop(skip: int) -> None:
    """Ten refcount blocks, room for four: some are read again when the clusters that were dropped are counted."""
    inner = MemoryStorage(image(options="cluster_size=512", size="2M", commands=("write -P 1 0 1M",)))
    storage = FaultyStorage(inner)
    with opened(storage, **TINY) as disk:
        disk.discard(0, 1 << 20)
        disk.write(1 << 20, b"\2" * 5000)
        storage.add(Fault("pread", skip=skip, times=2))
        for _ in range(3):
            with suppress(cowslice.StorageError):
                disk.flush()
        storage.heal()
    assert findings(inner) == []


def test_space_is_not_used_again_before_its_discard_is_stable() -> None:
    with opened(MemoryStorage(image(commands=("write -P 1 0 256k",)))) as disk:
        freed = host_of(disk, 0)
        disk.discard(0, CLUSTER)
        disk.write(1 << 20, b"\2" * CLUSTER)
        assert host_of(disk, 1 << 20) != freed
        disk.flush()
        disk.write(2 << 20, b"\3" * CLUSTER)
        assert host_of(disk, 2 << 20) == freed


def test_space_is_not_used_again_while_a_request_may_know_it() -> None:
    with opened(MemoryStorage(image(commands=("write -P 1 0 256k",)))) as disk:
        writes = disk._writes
        assert isinstance(writes, Qcow2Writes)
        freed, entered, leave = host_of(disk, 0), threading.Event(), threading.Event()

        def linger() -> None:
            with writes.request():
                entered.set()
                assert leave.wait(60)

        thread = threading.Thread(target=linger)
        thread.start()
        assert entered.wait(60)
        disk.discard(0, CLUSTER)
        disk.flush()
        disk.write(1 << 20, b"\2" * CLUSTER)
        leave.set()
        thread.join()
        assert host_of(disk, 1 << 20) != freed
        disk.write(2 << 20, b"\3" * CLUSTER)
        assert host_of(disk, 2 << 20) == freed


def test_what_is_used_again_does_not_show_what_was_there() -> None:
    """At the end of the file clusters read as zeros by themselves, but only the first time."""
    with opened(MemoryStorage(image())) as disk:
        disk.write_compressed(0, b"x" * CLUSTER)
        for _ in range(2):
            disk.zero(0, CLUSTER)
            disk.flush()
        for number in range(1, 4):
            disk.write(number * CLUSTER, b"\1")
            assert disk.read(number * CLUSTER, CLUSTER) == b"\1" + bytes(CLUSTER - 1)


def test_a_discard_that_cannot_be_told_the_storage_fails_nothing() -> None:
    inner = MemoryStorage(image(commands=("write -P 1 0 256k",)))
    with opened(FaultyStorage(inner, Fault("discard"))) as disk:
        disk.discard(0, 2 * CLUSTER)
        disk.flush()
        disk.write(0, b"\2" * CLUSTER)
    assert findings(inner) == []


@pytest.mark.parametrize("lazy", ["off", "on"])
@pytest.mark.parametrize("flushes", [False, True])
@pytest.mark.parametrize("room", [2048, 1 << 20])
def test_refcount_tables_that_were_outgrown_are_given_back(lazy: str, flushes: bool, room: int) -> None:
    storage = MemoryStorage(image(options=f"cluster_size=512,refcount_bits=64,lazy_refcounts={lazy}", size="8M"))
    with opened(storage, refcount_cache_size=room) as disk:
        for number in range(7):
            disk.write(number << 20, bytes([number + 1]) * (1 << 20))
            if flushes:
                disk.flush()
    assert findings(storage) == []
    with opened(storage) as disk:
        assert all(disk.read(number << 20, 4096) == bytes([number + 1]) * 4096 for number in range(7))


def test_a_table_that_only_looked_shared_is_given_back() -> None:
    """Its L1 entry is not COPIED though nothing else refers to it: its cluster becomes free for anything."""
    content = bytearray(image(commands=("write -P 1 0 256k",)))
    l1 = int.from_bytes(content[40:48], "big")
    content[l1] &= 0x7F
    storage = MemoryStorage(content)
    with opened(storage) as disk:
        for number in range(4):
            disk.write(number << 20, b"\2" * (1 << 20))
            disk.flush()
        assert disk.read(0, 4 << 20) == b"\2" * (4 << 20)
    assert findings(storage) == []


def test_lazy_counts_are_announced_on_disk_before_and_true_after() -> None:
    storage = MemoryStorage(image(options="lazy_refcounts=on"))
    with opened(storage) as disk:
        assert not storage.read(DIRTY_BYTE, 1)[0]
        disk.write(0, b"\1" * CLUSTER)
        disk.flush()
        assert storage.read(DIRTY_BYTE, 1)[0] == 1
    assert not storage.read(DIRTY_BYTE, 1)[0]
    assert findings(storage) == []


def test_qemu_repairs_lazy_counts_that_were_never_written(tmp_path: Path) -> None:
    storage = MemoryStorage(image(options="lazy_refcounts=on,cluster_size=4096"))
    with opened(storage) as disk:
        disk.write(0, b"\1" * (3 << 20))
        disk.discard(1 << 20, 1 << 20)
        disk.flush()
        path = tmp_path / "killed"
        path.write_bytes(storage.read(0, storage.length()))
    peers.qemu_img("check", "-r", "all", path, expect=(0, 2, 3))
    peers.qemu_img("check", path)
    with cowslice.open(path, "r+") as disk:
        assert disk.read(0, 3 << 20) == b"\1" * (1 << 20) + bytes(1 << 20) + b"\1" * (1 << 20)


def test_an_image_that_is_refused_is_not_kept_locked(tmp_path: Path) -> None:
    content, path = bytearray(image()), tmp_path / "disk"
    content[CORRUPT_BYTE] |= 2
    path.write_bytes(content)
    with pytest.raises(cowslice.CorruptImage) as fault:
        cowslice.open(path, "r+")
    peers.qemu_img("check", "-r", "all", path)  # though the error is still held
    assert "marked corrupt" in str(fault.value)
