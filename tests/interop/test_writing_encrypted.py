"""Encrypted images that we write: QEMU finds nothing wrong, reads the same bytes with the key, and writes on."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from cowslice.testing import peers, steps
from cowslice.testing.modeldisk import ModelDisk
from cowslice.testing.twin import Shape, Twin, judge, make_files

pytestmark = peers.needs("qemu-img", "qemu-io")
LUKS = [
    Shape(65536, encryption="luks", extended_l2=True, backing="qcow2"),
    Shape(4096, encryption="luks", data_file="mapped"),
]  # fmt: skip
SHAPES = [
    Shape(4096, encryption="aes"),
    Shape(16384, encryption="aes", extended_l2=True, backing="qcow2"),
    Shape(512, encryption="luks", backing="short"),
    *(pytest.param(shape, marks=pytest.mark.long) for shape in LUKS),  # each key takes seconds to derive
]
STEPS = {step: weight for step, weight in steps.STEPS.items() if step is not steps.reopen}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_qemu_reads_what_we_enciphered(shape: Shape, tmp_path: Path) -> None:
    files = make_files(shape, tmp_path)
    model = ModelDisk(files.content)
    twin = Twin(shape, model, files.open)
    steps.play(twin, random.Random(1), 60, STEPS)
    twin.read_all()
    twin.close()
    judge(files, model)


@pytest.mark.long
def test_qemu_and_we_write_the_same_sectors_in_turn(tmp_path: Path) -> None:
    files = make_files(Shape(4096, encryption="luks"), tmp_path)
    model = ModelDisk(files.content)
    for turn in range(3):
        twin = Twin(files.shape, model, files.open)
        twin.write(700 + 512 * turn, bytes([turn + 1]) * 9000)
        twin.close()
        offset = 4096 + 512 * turn
        peers.run("qemu-io", *files.source, "-c", f"write -P {turn + 100} {offset} 1k")
        model.write(offset, bytes([turn + 100]) * 1024)
    judge(files, model)
