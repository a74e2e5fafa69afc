"""The clients that measure: fio, our own load, nbdcopy. Each is given a server and comes back with a rate.

It does not know who serves.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import time

from cowslice.errors import StorageError
from cowslice.ops.bench.nbdbench import LoadOptions, run_load
from cowslice.ops.bench.nbdserver import Served
from cowslice.units import KiB

COPY_REQUEST = 256 * KiB
_PATIENCE = 600.0  # seconds for a program to end


def has_fio() -> bool:
    """Whether fio is here and speaks NBD."""
    if shutil.which("fio") is None:
        return False
    engines = subprocess.run(["fio", "--enghelp"], capture_output=True, text=True, check=False).stdout
    return "nbd" in engines.split()


def has_nbdcopy() -> bool:
    return shutil.which("nbdcopy") is not None


def fio_rate(served: Served, *, depth: int, seconds: float, seed: int) -> float:
    """Random 4 KiB reads per second by fio's own NBD engine. Each seed reads other places."""
    runtime = f"--runtime={max(round(seconds * 1000), 1)}ms"
    return _fio(served, "read", depth, "--time_based", runtime, "--randrepeat=0", f"--randseed={seed + 1}")


def fio_write_rate(served: Served, *, depth: int, count: int) -> float:
    """Random 4 KiB writes per second, `count` of them to places of their own, which are the same at each call."""
    return _fio(served, "write", depth, f"--number_ios={count}")


def _fio(served: Served, what: str, depth: int, *more: str) -> float:
    done = _run("fio", "--name=cowslice", "--ioengine=nbd", f"--uri={served.uri}", f"--rw=rand{what}", "--bs=4k",
                f"--iodepth={depth}", *more, "--output-format=json")  # fmt: skip
    return float(json.loads(done[done.index("{") :])["jobs"][0][what]["iops"])


def load_rate(served: Served, *, depth: int, seconds: float, seed: int) -> tuple[float, float]:
    """Random 4 KiB reads per second of one connection of ours, and the server's CPU seconds for a million of them."""
    before = served.cpu_seconds()
    result = run_load(served.uri, LoadOptions(depth=depth, seconds=seconds, seed=seed))
    if result.errors:
        raise StorageError(f"the server answered {result.errors} reads with an error, the first {result.first_error}")
    return result.rate, (served.cpu_seconds() - before) / max(result.requests, 1) * 1e6


def copy_rate(served: Served, size: int) -> float:
    """Bytes per second of a whole disk of `size` bytes, copied to nowhere by nbdcopy."""
    began = time.perf_counter()
    _run("nbdcopy", f"--request-size={COPY_REQUEST}", "--no-extents", served.uri, "null:")
    return size / (time.perf_counter() - began)


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_PATIENCE)
    if done.returncode:
        raise StorageError(f"{command[0]} failed: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout
