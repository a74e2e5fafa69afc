"""What a machine was doing when its snapshot was taken stays with the snapshot, whatever becomes of the image.

The state of a machine lies in the snapshot behind the end of its disk, where only QEMU looks: these images are made by
QEMU's programs as larger disks, whose end is then declared to be state, by the bytes of the format.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

import cowslice
from cowslice.format.snapshots import encode_snapshot_extra, encode_snapshot_table
from cowslice.image.options import OpenOptions
from cowslice.image.snapshots import load_snapshots
from cowslice.ops.amend import amend
from cowslice.ops.amendrules import Amendment
from cowslice.ops.rebase import Backing, rebase
from cowslice.storage import FileStorage
from cowslice.testing import peers
from cowslice.units import KiB

pytestmark = peers.needs("qemu-img", "qemu-io")

SPAN = 32 * KiB  # of one L2 table of clusters of 512 bytes
DISK = 3 * SPAN - 5 * KiB
WHOLE = 5 * SPAN  # with the state, which begins where the L2 table behind the disk does
STATE = 79 * 512
SIZE_AT = 24  # of the header
QCOW2 = OpenOptions(format="qcow2")

Act = Callable[[Path], object]


def begun(place: Path, compat: str) -> Path:
    """A disk with a snapshot "vm" that has state, another one without, and newer bytes."""
    path = place / "disk.qcow2"
    peers.qemu_img("create", "-q", "-f", "qcow2", "-o", f"cluster_size=512,compat={compat}", path, WHOLE)
    peers.qemu_io(path, f"write -P 1 0 {DISK}", f"write -P 7 {3 * SPAN} {STATE}", "write -P 9 97k 3k")
    peers.qemu_img("snapshot", "-c", "vm", path)
    peers.qemu_io(path, f"discard {3 * SPAN} {WHOLE - 3 * SPAN}", "write -P 2 10k 20k")
    cut(path, DISK)
    declare(path, DISK, STATE)
    peers.qemu_img("snapshot", "-c", "other", path)
    peers.qemu_io(path, "write -P 3 15k 20k")
    return path


def cut(path: Path, size: int) -> None:
    """Let the disk have `size` bytes by its header, and nothing else."""
    with FileStorage(path, "r+") as storage:
        storage.pwrite(SIZE_AT, size.to_bytes(8, "big"))


def declare(path: Path, size: int, state: int) -> None:
    """Let the disk in the snapshot "vm" have `size` bytes; what lies behind is that much state."""
    with FileStorage(path, "r+") as storage:
        with cowslice.open(path, warmup="off", force_share=True) as disk:
            header = disk.header
        assert header is not None
        small, extra = encode_snapshot_extra(vm_state_size=state, disk_size=size)
        table = [replace(one, vm_state_size_32=small, extra=extra + one.extra[16:]) if one.name == b"vm" else one
                 for one in load_snapshots(storage, header)]
        storage.pwrite(header.snapshots_offset, encode_snapshot_table(table))


def by_qemu(path: Path) -> bytes:
    """The state as QEMU finds it once it has gone back to the snapshot."""
    copy, raw = path.with_name("copy.qcow2"), path.with_name("copy.raw")
    shutil.copy(path, copy)
    peers.qemu_img("snapshot", "-a", "vm", copy)
    cut(copy, WHOLE)
    peers.qemu_img("convert", "-f", "qcow2", "-O", "raw", copy, raw)
    return raw.read_bytes()[3 * SPAN : 3 * SPAN + STATE]


def by_us(path: Path) -> bytes:
    """The same, read as a disk of that size."""
    copy = path.with_name("copy.qcow2")
    shutil.copy(path, copy)
    declare(copy, WHOLE, 0)
    with cowslice.open(copy, snapshot="vm", warmup="off") as disk:
        return disk.read(3 * SPAN, STATE)


def judge(path: Path, state: bytes) -> None:
    """Nothing is wrong, and the record and the bytes are there."""
    peers.qemu_img("check", path)
    with cowslice.open(path, warmup="off") as disk:
        assert [one.vm_state_size for one in disk.snapshots if one.name == b"vm"] == [STATE]
    assert by_us(path) == by_qemu(path) == state


def session(act: Callable[[cowslice.Image], object]) -> Act:
    def work(path: Path) -> None:
        with cowslice.open(path, "r+") as disk:
            act(disk)
    return work


def amended(path: Path, **wanted: object) -> None:
    amend(str(path), QCOW2, Amendment(**wanted))  # type: ignore[arg-type]


def rebased(path: Path) -> None:
    below = path.with_name("below")
    below.write_bytes(os.urandom(DISK))
    rebase(str(path), QCOW2, Backing("below", "raw"), unsafe=True)


ACTS: dict[str, Act] = {
    "write": session(lambda disk: disk.write(0, b"w" * DISK)),
    "vacate": session(lambda disk: disk.vacate()),
    "take another": session(lambda disk: disk.snapshot("more")),
    "delete another": session(lambda disk: disk.delete_snapshot("other")),
    "apply another": session(lambda disk: disk.apply_snapshot("other")),
    "apply": session(lambda disk: disk.apply_snapshot("vm")),
    "apply and take": session(lambda disk: (disk.apply_snapshot("vm"), disk.snapshot("more"))),
    "amend refcounts": lambda path: amended(path, refcount_bits=64),
    "amend lazy": lambda path: amended(path, lazy_refcounts=True),
    "amend to version 2": lambda path: amended(path, compat="0.10"),
    "rename what lies below": rebased,
}
OF_OTHER_SIZE: dict[str, Act] = {
    "grow": session(lambda disk: disk.resize(WHOLE)),
    "grow with clusters": session(lambda disk: disk.resize(WHOLE, preallocation="metadata")),
    "shrink": session(lambda disk: disk.resize(SPAN - 512, shrink=True)),
    "shrink and grow": session(lambda disk: (disk.resize(512, shrink=True), disk.resize(2 * WHOLE))),
}


@pytest.mark.parametrize("name", ACTS)
def test_the_state_of_a_machine_stays_with_its_snapshot(name: str, tmp_path: Path) -> None:
    path = begun(tmp_path, "1.1")
    state = by_qemu(path)
    assert len(set(state)) == 2, "made as it should be"
    ACTS[name](path)
    judge(path, state)


@pytest.mark.parametrize("name", ["take another", "delete another", "apply"])
def test_the_state_stays_in_version_2_as_well(name: str, tmp_path: Path) -> None:
    path = begun(tmp_path, "0.10")
    state = by_qemu(path)
    ACTS[name](path)
    judge(path, state)
    if name != "apply":
        amended(path, compat="1.1")
        judge(path, state)


@pytest.mark.parametrize("name", ["apply", "take another", "vacate", *OF_OTHER_SIZE])
def test_the_state_stays_where_qemu_went_back_to_it(name: str, tmp_path: Path) -> None:
    """Then the disk has the state too, behind its end, where it must not become a part of the disk."""
    path = begun(tmp_path, "1.1")
    state = by_qemu(path)
    peers.qemu_img("snapshot", "-a", "vm", path)
    {**ACTS, **OF_OTHER_SIZE}[name](path)
    with cowslice.open(path, warmup="off") as disk:
        if name not in ("rename what lies below", "vacate", "write"):
            kept = min(disk.size, DISK)
            assert disk.read(kept, disk.size - kept) == bytes(disk.size - kept)
    if disk.size <= DISK:
        judge(path, state)
    else:
        peers.qemu_img("check", path)
        assert by_us(path) == state


@pytest.mark.parametrize("name", OF_OTHER_SIZE)
def test_the_state_stays_when_the_disk_gets_another_size(name: str, tmp_path: Path) -> None:
    path = begun(tmp_path, "1.1")
    state = by_qemu(path)
    OF_OTHER_SIZE[name](path)
    judge(path, state)


@pytest.mark.parametrize("compat", ["1.1", "0.10"])
def test_a_snapshot_that_is_deleted_gives_the_space_of_its_state_back(compat: str, tmp_path: Path) -> None:
    path = begun(tmp_path, compat)
    with cowslice.open(path, "r+") as disk:
        disk.delete_snapshot("vm")
    peers.qemu_img("check", path)
