"""A command that stays: into the background once it is ready, its process number in a file.

It does not know what the command does. What must hold: whoever waits for the command learns whether it came up.
"""

from __future__ import annotations

import fcntl
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from cowslice.cli import exitcodes
from cowslice.errors import BadOption, StorageError

READY = b"\0"


class Background:
    """This process, once it is ready: `ready()` lets the one that was started end with success."""

    def __init__(self, pipe: int) -> None:
        self._pipe = pipe

    def ready(self) -> None:
        """Let go of the terminal and of whoever waits."""
        sys.stdout.flush()
        sys.stderr.flush()
        null = os.open(os.devnull, os.O_RDWR)
        for number in range(3):
            os.dup2(null, number)
        os.close(null)
        os.write(self._pipe, READY)
        os.close(self._pipe)


def fork() -> Background:
    """Go on in a new process; the old one waits here until that is ready, or has failed, and ends with its status.

    Call it before anything starts a thread. What the new process says until it is ready goes where it always went.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        os.setsid()
        return Background(writing)
    os.close(writing)
    if os.read(reading, 1) == READY:
        os._exit(exitcodes.OK)
    _, status = os.waitpid(child, 0)
    os._exit(os.waitstatus_to_exitcode(status) & 0xFF or exitcodes.FAILED)


@contextmanager
def pid_file(path: str | None) -> Iterator[None]:
    """Keep the number of this process in a file, which is locked meanwhile and removed in the end.

    Raises BadOption where a running process holds it, StorageError where it cannot be written.
    """
    if path is None:
        yield
        return
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as fault:
        raise StorageError.of(fault, "write the pid file", path) from fault
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise BadOption(f"the pid file '{path}' belongs to a process that is running") from None
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"{os.getpid()}\n".encode())
        try:
            yield
        finally:
            with suppress(OSError):
                os.unlink(path)
    finally:
        os.close(descriptor)
