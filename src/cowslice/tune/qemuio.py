"""QEMU itself, through `qemu-io`: reads that it is told, how long they took, how often it read its map.

It knows the program's words and nothing of traces or forecasts. What must hold: images are opened read only, a
passphrase stands on no command line, and what the program needs to start, to open and to end is not timed.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import IO

from cowslice.errors import StorageError

TOOL = "qemu-io"
_MISS = re.compile(rb"^qcow2_cache_get_read .*is_l2_cache 1 ", re.M)
_MISS_EVENT = "qcow2_cache_get_read"
_ASK = b"length\n"  # answered by one line: then the program has done all that it was told before
_PROMPT = b"qemu-io> "
_PATIENCE = 600.0  # seconds that one replay may take


@dataclass(frozen=True, slots=True)
class Replayed:
    """`requests` reads took `seconds`; `misses` is how often a piece of the L2 tables was read, None if not counted."""

    requests: int
    seconds: float
    misses: int | None = None

    @property
    def rate(self) -> float:
        return self.requests / self.seconds


@dataclass(frozen=True, slots=True)
class Key:
    """What opens an encrypted image: its `format` in QEMU's words, "luks" or "aes", and the passphrase."""

    format: str
    secret: bytes


def version() -> str:
    """The first line of what the program says of itself, or '' where it is not installed."""
    if shutil.which(TOOL) is None:
        return ""
    shown = subprocess.run([TOOL, "--version"], capture_output=True, text=True, check=False)
    return shown.stdout.partition("\n")[0]


def raw_target(path: str, *, direct: bool) -> str:
    """The bytes of a file as they are."""
    return f"driver=raw,{_file(path, direct)}"


def qcow2_target(path: str, *, cache_bytes: int, entry_bytes: int, direct: bool) -> str:
    """An image with that L2 cache. What it names is not opened: only its own map is measured."""
    return (f"driver=qcow2,l2-cache-size={cache_bytes},l2-cache-entry-size={entry_bytes},backing=,"
            f"{_file(path, direct)}")


def null_target(size: int) -> str:
    """A disk that answers at once: what is left is the program's own work."""
    return f"driver=null-co,size={size}"


def replay(target: str, spans: Iterable[tuple[int, int]], *, depth: int, count: bool = False,
           key: Key | None = None) -> Replayed:
    """Read all (offset, length) of `spans` in order, `depth` at once, from a cold start. Raises StorageError."""
    commands, requests = _commands(spans, depth)
    with _running(target, ("-T", _MISS_EVENT) if count else (), key) as program:
        took = program.seconds(commands)
        said = program.complaints()
    misses = len(_MISS.findall(said)) if count else 0
    # A program built without tracing says nothing; a cold cache that read nothing would be no cache.
    return Replayed(requests, max(took, 1e-6), misses if misses else None)


def _commands(spans: Iterable[tuple[int, int]], depth: int) -> tuple[bytes, int]:
    """What is typed into the program: alone each read is waited for, else `depth` of them at a time."""
    lines: list[str] = []
    number = 0
    for number, (offset, length) in enumerate(spans, 1):
        lines.append(f"{'aio_read' if depth > 1 else 'read'} -q {offset} {length}")
        if depth > 1 and number % depth == 0:
            lines.append("aio_flush")
    lines += ["aio_flush", ""]
    return "\n".join(lines).encode(), number


class _Program:
    """The program with its target open, waiting to be told."""

    def __init__(self, process: subprocess.Popen[bytes], errors: IO[bytes]) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self._process = process
        self._errors = errors
        self._input = process.stdin
        self._output = process.stdout

    def seconds(self, commands: bytes) -> float:
        """How long these commands took."""
        with suppress(BrokenPipeError):  # it has ended: what it said tells why
            self._input.write(_ASK)
            self._input.flush()
        answer = _told(self._output.readline())
        # All at once and to the end: the program looks for more only when its input has some, or has ended.
        teller = threading.Thread(target=self._tell, args=(commands + _ASK,), daemon=True)
        began = ended = time.perf_counter()
        teller.start()
        said = []
        for line in self._output:
            ended = time.perf_counter() if _told(line) else ended
            said.append(_told(line))
        teller.join()
        if self._process.wait() or [line for line in said if line] != [answer]:
            raise self._failure(answer, said)
        return ended - began

    def complaints(self) -> bytes:
        """All that it wrote to standard error."""
        self._errors.seek(0)
        return self._errors.read()

    def _tell(self, text: bytes) -> None:
        with suppress(OSError):
            self._input.write(text)
            self._input.close()

    def _failure(self, answer: bytes, said: list[bytes]) -> StorageError:
        if self._process.returncode < 0:
            return StorageError(f"{TOOL} took more than {_PATIENCE:.0f} seconds, expected an end before")
        told = [line for line in (*said, *self.complaints().splitlines())
                if line not in (b"", answer) and b"warning:" not in line]
        why = told[0] if told else b"status %d" % self._process.returncode
        return StorageError(f"{TOOL} could not read: {why.decode(errors='replace')}")


def _told(line: bytes) -> bytes:
    """A line without the prompts that stand before it."""
    return line.replace(_PROMPT, b"").strip()


@contextmanager
def _running(target: str, options: tuple[str, ...], key: Key | None) -> Iterator[_Program]:
    with tempfile.TemporaryFile() as errors, _secret_file(key) as (secret, descriptors):
        opened = f"{target},encrypt.format={key.format},encrypt.key-secret=key" if key else target
        try:
            process = subprocess.Popen([TOOL, *options, *secret, "-r", "-U", "--image-opts", opened],
                                       stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors,
                                       pass_fds=descriptors)
        except OSError as error:
            raise StorageError.of(error, "run", TOOL) from error
        patience = threading.Timer(_PATIENCE, process.kill)
        patience.start()
        try:
            yield _Program(process, errors)
        finally:
            patience.cancel()
            process.kill()
            for pipe in (process.stdin, process.stdout):
                with suppress(OSError):
                    assert pipe is not None
                    pipe.close()
            process.wait()


@contextmanager
def _secret_file(key: Key | None) -> Iterator[tuple[tuple[str, ...], tuple[int, ...]]]:
    """(options, descriptors) that give the program a passphrase which nobody else can see."""
    if key is None:
        yield (), ()
        return
    handle = os.memfd_create("cowslice-key")
    try:
        os.write(handle, key.secret)
        yield ("--object", f"secret,id=key,file=/dev/fd/{handle}"), (handle,)
    finally:
        os.close(handle)


def _file(path: str, direct: bool) -> str:
    switches = ",cache.direct=on,file.cache.direct=on" if direct else ""
    return f"file.driver=file,file.filename={path.replace(',', ',,')}{switches}"
