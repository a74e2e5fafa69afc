"""Image locks exclude and admit exactly whom QEMU's do, in both directions, against real QEMU processes."""

from __future__ import annotations

import contextlib
import fcntl
import struct
import subprocess
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from cowslice.errors import BadOption, Locked, StorageError
from cowslice.storage import FileStorage
from cowslice.storage.locks import lock_image
from cowslice.testing import peers
from cowslice.testing.peers import needs

WAYS: dict[str, dict[str, Any]] = {
    "writer": {"mode": "r+"},
    "reader": {"mode": "r"},
    "sharer": {"mode": "r", "locking": "force-share"},
    "unlocked": {"mode": "r+", "locking": False},
}
QEMU_FLAGS = {"writer": [], "reader": ["-r"], "sharer": ["-r", "-U"]}
TOGETHER = {
    frozenset({"reader"}),
    frozenset({"reader", "sharer"}),
    frozenset({"writer", "sharer"}),
    frozenset({"sharer"}),
}
BOTH = [(held, asked) for held in QEMU_FLAGS for asked in QEMU_FLAGS]


@pytest.fixture
def image(tmp_path: Path) -> Path:
    peers.require("qemu-img")
    path = tmp_path / "vm.qcow2"
    peers.qemu_img("create", "-q", "-f", "qcow2", path, "1M")
    return path


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    path = tmp_path / "plain"
    path.write_bytes(bytes(4096))
    return path


