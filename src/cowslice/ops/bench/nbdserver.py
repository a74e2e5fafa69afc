"""The servers that are measured, each a process of its own: ours and QEMU's, started with the same words.

It does not know what they are asked. What must hold: both get the same cache, the same number of clients and the page
cache of the system, and both are gone at the end.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from cowslice.errors import StorageError
from cowslice.ops.bench.cells import Cell

CLIENTS = 8
_PATIENCE = 20.0  # seconds until a server must answer
_END_PATIENCE = 10.0
_OURS = (sys.executable, "-m", "cowslice.cli.main", "serve", "-q")
_NOTHING = (sys.executable, "-m", "cowslice.ops.bench.nbdceiling")
_QEMU = ("qemu-nbd",)
_WORDS = ("-t", "-e", str(CLIENTS), "--cache", "writeback")


@dataclass(frozen=True, slots=True)
class Served:
    """A running server: where it answers, and its process."""

    uri: str
    pid: int

    def cpu_seconds(self) -> float:
        """Processor time that the process and all its threads took so far, to the nanosecond."""
        return time.clock_gettime(~self.pid << 3 | 2)  # the clock that clock_getcpuclockid(3) names on Linux


def image_options(image: str, cell: Cell | None) -> tuple[str, ...]:
    """The words that open a qcow2 image, with the cache of a cell, for both servers."""
    sizes = f",l2-cache-size={cell.cache_bytes},l2-cache-entry-size={cell.entry_bytes}" if cell else ""
    escaped = image.replace(",", ",,")
    return ("--image-opts", f"driver=qcow2{sizes},file.driver=file,file.filename={escaped}")


def raw_options(path: str) -> tuple[str, ...]:
    """The words that open a raw file."""
    return ("-f", "raw", path)


@contextmanager
def our_server(words: Sequence[str], *, writable: bool = False) -> Iterator[Served]:
    """`cowslice serve`."""
    with _serving((*_OURS, *_WORDS, "--writable" if writable else "-r"), words) as served:
        yield served


@contextmanager
def peer_server(words: Sequence[str], aio: str, *, writable: bool = False) -> Iterator[Served]:
    """`qemu-nbd`, with the given way of I/O."""
    with _serving((*_QEMU, *_WORDS, *(() if writable else ("-r",)), "--aio", aio), words) as served:
        yield served


@contextmanager
def ceiling_server(size: int) -> Iterator[Served]:
    """A server that does nothing, with a disk of `size` bytes."""
    with _serving(_NOTHING, (str(size),)) as served:
        yield served


@contextmanager
def _serving(command: Sequence[str], words: Sequence[str]) -> Iterator[Served]:
    with TemporaryDirectory(prefix="cowslice-bench-") as folder, open(Path(folder, "said"), "w+b") as said:
        place = os.path.join(folder, "socket")
        process = subprocess.Popen(
            [*command, "-k", place, *words], stdin=subprocess.DEVNULL, stdout=said, stderr=said, env=_environment()
        )
        try:
            if not _comes_up(process, place):
                said.seek(0)
                reason = said.read().decode(errors="replace").strip()
                raise StorageError(f"{command[0]} does not serve: {reason or 'it says nothing'}")
            yield Served(f"nbd+unix:///?socket={place}", process.pid)
        finally:
            _end(process)


def _environment() -> dict[str, str]:
    """Our own process finds the package where this one did."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}


def _comes_up(process: subprocess.Popen[bytes], place: str) -> bool:
    """Whether it greets: a server may listen before it has opened the image."""
    end = time.monotonic() + _PATIENCE
    while process.poll() is None and time.monotonic() < end:
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as probe:
            probe.settimeout(_PATIENCE)
            probe.connect(place)
            if probe.recv(8):
                return True
        time.sleep(0.01)
    return False


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(_END_PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
