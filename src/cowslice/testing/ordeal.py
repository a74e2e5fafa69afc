"""Puts spoiled images through everything that reads: open, read, map, snapshots, bitmaps, check, info.

Run as a program it does so under limits of memory and time, one mutation (a line of JSON) after another, and answers
each with one line. Whatever is in the image, a step ends with a cowslice error or with an answer; anything else ends
the program with a traceback, as do memory and time beyond the limits.
"""

from __future__ import annotations

import faulthandler
import json
import random
import resource
import sys
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any
from zlib import crc32

import cowslice
from cowslice.ops.check import check
from cowslice.ops.info import inspect
from cowslice.storage import FileStorage
from cowslice.testing.mutations import Mutation

MiB = 1 << 20
WHOLE = 64 * MiB  # a disk up to this size is read whole, of a larger one only some places
PIECE = 64 * 1024
MOST_EXTENTS = 20_000
MOST_SNAPSHOTS = 8
MEMORY = 640 * MiB  # address space above what the interpreter and its modules take: tables at their limits fit
SECONDS = 60.0  # for one mutation; most take milliseconds, a declared map of 32 MiB some seconds on a busy machine

Step = Callable[[], object]


def undergo(path: Path, secret: str | None = None) -> dict[str, str]:
    """Take every step with one image; say how each ended: "ok", or the name of the cowslice error and its message."""
    return {name: _taken(step) for name, step in _steps(path, secret)}


def described(content: bytes) -> str:
    """What the step "read" says after "ok" of a disk with these bytes, if it is not large."""
    return f"{len(content)} {crc32(content):08x}"


def _taken(step: Step) -> str:
    try:
        said = step()
    except cowslice.InternalError:
        raise
    except cowslice.CowsliceError as error:
        return f"{type(error).__name__}: {error}"
    return "ok" if said is None else f"ok {said}"


def _steps(path: Path, secret: str | None) -> Iterator[tuple[str, Step]]:
    def opened(**options: Any) -> cowslice.Image:
        return cowslice.open(path, secret=secret, l2_cache_size="256k", **options)

    def read() -> str:
        with opened(warmup="full") as disk:
            return f"{disk.size} {_checksum(disk):08x}"

    def read_map() -> None:
        with opened(warmup="off") as disk:
            for _ in islice(disk.extents(), MOST_EXTENTS):
                pass

    def read_snapshots() -> None:
        with opened(warmup="off") as disk:
            names = [snapshot.id.decode(errors="surrogateescape") for snapshot in disk.snapshots[:MOST_SNAPSHOTS]]
        for name in names:
            _taken(lambda name=name: _read_snapshot(opened, name))  # type: ignore[misc]

    def read_bitmaps() -> None:
        with opened(warmup="off", metadata_only=True) as disk:
            list(disk.bitmaps)

    def check_it() -> None:
        with FileStorage(path) as storage:
            check(storage)

    def inform() -> None:
        with FileStorage(path) as storage:
            inspect(storage)

    yield "read", read
    yield "map", read_map
    yield "snapshots", read_snapshots
    yield "bitmaps", read_bitmaps
    yield "check", check_it
    yield "info", inform


def _read_snapshot(opened: Callable[..., cowslice.Image], name: str) -> None:
    with opened(snapshot=name, warmup="off") as disk:
        _checksum(disk)


def _checksum(disk: cowslice.Image) -> int:
    """CRC of all bytes, or of the first, the last and some between where the disk is large."""
    if disk.size <= WHOLE:
        return crc32(disk.read(0, disk.size))
    chooser = random.Random(disk.size)
    places = [0, disk.size - PIECE, *(chooser.randrange(disk.size - PIECE) for _ in range(64))]
    crc = 0
    for place in places:
        crc = crc32(disk.read(place, PIECE), crc)
    return crc


def _limit() -> None:
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + MEMORY, taken + MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def main(arguments: list[str]) -> None:
    """ordeal IMAGE [SECRET]: IMAGE is overwritten again and again; mutations come by standard input."""
    path, secret = Path(arguments[0]), arguments[1] if len(arguments) > 1 else None
    image = path.read_bytes()
    mutations = [Mutation.decode(line) for line in sys.stdin]
    undergo(path, secret)  # whatever is imported late or kept for good is there before the limit is set
    _limit()
    for mutation in mutations:
        faulthandler.dump_traceback_later(SECONDS, exit=True)
        path.write_bytes(mutation.apply(image))
        print(json.dumps(undergo(path, secret)), flush=True)
    faulthandler.cancel_dump_traceback_later()


if __name__ == "__main__":
    main(sys.argv[1:])
