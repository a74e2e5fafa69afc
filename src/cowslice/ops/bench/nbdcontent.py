"""Images with real bytes in them, for what depends on bytes: copying, and decompressing.

It does not know who reads them.
"""

from __future__ import annotations

import os
import subprocess

import numpy as np

from cowslice.errors import StorageError
from cowslice.ops.layout import write_populated_image
from cowslice.units import MiB


def write_plain(path: str, size: int, seed: int) -> None:
    """A plain image of `size` bytes, all of them there and no two words alike."""
    write_populated_image(path, size=size, populate=True, seed=seed)


def write_compressed(path: str, size: int, seed: int) -> None:
    """An image of deflated clusters, made by `qemu-img convert -c`: text-like bytes that shrink to about half."""
    raw = path + ".raw"
    try:
        _write_words(raw, size, seed)
        command = ["qemu-img", "convert", "-f", "raw", "-O", "qcow2", "-c", raw, path]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise StorageError(f"qemu-img cannot compress: {done.stderr.strip()}")
    finally:
        if os.path.exists(raw):
            os.unlink(raw)


def _write_words(path: str, size: int, seed: int) -> None:
    """Words of four bytes in an order without pattern, out of a vocabulary that the window of 4 KiB sees whole."""
    dice = np.random.default_rng(seed)
    vocabulary = dice.integers(0, 256, (512, 4), dtype=np.uint8)
    with open(path, "wb") as file:
        for at in range(0, size, MiB):
            chosen = dice.integers(0, len(vocabulary), min(MiB, size - at) // 4 + 1)
            file.write(vocabulary[chosen].tobytes()[: size - at][:MiB])
