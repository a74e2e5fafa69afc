"""`qemu-img bench` on the same image, with the same cache and the same walk.

It runs the program and reads the seconds that it prints, which leave out its start. What must hold: nothing is asked of
the peer that is not asked of us.
"""

from __future__ import annotations

import re
import shutil
import subprocess

from cowslice.errors import StorageError
from cowslice.ops.bench.cells import Cell

_SECONDS = re.compile(r"Run completed in ([0-9.]+) seconds")


def peer_version() -> str:
    """Version line of the peer, or '' where it is not installed."""
    if shutil.which("qemu-img") is None:
        return ""
    shown = subprocess.run(["qemu-img", "--version"], capture_output=True, text=True, check=False)
    return shown.stdout.split("\n", 1)[0]


def peer_seconds(
    image: str,
    cell: Cell,
    *,
    stride: int,
    requests: int,
    depth: int,
    length: int = 4096,
    aio: str = "threads",
    direct: bool = False,
) -> float:
    """Seconds that the peer takes for `requests` reads of `length` bytes, from a cold start. Raises StorageError."""
    options = (
        f"driver=qcow2,l2-cache-size={cell.cache_bytes},l2-cache-entry-size={cell.entry_bytes},"
        f"file.driver=file,file.filename={image.replace(',', ',,')}"
    )
    command = [
        "qemu-img",
        "bench",
        "-U",
        "-c",
        str(requests),
        "-d",
        str(depth),
        "-s",
        str(length),
        "-S",
        str(stride),
        "-i",
        aio,
        "-t",
        "none" if direct else "writeback",
        "--image-opts",
        options,
    ]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    found = _SECONDS.search(ran.stdout)
    if ran.returncode or not found:
        raise StorageError(f"qemu-img bench failed on '{image}': {ran.stderr.strip() or ran.stdout.strip()}")
    return float(found[1])
