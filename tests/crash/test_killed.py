"""A writing process is killed, again and again, on one image: clusters may leak, nothing is corrupt."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from cowslice.testing import peers
from cowslice.testing.twin import Files, Shape, make_files

UNIT = 512
_WRITER = """
import random, sys, cowslice
path, seed = sys.argv[1], int(sys.argv[2])
chooser = random.Random(seed)
with cowslice.open(path, "r+") as disk:
    for step in range(1, 1 << 30):
        unit = chooser.randrange(disk.size // 512)
        disk.write(unit * 512, step.to_bytes(4, "big") * 128)
        if step % 5 == 0:
            disk.discard(chooser.randrange(disk.size - 100_000), 100_000) if step % 20 == 0 else disk.flush()
            print(step, flush=True)
"""


def kill_again_and_again(files: Files, times: int) -> None:
    chooser = random.Random(times)
    for number in range(times):
        command = [sys.executable, "-c", _WRITER, str(files.image), str(number)]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as writer:
            assert writer.stdout is not None
            for _ in range(chooser.randrange(1, 120)):
                assert writer.stdout.readline()
            writer.send_signal(signal.SIGKILL)
        files.check(leaks=True)


@pytest.mark.parametrize("shape", [Shape(512), Shape(65536, extended_l2=True, backing="raw")], ids=str)
@peers.needs("qemu-img")
def test_a_killed_writer_leaves_at_worst_leaks(shape: Shape, tmp_path: Path) -> None:
    kill_again_and_again(make_files(shape, tmp_path), 4)


@pytest.mark.long
@pytest.mark.parametrize("shape", [Shape(512), Shape(65536, extended_l2=True, backing="raw")], ids=str)
@peers.needs("qemu-img")
def test_a_writer_that_is_killed_two_hundred_times_leaves_at_worst_leaks(shape: Shape, tmp_path: Path) -> None:
    kill_again_and_again(make_files(shape, tmp_path), 200)
