"""What every benchmark here stands on: a figure, images to measure on, and runs of ours and a peer's that alternate."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cowslice.ops.layout import write_populated_image
from cowslice.units import MiB

COWSLICE = [str(Path(sys.executable).with_name("cowslice"))]


@dataclass(frozen=True, slots=True)
class Figure:
    """One published line: what was measured, the value with its unit, and for ratios what stood on either side."""

    name: str
    value: float
    unit: str
    ours: float | None = None
    peer: float | None = None


@dataclass(frozen=True, slots=True)
class Bench:
    """Where and how big: `folder` for images, `size` of the disks in bytes, `rounds` of alternating runs."""

    folder: Path
    size: int
    rounds: int
    reads: int

    def image(self, layout: str, cluster_bits: int = 16) -> str:
        """A populated image of that layout, made when first asked for."""
        path = self.folder / f"{layout}-{cluster_bits}.qcow2"
        if not path.exists():
            write_populated_image(path, size=self.size, cluster_bits=cluster_bits, layout=layout)  # type: ignore[arg-type]
        return str(path)

    def content(self) -> str:
        """A raw file of half random, half compressible bytes, a sixteenth of it a hole."""
        path = self.folder / "content.raw"
        if not path.exists():
            _write_content(path, min(self.size // 64, 640 * MiB))
        return str(path)


def _write_content(path: Path, size: int) -> None:
    dice = np.random.default_rng(7)
    with path.open("wb") as file:
        for at in range(0, size, MiB):
            if at // MiB % 16 == 15:
                continue
            noise = dice.integers(0, 256, MiB // 2, dtype=np.uint8).tobytes()
            words = dice.integers(0, 64, MiB // 2, dtype=np.uint8).tobytes()
            file.seek(at)
            file.write(noise + words)
        file.truncate(size)


def seconds_of(command: list[str]) -> float:
    """The time that a command takes. What it says is thrown away."""
    began = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - began


def against(name: str, bench: Bench, ours: list[str], peer: list[str]) -> Figure:
    """How many times as fast as the peer a whole process is."""
    return ratio(name, bench, lambda: 1 / seconds_of(ours), lambda: 1 / seconds_of(peer), "times as fast")


def ratio(name: str, bench: Bench, ours: Callable[[], float], peer: Callable[[], float], unit: str) -> Figure:
    """Median of the rounds' own ratios; one round before the first is not counted."""
    ours(), peer()
    rounds = [(ours(), peer()) for _ in range(bench.rounds)]
    return Figure(
        name,
        statistics.median(a / b for a, b in rounds),
        unit,
        statistics.median(a for a, _ in rounds),
        statistics.median(b for _, b in rounds),
    )
