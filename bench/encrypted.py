"""What encrypted images cost, beside qemu-nbd under the same load and beside qemu-img: LUKS, AES-256 in XTS.

Both serve the same image through the page cache. QEMU's rate is that of the better of its two ways of I/O.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from alternating import COWSLICE, Bench, Figure, against, ratio

from cowslice.ops.bench.nbdbench import LoadOptions, run_load
from cowslice.ops.bench.nbdserver import Served, our_server, peer_server
from cowslice.units import GiB, KiB

DEPTH = 32
AIO = ("threads", "io_uring")
_KEY = ("--object", "secret,id=key,data=sesame")
_LUKS = "encrypt.format=luks,encrypt.key-secret=key"


@dataclass(frozen=True, slots=True)
class Work:
    """Requests of `length` bytes, 32 at once, one after another or at random; `writes` per cent of them write."""

    name: str
    length: int
    sequential: bool = False
    writes: int = 0


WORKS = (
    Work("LUKS, random 4 KiB reads", 4 * KiB),
    Work("LUKS, sequential 256 KiB reads", 256 * KiB, sequential=True),
    Work("LUKS, random 4 KiB overwrites", 4 * KiB, writes=100),
)


def encrypted(bench: Bench) -> Iterator[Figure]:
    """A LUKS image served to our generator, and copied to a raw file."""
    image = _image(bench)
    opened = (*_KEY, "--image-opts", f"driver=qcow2,{_LUKS},file.driver=file,file.filename={image}")
    for work in WORKS:
        yield ratio(
            f"{work.name}, over NBD", bench, partial(_ours, bench, opened, work), partial(_qemu, bench, opened, work),
            "times as fast")
    target = str(bench.folder / "deciphered.raw")
    words = ["convert", *opened, "-O", "raw", target]
    yield against("LUKS, convert to raw", bench, [*COWSLICE, *words], ["qemu-img", *words])
    os.unlink(target)


def _image(bench: Bench) -> Path:
    """Made by us: with so short an iter-time, qemu-img does not always find out how fast the machine is."""
    path = bench.folder / "luks.qcow2"
    if not path.exists():
        options = f"{_LUKS},encrypt.iter-time=10"
        words = ["convert", *_KEY, "-O", "qcow2", "-o", options, bench.content(), str(path)]
        subprocess.run([*COWSLICE, *words], check=True, stdout=subprocess.DEVNULL)
    return path


def _ours(bench: Bench, opened: tuple[str, ...], work: Work) -> float:
    with our_server(opened, writable=work.writes > 0) as served:
        return _rate(bench, served, work)


def _qemu(bench: Bench, opened: tuple[str, ...], work: Work) -> float:
    rates = []
    for aio in AIO:
        with peer_server(opened, aio, writable=work.writes > 0) as served:
            rates.append(_rate(bench, served, work))
    return max(rates)


def _rate(bench: Bench, served: Served, work: Work) -> float:
    seconds = 0.2 if bench.size <= GiB else 3.0
    step = work.length if work.sequential else 0
    options = LoadOptions(depth=DEPTH, length=work.length, step=step, writes=work.writes, seconds=seconds)
    return run_load(served.uri, options).rate
