"""Evidence that advice can rest on: a small image, made-up requests, the storage of the published tables."""

from __future__ import annotations

from pathlib import Path

import numpy as np

import cowslice
from cowslice.ops.layout import Layout, write_populated_image
from cowslice.tune.advise import Evidence
from cowslice.tune.calibrate import parse_device
from cowslice.tune.requests import Requests
from cowslice.tune.study import Setting, gather
from cowslice.units import GiB

SEED = "read4k=177.2us,read64k=423.2us,rate4k=56700,rate64k=8090,cpu=12.6us"
SIZE = 8 * GiB  # 1 MiB of L2 tables at 64 KiB clusters, 256 slices of 4 KiB


def requests(places: np.ndarray, size: int = SIZE) -> list[Requests]:
    """Reads of 4 KiB at these blocks of the disk, modulo its size."""
    count = len(places)
    offsets = (places % (size // 4096) * 4096).astype(np.uint64)
    return [Requests(np.arange(count) / 1000, np.zeros(count, np.uint8), offsets, np.full(count, 4096, np.uint64))]


def uniform(count: int = 20_000, size: int = SIZE) -> list[Requests]:
    return requests(np.random.default_rng(1).integers(0, size // 4096, count), size)


def loop(share: float, count: int = 20_000) -> list[Requests]:
    """Over the first part of the disk, again and again, in steps of a slice."""
    slices = int(256 * share)
    return requests(np.arange(count) % slices * (SIZE // 4096 // 256))


def gathered(folder: Path, made: list[Requests], *, layout: Layout = "sequential", **today: str) -> Evidence:
    path = folder / f"{layout}.qcow2"
    if not path.exists():
        write_populated_image(path, size=SIZE, layout=layout)
    with cowslice.open(path, warmup="off") as disk:
        return gather(disk, made, calibration=parse_device(SEED), today=Setting(**today), source="made up", name="vm")