@contextlib.contextmanager
def held_by_qemu_io(path: Path, way: str) -> Iterator[None]:
    """Let a qemu-io process have the image open until the block ends."""
    peers.require("qemu-io")
    command = [peers.find("qemu-io") or "", "-f", "qcow2", *QEMU_FLAGS[way], str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(b"length\n")
        process.stdin.flush()
        assert b"1 MiB" in process.stdout.readline()
        yield
        process.stdin.close()


def open_ours(path: Path, way: str) -> FileStorage:
    return FileStorage(path, **WAYS[way])


def locks_of(path: Path) -> list[tuple[str, int]]:
    """Every locked byte of the file and how it is locked, as the kernel lists them."""
    inode, bytes_held = path.stat().st_ino, []
    for line in Path("/proc/locks").read_text().splitlines():
        fields = line.split()
        if fields[1] == "OFDLCK" and fields[5].rpartition(":")[2] == str(inode):
            bytes_held += [(fields[3], n) for n in range(int(fields[6]), int(fields[7]) + 1)]
    return sorted(bytes_held)


@needs("qemu-img", "qemu-io")
@pytest.mark.parametrize("held, asked", BOTH)
def test_what_qemu_holds_excludes_and_admits_us_as_it_does_qemu(image: Path, held: str, asked: str) -> None:
    with held_by_qemu_io(image, held):
        if frozenset({held, asked}) in TOGETHER:
            open_ours(image, asked).close()
        else:
            with pytest.raises(Locked, match=str(image)):
                open_ours(image, asked)
    open_ours(image, asked).close()


@needs("qemu-img", "qemu-io")
@pytest.mark.parametrize("held, asked", BOTH)
def test_what_we_hold_excludes_and_admits_qemu_as_it_does_us(image: Path, held: str, asked: str) -> None:
    with open_ours(image, held):
        admitted = frozenset({held, asked}) in TOGETHER
        done = peers.run("qemu-io", "-f", "qcow2", *QEMU_FLAGS[asked], "-c", "length", image, expect=None)
        assert (b"1 MiB" in done.stdout, b"lock" in done.stderr) == (admitted, not admitted)
    peers.run("qemu-io", "-f", "qcow2", *QEMU_FLAGS[asked], "-c", "length", image)


@pytest.mark.parametrize("held, asked", BOTH)
def test_we_exclude_and_admit_ourselves_the_same_way(plain: Path, held: str, asked: str) -> None:
    with open_ours(plain, held):
        if frozenset({held, asked}) in TOGETHER:
            open_ours(plain, asked).close()
        else:
            with pytest.raises(Locked):
                open_ours(plain, asked)
    open_ours(plain, asked).close()


@needs("qemu-img", "qemu-nbd")
@pytest.mark.parametrize("flags, refused", [([], ["writer", "reader"]), (["-r"], ["writer"])])
def test_an_image_that_qemu_nbd_serves_is_locked(image: Path, flags: list[str], refused: list[str]) -> None:
    with peers.qemu_nbd(image, *flags):
        for way in QEMU_FLAGS:
            if way in refused:
                with pytest.raises(Locked):
                    open_ours(image, way)
            else:
                open_ours(image, way).close()


@needs("qemu-img", "qemu-io")
@pytest.mark.parametrize("way", QEMU_FLAGS)
def test_our_locks_are_byte_for_byte_those_of_qemu(image: Path, way: str) -> None:
    with held_by_qemu_io(image, way):
        theirs = locks_of(image)
    with open_ours(image, way):
        assert locks_of(image) == theirs != []
    assert locks_of(image) == []


def test_closing_another_open_file_keeps_the_lock(plain: Path) -> None:
    with open_ours(plain, "writer"):
        open_ours(plain, "sharer").close()
        plain.open("rb").close()
        with pytest.raises(Locked):
            open_ours(plain, "writer")


def test_a_failed_opening_leaves_no_lock(plain: Path) -> None:
    with open_ours(plain, "reader"):
        before = locks_of(plain)
        with pytest.raises(Locked):
            open_ours(plain, "writer")
        assert locks_of(plain) == before


def test_without_locking_nobody_is_asked(plain: Path) -> None:
    with open_ours(plain, "writer"), open_ours(plain, "unlocked"):
        pass


def test_of_writers_that_race_never_two_win(plain: Path) -> None:
    start, done = threading.Barrier(4), threading.Barrier(4)

    def race(_: int) -> bool:
        start.wait(60)
        try:
            mine = open_ours(plain, "writer")
        except Locked:
            done.wait(60)
            return False
        with mine:
            done.wait(60)
            return True

    with ThreadPoolExecutor(4) as threads:
        for _ in range(25):
            assert sum(threads.map(race, range(4))) <= 1


def test_direct_io_locks_too(plain: Path) -> None:
    with FileStorage(plain, "r+", direct=True), pytest.raises(Locked):
        open_ours(plain, "writer")


def test_a_refusal_says_who_may_go_on_and_how(plain: Path) -> None:
    with open_ours(plain, "writer"), pytest.raises(Locked, match="for reading: it is open for writing") as reading:
        open_ours(plain, "reader")
    assert "-U" in reading.value.hint
    with open_ours(plain, "reader"), pytest.raises(Locked, match="for writing: it is open elsewhere") as writing:
        open_ours(plain, "writer")
    assert "Close the program" in writing.value.hint


def test_a_writer_cannot_share(plain: Path) -> None:
    with pytest.raises(BadOption, match="force-share"):
        FileStorage(plain, "r+", locking="force-share")


def test_an_unknown_locking_is_refused(plain: Path) -> None:
    with pytest.raises(BadOption, match="'shared'"):
        FileStorage(plain, locking="shared")  # type: ignore[arg-type]


def test_a_descriptor_that_cannot_be_locked_is_a_storage_error() -> None:
    with pytest.raises(StorageError, match="cannot lock 'gone'") as refused:
        lock_image(1 << 20, "gone", writing=False)
    assert "may not support locks" in refused.value.hint


@pytest.mark.parametrize("byte", [100, 201])
def test_a_foreign_write_lock_on_our_bytes_excludes_us(plain: Path, byte: int) -> None:
    with plain.open("r+b") as foreign:
        fcntl.fcntl(foreign, fcntl.F_OFD_SETLK, struct.pack("hhqqi0q", fcntl.F_WRLCK, 0, byte, 1, 0))
        with pytest.raises(Locked):
            open_ours(plain, "reader")
