"""Random operations on a twin, drawn from a seed: what campaigns over crashes, faults and races play.

It does not judge: the twin does. A new operation is one function and one line of `STEPS`.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from cowslice.testing.twin import Twin
from cowslice.units import SECTOR

Step = Callable[[Twin, random.Random], object]


def span(twin: Twin, chooser: random.Random, unit: int = SECTOR) -> tuple[int, int]:
    """A span of the disk, of whole `unit`s: inside a cluster, over borders, several clusters, to the end."""
    size, cluster = twin.model.size, twin.shape.cluster_size
    near = chooser.choice((0, cluster * chooser.randrange(size // cluster), size, chooser.randrange(size)))
    offset = min(max(near + chooser.choice((-1, 0, 0, 1, 3)) * unit, 0), size - unit) // unit * unit
    length = chooser.choice((unit, 2 * unit, cluster // 2, cluster, cluster + unit, 3 * cluster))
    return offset, min(max(length // unit * unit, unit), (size - offset) // unit * unit)


def write(twin: Twin, chooser: random.Random) -> None:
    offset, length = span(twin, chooser)
    twin.write(offset, chooser.randbytes(length))


def zero(twin: Twin, chooser: random.Random) -> None:
    offset, length = span(twin, chooser)
    twin.zero(offset, length, keep=chooser.random() < 0.4)


def discard(twin: Twin, chooser: random.Random) -> None:
    twin.discard(*span(twin, chooser))


def write_compressed(twin: Twin, chooser: random.Random) -> None:
    if not twin.shape.compresses:
        return
    size = twin.shape.cluster_size
    cluster = chooser.randrange(twin.model.size // size)
    kept = chooser.choice((size // 10, size // 3, size))
    twin.write_compressed(cluster, chooser.randbytes(kept) + bytes(size - kept))


def write_many(twin: Twin, chooser: random.Random) -> None:
    places = chooser.sample(range(twin.model.size // SECTOR), 6)
    twin.write_many([place * SECTOR for place in places], SECTOR, chooser.randbytes(6 * SECTOR),
                    depth=chooser.choice((1, 3)))


def flush(twin: Twin, chooser: random.Random) -> None:
    twin.flush()


def read(twin: Twin, chooser: random.Random) -> None:
    twin.read(*span(twin, chooser))


def reopen(twin: Twin, chooser: random.Random) -> None:
    twin.reopen()


STEPS: dict[Step, int] = {
    write: 8, zero: 3, discard: 3, write_compressed: 3, write_many: 2, flush: 3, read: 2, reopen: 1,
}


def play(twin: Twin, chooser: random.Random, count: int, steps: dict[Step, int] = STEPS) -> None:
    """Take `count` steps, each as often as its weight says."""
    for step in chooser.choices(list(steps), list(steps.values()), k=count):
        step(twin, chooser)
