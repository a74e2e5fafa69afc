"""What writing costs, beside `qemu-img bench -w` in process and beside qemu-nbd with fio as the client of both.

Both sides write the same places as often, with as many requests at once, through the page cache; in process also in the
same order, with one flush at the end. Each run begins with a fresh image. QEMU's rate is that of the better of its two
ways of I/O.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from alternating import COWSLICE, Bench, Figure, ratio, seconds_of

import cowslice
from cowslice.ops.bench.image import BenchOptions, bench_image
from cowslice.ops.bench.nbdclients import fio_write_rate, has_fio
from cowslice.ops.bench.nbdserver import image_options, our_server, peer_server
from cowslice.ops.layout import write_populated_image
from cowslice.units import GiB, KiB, MiB

DEPTH = 32
AIO = ("threads", "io_uring")
_MOST_STEP = (1 << 31) - 1  # that `qemu-img bench` takes
_REFTABLE_OFFSET = 48  # where the header says where the refcount table lies
_CLUSTER = 64 * KiB


@dataclass(frozen=True, slots=True)
class Work:
    """`count` writes of `length` bytes to a disk of `size` bytes, a power of two; no `unit` of it gets two of them."""

    name: str
    size: int
    count: int
    length: int
    unit: int = _CLUSTER
    extended: bool = False
    backing: bool = False
    populated: bool = False

    @property
    def step(self) -> int:
        """An odd number of units, which visits all of a power of two before it comes back."""
        if self.unit == self.length >= MiB:
            return self.length
        return ((min(self.size * 3 // 8, _MOST_STEP) // self.unit - 1) | 1) * self.unit


def works(bench: Bench) -> tuple[Work, ...]:
    tiny = bench.size <= GiB
    size, times = (64 * MiB, 16) if tiny else (4 * GiB, 1)
    return (
        Work("random 4 KiB overwrites", size, 200_000 // times, 4 * KiB, unit=4 * KiB, populated=True),
        Work("random 4 KiB writes that allocate", size, 40_000 // times, 4 * KiB),
        Work("sequential 1 MiB writes that allocate", size, 1024 // times, MiB, unit=MiB),
        Work("random 4 KiB writes over a raw file", size // 4, 8_000 // times, 4 * KiB, backing=True),
        Work("the same, extended L2 entries", size // 4, 8_000 // times, 4 * KiB, backing=True, extended=True),
    )


def writing(bench: Bench) -> Iterator[Figure]:
    """In process against `qemu-img bench -w`."""
    for work in works(bench):
        yield ratio(work.name, bench, partial(_ours, bench, work), partial(_qemu, bench, work), "times as fast")


def writing_over_nbd(bench: Bench) -> Iterator[Figure]:
    """Through fio, of which both servers have one connection."""
    if not has_fio():
        return
    for work in works(bench)[:2]:
        name = f"{work.name}, fio over NBD"
        yield ratio(name, bench, partial(_our_server, bench, work), partial(_qemu_nbd, bench, work), "times as fast")


def repair(bench: Bench) -> Iterator[Figure]:
    """`check -r all` where the refcount table is lost, and where all its blocks are."""
    for lost in ("table", "blocks"):
        damaged = bench.folder / f"without-{lost}.qcow2"
        write_populated_image(damaged, size=bench.size, cluster_bits=16, layout="sequential")
        _lose(damaged, lost)
        name = f"check -r all, refcount {lost} lost"
        yield ratio(name, bench, partial(_repair, damaged, COWSLICE), partial(_repair, damaged, ["qemu-img"]),
                    "times as fast")  # fmt: skip
        damaged.unlink()


def _lose(path: Path, lost: str) -> None:
    with path.open("r+b") as file:
        file.seek(_REFTABLE_OFFSET)
        table = int.from_bytes(file.read(8))
        file.seek(table)
        blocks = np.frombuffer(file.read(_CLUSTER), dtype=">u8")
        for offset in [table] if lost == "table" else blocks[blocks > 0].tolist():
            file.seek(offset)
            file.write(bytes(_CLUSTER))


def _repair(damaged: Path, program: list[str]) -> float:
    path = damaged.with_suffix(".repaired")
    subprocess.run(["cp", "--sparse=always", damaged, path], check=True)
    rate = 1 / seconds_of([*program, "check", "-q", "-r", "all", str(path)])
    for each in damaged.parent.glob(f"{path.name}*"):  # with the undo journals
        each.unlink()
    return rate


def _fresh(bench: Bench, work: Work) -> str:
    path = bench.folder / "written.qcow2"
    path.unlink(missing_ok=True)
    if work.populated:
        write_populated_image(path, size=work.size, cluster_bits=16, layout="sequential")
        return str(path)
    options = ["-o", "extended_l2=on"] if work.extended else []
    below = ["-b", str(_backing(bench, work.size)), "-F", "raw"] if work.backing else []
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", *options, *below, path, str(work.size)], check=True)
    return str(path)


def _backing(bench: Bench, size: int) -> Path:
    path = bench.folder / "below.raw"
    if not path.exists():
        dice = np.random.default_rng(5)
        with path.open("wb") as file:
            for _ in range(size // MiB):
                file.write(dice.bytes(MiB))
    return path


def _ours(bench: Bench, work: Work) -> float:
    options = BenchOptions(
        count=work.count, depth=DEPTH, length=work.length, step=work.step, write=True, pattern=97,
        flush_interval=work.count,
    )  # fmt: skip
    with cowslice.open(_fresh(bench, work), "r+", warmup="off") as disk:
        return bench_image(disk, options).rate


def _qemu(bench: Bench, work: Work) -> float:
    return max(_qemu_img_bench(_fresh(bench, work), work, aio) for aio in AIO)


def _qemu_img_bench(path: str, work: Work, aio: str) -> float:
    words = ("-f", "qcow2", "-i", aio, "-c", work.count, "-d", DEPTH, "-s", work.length, "-S", work.step,
             f"--flush-interval={work.count}", "--pattern=97", path)  # fmt: skip
    done = subprocess.run(["qemu-img", "bench", "-w", *map(str, words)], check=True, capture_output=True, text=True)
    found = re.search(r"completed in ([\d.]+) seconds", done.stdout)
    assert found is not None, done.stdout
    return work.count / float(found[1])


def _our_server(bench: Bench, work: Work) -> float:
    with our_server(image_options(_fresh(bench, work), None), writable=True) as served:
        return fio_write_rate(served, depth=DEPTH, count=work.count)


def _qemu_nbd(bench: Bench, work: Work) -> float:
    rates = []
    for aio in AIO:
        with peer_server(image_options(_fresh(bench, work), None), aio, writable=True) as served:
            rates.append(fio_write_rate(served, depth=DEPTH, count=work.count))
    return max(rates)
