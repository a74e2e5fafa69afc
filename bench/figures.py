"""Every figure that the README and docs/performance.md publish: `python bench/figures.py [--json] [NAME ...]`.

Ratios come from alternating runs of ours and the peer's in one go; medians are shown. `--tiny` runs all of it on a
small disk, to show that it runs; its figures mean nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from alternating import COWSLICE, Bench, Figure, against, ratio, seconds_of
from encrypted import encrypted
from writing import repair, writing, writing_over_nbd

import cowslice
from cowslice.ops.bench.table import default_directory, machine
from cowslice.units import GiB, KiB, MiB

# -- the map -----------------------------------------------------------------------------------------------------------


def resident_map(bench: Bench) -> Iterator[Figure]:
    """Bytes that the whole map takes once it is read, by layout."""
    for layout in ("sequential", "random", "fragments"):
        with cowslice.open(bench.image(layout), l2_cache_size="16M", l2_cache_entry_size="4k", warmup="full") as disk:
            disk.wait_warm()
            yield Figure(f"resident map, {layout}", disk.cache.statistics()["bytes_used"], "bytes")


def hit_rate(bench: Bench) -> Iterator[Figure]:
    """Uniform random reads of a shuffled image through 1 MiB."""
    with cowslice.open(bench.image("random"), l2_cache_size="1M", l2_cache_entry_size="4k", warmup="full") as disk:
        disk.wait_warm()
        read_uniform(disk, bench.reads // 4, seed=1)
        before = disk.cache.statistics()
        read_uniform(disk, bench.reads, seed=2)
        after = disk.cache.statistics()
    hits, misses = after["hits"] - before["hits"], after["misses"] - before["misses"]
    yield Figure("hit rate, shuffled, 1 MiB, uniform", hits / (hits + misses), "")


def reads_after_warmup(bench: Bench) -> Iterator[Figure]:
    """Metadata bytes read after warm-up of a sequential image, worst of several budgets."""
    worst = 0
    for budget in ("64k", "256k", "1M", "5M"):
        with cowslice.open(bench.image("sequential"), l2_cache_size=budget, warmup="full") as disk:
            disk.wait_warm()
            before = disk.cache.statistics()["bytes_read"]
            read_uniform(disk, bench.reads // 4, seed=3)
            worst = max(worst, disk.cache.statistics()["bytes_read"] - before)
    yield Figure("metadata read after warm-up, sequential, 64k to 5M", worst, "bytes")


def read_uniform(disk: cowslice.Image, count: int, *, seed: int) -> None:
    """Random 4 KiB reads, in batches into the same memory."""
    out = bytearray(256 * 4096)
    offsets = np.random.default_rng(seed).integers(0, disk.size // 4096, count, dtype=np.int64) * 4096
    for first in range(0, count, 256):
        chosen = offsets[first : first + 256]
        disk.read_many(chosen, 4096, memoryview(out)[: len(chosen) * 4096])


# -- reading -----------------------------------------------------------------------------------------------------------


def python_loop(bench: Bench) -> Iterator[Figure]:
    """A Python loop over read_into, against the same loop over os.preadv on a raw file."""
    raw = bench.folder / "plain.raw"
    with raw.open("wb") as file:
        file.truncate(bench.size)
    offsets = (np.random.default_rng(5).integers(0, bench.size // 4096, bench.reads // 4) * 4096).tolist()
    buffer = bytearray(4096)
    descriptor = os.open(raw, os.O_RDONLY)
    with cowslice.open(bench.image("sequential"), warmup="full") as disk:
        disk.wait_warm()

        def ours() -> float:
            began = time.perf_counter()
            for offset in offsets:
                disk.read_into(offset, buffer)
            return len(offsets) / (time.perf_counter() - began)

        def plain() -> float:
            began = time.perf_counter()
            for offset in offsets:
                os.preadv(descriptor, (buffer,), offset)
            return len(offsets) / (time.perf_counter() - began)

        yield ratio("Python loop of read_into against os.preadv", bench, ours, plain, "of its rate")
    os.close(descriptor)


MEMORY = """
import resource, sys, numpy, cowslice
def resident():
    with open('/proc/self/statm') as file:
        return int(file.read().split()[1]) * resource.getpagesize()
