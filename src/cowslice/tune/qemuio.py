"""QEMU itself, through `qemu-io`: reads that it is told, how long they took, how often it read its map.

It knows the program's words and nothing of traces or forecasts. What must hold: images are opened read only, and what
the program needs to start and to understand a command is not counted as reading.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import time
from collections.abc import Iterable
from dataclasses import dataclass

from cowslice.errors import StorageError

TOOL = "qemu-io"
_MISS = re.compile(rb"^qcow2_cache_get_read .*is_l2_cache 1 ", re.M)
_MISS_EVENT = "qcow2_cache_get_read"
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


def replay(target: str, spans: Iterable[tuple[int, int]], *, depth: int, count: bool = False) -> Replayed:
    """Read all (offset, length) of `spans` in order, `depth` at once, from a cold start. Raises StorageError."""
    commands, requests = _commands(spans, depth)
    start = _seconds(target, b"quit\n", ())[0]
    took, said = _seconds(target, commands, ("-T", _MISS_EVENT) if count else ())
    misses = len(_MISS.findall(said)) if count else 0
    # A program built without tracing says nothing; a cold cache that read nothing would be no cache.
    return Replayed(requests, max(took - start, 1e-6), misses if misses else None)


def _commands(spans: Iterable[tuple[int, int]], depth: int) -> tuple[bytes, int]:
    """What is typed into the program: alone each read is waited for, else `depth` of them at a time."""
    lines: list[str] = []
    number = 0
    for number, (offset, length) in enumerate(spans, 1):
        lines.append(f"{'aio_read' if depth > 1 else 'read'} -q {offset} {length}")
        if depth > 1 and number % depth == 0:
            lines.append("aio_flush")
    lines += ["aio_flush", "quit", ""]
    return "\n".join(lines).encode(), number


def _seconds(target: str, commands: bytes, options: tuple[str, ...]) -> tuple[float, bytes]:
    """How long these commands took, start and end included, and what was said on standard error."""
    began = time.perf_counter()
    try:
        done = subprocess.run([TOOL, *options, "-r", "-U", "--image-opts", target], input=commands,
                              capture_output=True, check=False, timeout=_PATIENCE)
    except OSError as error:
        raise StorageError.of(error, "run", TOOL) from error
    except subprocess.TimeoutExpired:
        raise StorageError(f"{TOOL} took more than {_PATIENCE:.0f} seconds, expected an end before") from None
    took = time.perf_counter() - began
    failed = re.search(rb"(?:failed|error|[Cc]ould not|cannot)[^\n]*", done.stdout)
    if done.returncode or failed:
        said = failed[0] if failed else done.stderr.strip().splitlines()[-1] if done.stderr.strip() else b""
        raise StorageError(f"{TOOL} could not read: {said.decode(errors='replace') or f'status {done.returncode}'}")
    return took, done.stderr


def _file(path: str, direct: bool) -> str:
    switches = ",cache.direct=on,file.cache.direct=on" if direct else ""
    return f"file.driver=file,file.filename={path.replace(',', ',,')}{switches}"
