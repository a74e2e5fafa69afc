"""Checking and repairing takes as much memory as a window of counts, however large the image is."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

# Ten terabytes of which little is on disk: every hundredth L2 table maps one cluster, the rest is leaked.
_MAKE = """
import re, sys
from pathlib import Path
from cowslice.format.entries import COPIED
from cowslice.format.words import pack_words
from cowslice.image.createoptions import CreateOptions
from cowslice.image.creation import new_image
from cowslice.ops.check import check
from cowslice.ops.repair import repair
from cowslice.storage.file import FileStorage

path, bits, window = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
made = CreateOptions(cluster_size=1 << bits, refcount_bits=1, sync=False)
entries = made.geometry.l2_entries
with new_image(path, 10 << 40, made) as image:
    for index in range(0, made.geometry.l1_entries(10 << 40), 100):
        table, data = image.take(1), image.take(1)
        image.link(index, table, pack_words([COPIED | data << bits, *[0] * (entries - 1)]))
        image.take(100 * entries - 100)

def peak():
    return int(re.search(r"VmHWM:\\s*(\\d+) kB", Path("/proc/self/status").read_text())[1]) << 10

def lose_counts():
    with FileStorage(path, "r+") as storage:
        storage.pwrite(int.from_bytes(storage.read(48, 8), "big"), bytes(8))

begun = peak()
with FileStorage(path) as storage:
    found = check(storage, window=window)
assert found.leaks > (9 << 40) >> bits
for mode, lose in (("leaks", False), ("all", True)) if sys.argv[4] == "mend" else ():
    if lose:
        lose_counts()
    with FileStorage(path, "r+") as storage:
        done = repair(storage, mode, window=window, journal=f"{path}.{mode}")
    assert (done.after.leaks, done.after.corruptions, done.after.check_errors) == (0, 0, 0)
    assert done.rebuilt == lose
print(Path(path).stat().st_size, peak() - begun)
"""
MiB = 1 << 20


def growth(path: Path, work: str = "mend", *, bits: int, window: int) -> tuple[int, int]:
    """Length of the file, and the bytes by which the memory of the process grew while it was mended."""
    command = [sys.executable, "-c", _MAKE, str(path), str(bits), str(window), work]
    said = subprocess.run(command, capture_output=True, check=False)
    assert said.returncode == 0, said.stderr.decode()[-2000:]
    length, grown = map(int, said.stdout.split())
    return length, grown


def test_mending_ten_terabytes_takes_the_memory_of_a_window(tmp_path: Path) -> None:
    length, grown = growth(tmp_path / "disk.qcow2", bits=20, window=1 << 20)
    assert length > 9 << 40
    assert grown < 48 * MiB
    assert growth(tmp_path / "again.qcow2", "check", bits=20, window=1 << 24)[1] > 48 * MiB  # all at once does not fit


@pytest.mark.long
def test_by_default_it_takes_less_than_a_hundred_megabytes(tmp_path: Path) -> None:
    length, grown = growth(tmp_path / "disk.qcow2", bits=16, window=1 << 24)
    assert length > 9 << 40
    assert grown < 100 * MiB