path, count = sys.argv[1], int(sys.argv[2])
out, dice = bytearray(256 * 4096), numpy.random.default_rng(1)
dice.integers(0, 100, 256, dtype=numpy.int64)
open_image = cowslice.open
start = resident()
with open_image(path, l2_cache_size='1M', l2_cache_entry_size='4k') as disk:
    for _ in range(count // 256):
        disk.read_many(dice.integers(0, disk.size // 4096, 256, dtype=numpy.int64) * 4096, 4096, out)
    print(resident() - start)
"""


def process_memory(bench: Bench) -> Iterator[Figure]:
    """Resident memory above its start after random reads through 1 MiB, without the memory that the reads go to."""
    for layout in ("sequential", "random"):
        command = [sys.executable, "-c", MEMORY, bench.image(layout), str(bench.reads * 4)]
        grown = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        yield Figure(f"process memory above its start, {layout}, 1 MiB, {bench.reads * 4} reads", grown, "bytes")


# -- whole processes ---------------------------------------------------------------------------------------------------


def check(bench: Bench) -> Iterator[Figure]:
    for layout in ("sequential", "random"):
        path = bench.image(layout)
        yield against(f"check, {layout}", bench, [*COWSLICE, "check", "-q", path], ["qemu-img", "check", "-q", path])


def convert(bench: Bench) -> Iterator[Figure]:
    raw, target = bench.content(), str(bench.folder / "converted.raw")
    kinds = {"plain": [], "deflate": ["-c"], "zstd": ["-c", "-o", "compression_type=zstd"]}
    for kind, options in kinds.items():
        image = str(bench.folder / f"content-{kind}.qcow2")
        if not os.path.exists(image):
            subprocess.run(["qemu-img", "convert", "-O", "qcow2", *options, raw, image], check=True)
        words = ["convert", "-O", "raw", image, target]
        yield against(f"convert to raw, {kind}", bench, [*COWSLICE, *words], ["qemu-img", *words])
        os.unlink(target)


def convert_to_qcow2(bench: Bench) -> Iterator[Figure]:
    raw, target = bench.content(), str(bench.folder / "converted.qcow2")
    kinds = {"plain": [], "deflate": ["-c"], "zstd": ["-c", "-o", "compression_type=zstd"]}
    for kind, options in kinds.items():
        words = ["convert", "-O", "qcow2", *options, raw, target]
        yield against(f"convert to qcow2, {kind}", bench, [*COWSLICE, *words], ["qemu-img", *words])
        os.unlink(target)


def snapshot(bench: Bench) -> Iterator[Figure]:
    """A snapshot taken and deleted: by two commands, and what of that is left in one process that runs already."""
    path = bench.image("sequential")

    def commands(program: list[str]) -> Callable[[], float]:
        return lambda: 1 / sum(seconds_of([*program, "snapshot", flag, "bench", path]) for flag in ("-c", "-d"))

    def in_process() -> float:
        began = time.perf_counter()
        with cowslice.open(path, "r+", warmup="off") as disk:
            disk.snapshot("bench")
            disk.delete_snapshot("bench")
        return 1 / (time.perf_counter() - began)

    yield ratio(
        "snapshot taken and deleted, two commands", bench, commands(COWSLICE), commands(["qemu-img"]), "times as fast"
    )
    yield ratio(
        "snapshot taken and deleted, in process against two commands",
        bench,
        in_process,
        commands(["qemu-img"]),
        "times as fast",
    )


def info(bench: Bench) -> Iterator[Figure]:
    seconds = statistics.median(seconds_of([*COWSLICE, "info", bench.image("random")]) for _ in range(bench.rounds + 1))
    yield Figure("info, whole process, shuffled image", seconds * 1000, "ms")


_CURVES = """
import resource, sys, time
from cowslice.format.geometry import Geometry
from cowslice.tune.curve import slice_curves
from cowslice.tune.synthetic import synthetic
size, requests = int(sys.argv[1]), int(sys.argv[2])
began = time.perf_counter()
slice_curves(synthetic(f"zipf:requests={requests}", size=size), Geometry(16), disk_size=size)
print(time.perf_counter() - began, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


def curves(bench: Bench) -> Iterator[Figure]:
    """A trace of zipf reads, made meanwhile, to the exact curves of all slice sizes, in a process of its own."""
    requests = 40 * bench.reads  # ten million, unless tiny
    for size in (bench.size, 25 * bench.size):
        done = subprocess.run(
            [sys.executable, "-c", _CURVES, str(size), str(requests)], check=True, capture_output=True, text=True
        )
        seconds, peak = map(float, done.stdout.split())
        told = f"curves of {requests / 1e6:.1f} M requests, {size / GiB:,.0f} GiB"
        yield Figure(told, seconds, "s")
        yield Figure(f"{told}: memory of the process", peak / MiB, "MiB")


FIGURES = {
    f.__name__: f
    for f in (
        resident_map,
        hit_rate,
        reads_after_warmup,
        python_loop,
        process_memory,
        check,
        convert,
        convert_to_qcow2,
        snapshot,
        info,
        curves,
        writing,
        writing_over_nbd,
        encrypted,
        repair,
    )
}


def measure(names: list[str], *, tiny: bool) -> list[Figure]:
    """All figures with these names, or all there are."""
    figures: list[Figure] = []
    with TemporaryDirectory(dir=default_directory(), prefix="cowslice-figures-") as folder:
        size, rounds, reads = (1 * GiB, 1, 2560) if tiny else (40 * GiB, 7, 256 * KiB)
        bench = Bench(Path(folder), size, rounds, reads)
        for name in names or FIGURES:
            figures += FIGURES[name](bench)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(FIGURES)}")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--tiny", action="store_true")
    chosen = parser.parse_args()
    unknown = set(chosen.names) - set(FIGURES)
    if unknown:
        parser.error(f"no figure is called {', '.join(sorted(unknown))}")
    figures = measure(chosen.names, tiny=chosen.tiny)
    if chosen.json:
        print(json.dumps({"machine": machine(), "figures": [asdict(figure) for figure in figures]}, indent=1))
        return
    print(machine())
    for figure in figures:
        sides = "" if figure.ours is None else f"   ({figure.ours:,.4g} against {figure.peer:,.4g} per second)"
        print(f"{figure.name:62} {figure.value:>14,.4g} {figure.unit}{sides}")


if __name__ == "__main__":
    main()
