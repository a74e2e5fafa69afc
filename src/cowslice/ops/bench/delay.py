"""A fixed delay under every read of a file, the same for every program that opens it.

The file is shown through the kernel (FUSE) by an NBD server with a delay filter, so both engines open a plain path and
neither knows. Both must read unbuffered, or the page cache hides the delay.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from tempfile import TemporaryDirectory

from cowslice.errors import StorageError

_PROGRAMS = ("nbdkit", "nbdfuse", "fusermount3")
_THREADS = 64
_PATIENCE = 10.0  # seconds until the mount must be there


@contextmanager
def delayed(path: str, milliseconds: int) -> Iterator[str]:
    """Yield a path that shows `path` with every read delayed; the path itself for 0. Raises StorageError."""
    if milliseconds == 0:
        yield path
        return
    _check_programs()
    with TemporaryDirectory(prefix="cowslice-delay-") as folder:
        shown = os.path.join(folder, "disk")
        with open(shown, "wb"):
            pass  # the mount point of a single file
        with (
            _serving(path, os.path.join(folder, "socket"), milliseconds) as socket,
            _mounted(socket, shown, os.stat(path).st_size),
        ):
            yield shown


def _check_programs() -> None:
    missing = [name for name in _PROGRAMS if shutil.which(name) is None]
    if missing or not os.path.exists("/dev/fuse"):
        raise StorageError(
            f"a storage delay needs {', '.join(missing) or '/dev/fuse'}",
            hint="Debian has them in the packages nbdkit, libnbd-bin and fuse3",
        )


@contextmanager
def _serving(path: str, socket: str, milliseconds: int) -> Iterator[str]:
    server = subprocess.Popen(
        [
            "nbdkit",
            "-f",
            "-r",
            "-t",
            str(_THREADS),
            "-U",
            socket,
            "--filter=delay",
            "file",
            os.path.abspath(path),
            f"rdelay={milliseconds}ms",
        ]
    )
    try:
        _await(lambda: os.path.exists(socket), server, "nbdkit")
        yield socket
    finally:
        server.terminate()
        server.wait()


@contextmanager
def _mounted(socket: str, shown: str, size: int) -> Iterator[None]:
    client = subprocess.Popen(["nbdfuse", "-r", shown, "--unix", socket])
    try:
        _await(lambda: os.stat(shown).st_size == size, client, "nbdfuse")
        yield
    finally:
        subprocess.run(["fusermount3", "-u", shown], check=False, capture_output=True)
        client.terminate()
        client.wait()


def _await(ready: object, process: subprocess.Popen[bytes], name: str) -> None:
    """Wait until `ready()`, at most _PATIENCE seconds, unless the process ends before."""
    end = time.monotonic() + _PATIENCE
    while not ready():  # type: ignore[operator]
        if process.poll() is not None or time.monotonic() > end:
            raise StorageError(f"{name} did not come up")
        time.sleep(0.01)
