"""The published tables measured here: each cell by us, by QEMU and by plain reads, in turn, medians of several rounds.

It prints nothing. What must hold: in each round all engines read the same offsets at the same depth through caches of
the same size, one right after the other, because the machine's speed drifts.
"""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from cowslice.errors import BadOption
from cowslice.format.first_cluster import decode_first_cluster
from cowslice.ops.bench.cells import CELLS, DISK, Cell, short_cells
from cowslice.ops.bench.delay import delayed
from cowslice.ops.bench.engine import Timing, ceiling_rate, engine_timing, make_raw, walk
from cowslice.ops.bench.peer import peer_seconds, peer_version
from cowslice.ops.bench.stride import choose_stride, covered
from cowslice.ops.layout import LAYOUTS, Layout, write_populated_image
from cowslice.processors import cores
from cowslice.units import format_size

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

SEQUENTIAL_BYTES = 256 << 10


@dataclass(frozen=True, slots=True, kw_only=True)
class TableOptions:
    """What to measure. Sizes in bytes, `latency_ms` milliseconds under every read; `image` takes one that exists."""

    layout: Layout = "sequential"
    size: int = DISK
    cluster_bits: tuple[int, ...] = (16, 18)
    image: str | None = None
    directory: str | None = None
    depth: int = 32
    rounds: int = 5
    requests: int = 100_000
    short: bool = False
    populate: bool = False
    sequential: bool = False
    latency_ms: int = 0
    aio: str = "threads"
    peer: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if self.layout not in LAYOUTS:
            raise BadOption(f"layout is '{self.layout}', expected one of {', '.join(LAYOUTS)}")
        for name, least in (("depth", 1), ("rounds", 1), ("requests", 100), ("latency_ms", 0)):
            if getattr(self, name) < least:
                raise BadOption(f"{name} is {getattr(self, name)}, expected at least {least}")


@dataclass(frozen=True, slots=True)
class Measured:
    """One cell. Rates are reads per second, medians of the rounds; ratios are medians of the rounds' own.

    What needs the peer is None without it; `peer_hit` is computed from the walk, by QEMU's rules.
    """

    cluster_bits: int
    entry_bytes: int
    cache_bytes: int
    published: int
    stride: int
    ours_cold: float
    ours_warm: float
    hit_cold: float
    hit_warm: float
    metadata_bytes_cold: int
    metadata_bytes_warm: int
    ceiling: float
    ceiling_share: float
    peer_cold: float | None = None
    peer_warm: float | None = None
    peer_hit: float | None = None
    ratio_cold: float | None = None
    ratio_warm: float | None = None


@dataclass(frozen=True, slots=True)
class Table:
    """What was measured, on what, and how."""

    options: dict[str, Any]
    machine: str
    peer: str
    cells: tuple[Measured, ...] = field(default_factory=tuple)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


Progress = Callable[[int, int, str], None]


def measure_table(options: TableOptions, on_progress: Progress | None = None) -> Table:
    """Make the images (or take one), measure every cell, and clean up. Raises BadOption, ImageError, StorageError."""
    chosen = _cells(options)
    peer = peer_version() if options.peer else ""
    measured: list[Measured] = []
    with TemporaryDirectory(dir=options.directory or default_directory(), prefix="cowslice-bench-") as folder:
        raw = os.path.join(folder, "ceiling.raw")
        make_raw(raw, options.size)
        for bits in sorted({cell.cluster_bits for cell in chosen}):
            with _image(options, bits, folder) as image, delayed(raw, options.latency_ms) as plain:
                for cell in (cell for cell in chosen if cell.cluster_bits == bits):
                    if on_progress:
                        on_progress(len(measured), len(chosen), describe(cell))
                    measured.append(_measure(options, cell, image, plain, peer=bool(peer)))
    return Table(_shown(options), machine(), peer, tuple(measured))


def describe(cell: Cell) -> str:
    """A cell in a few words."""
    return (
        f"{format_size(1 << cell.cluster_bits)} clusters, {format_size(cell.entry_bytes)} slices, "
        f"{format_size(cell.cache_bytes)} cache"
    )


def machine() -> str:
    """What the figures were measured on: processor, cores, memory, kernel."""
    cpu = next((line.split(":", 1)[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")), "")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return f"{cpu or platform.machine()}, {cores()} cores, {format_size(memory)}, Linux {platform.release()}"


def default_directory() -> str | None:
    """Memory, where there is some to write files into: its speed is steady. Else the usual temporary folder."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return []


def _shown(options: TableOptions) -> dict[str, Any]:
    return {name: value for name, value in asdict(options).items() if name not in ("directory",)}


def _cells(options: TableOptions) -> tuple[Cell, ...]:
    wanted = options.cluster_bits if options.image is None else (_cluster_bits_of(options.image),)
    rows = short_cells() if options.short else CELLS
    chosen = tuple(cell for cell in rows if cell.cluster_bits in wanted)
    if not chosen:
        raise BadOption(
            f"no table has clusters of {', '.join(format_size(1 << b) for b in wanted)}, expected 64 KiB or 256 KiB"
        )
    return chosen


def _cluster_bits_of(path: str) -> int:
    with open(path, "rb") as file:
        return decode_first_cluster(file.read(1 << 21)).header.cluster_bits


@contextmanager
def _image(options: TableOptions, cluster_bits: int, folder: str) -> Iterator[str]:
    """The image to measure, made here or the user's own, behind a delay if one is wanted."""
    path = options.image
    if path is None:
        path = os.path.join(folder, f"{cluster_bits}.qcow2")
        write_populated_image(
            path,
            size=options.size,
            cluster_bits=cluster_bits,
            layout=options.layout,
            populate=options.populate,
            seed=options.seed,
        )
    try:
        with delayed(path, options.latency_ms) as shown:
            yield shown
    finally:
        if options.image is None:
            os.unlink(path)


@dataclass(slots=True)
class _Rounds:
    """Figures of the rounds of one cell, as they come in."""

    cold: list[Timing] = field(default_factory=list)
    warm: list[Timing] = field(default_factory=list)
    ceiling: list[float] = field(default_factory=list)
    peer_cold: list[float] = field(default_factory=list)
    peer_warm: list[float] = field(default_factory=list)


def _measure(options: TableOptions, cell: Cell, image: str, plain: str, *, peer: bool) -> Measured:
    size, direct = options.size, options.latency_ms > 0
    stride, peer_hit = (SEQUENTIAL_BYTES, covered(cell, size)) if options.sequential else choose_stride(cell, size)
    length = SEQUENTIAL_BYTES if options.sequential else 4096
    first = max(options.requests // 5, 20)
    offsets = walk(stride, size=size, start=0, requests=first + options.requests, length=length)
    rounds = _Rounds()
    for _ in range(options.rounds):
        _our_round(rounds, image, plain, cell, offsets, first, length=length, depth=options.depth, direct=direct)
        if peer:
            _peer_round(rounds, image, cell, stride, first, options, length=length)
    return _summary(cell, stride, rounds, None if options.sequential or not peer else peer_hit)


def _our_round(
    rounds: _Rounds,
    image: str,
    plain: str,
    cell: Cell,
    offsets: NDArray[np.int64],
    first: int,
    *,
    length: int,
    depth: int,
    direct: bool,
) -> None:
    cold, warm = engine_timing(image, cell, offsets, length=length, depth=depth, warm=first, direct=direct)
    rounds.cold.append(cold)
    rounds.warm.append(warm)
    rounds.ceiling.append(ceiling_rate(plain, offsets[first:], length=length, depth=depth, direct=direct))


def _peer_round(
    rounds: _Rounds, image: str, cell: Cell, stride: int, first: int, options: TableOptions, *, length: int
) -> None:
    """Two runs, short and long: their difference is the warm stretch, as the peer cannot be warmed otherwise."""
    direct = options.latency_ms > 0

    def seconds(requests: int) -> float:
        return peer_seconds(
            image,
            cell,
            stride=stride,
            requests=requests,
            depth=options.depth,
            length=length,
            aio=options.aio,
            direct=direct,
        )

    short, long = seconds(first), seconds(first + options.requests)
    rounds.peer_cold.append(first / max(short, 1e-3))
    rounds.peer_warm.append(options.requests / max(long - short, 1e-3))


def _summary(cell: Cell, stride: int, rounds: _Rounds, peer_hit: float | None) -> Measured:
    cold, warm = [t.rate for t in rounds.cold], [t.rate for t in rounds.warm]
    with_peer = bool(rounds.peer_warm)
    return Measured(
        cluster_bits=cell.cluster_bits,
        entry_bytes=cell.entry_bytes,
        cache_bytes=cell.cache_bytes,
        published=cell.published,
        stride=stride,
        ours_cold=statistics.median(cold),
        ours_warm=statistics.median(warm),
        hit_cold=statistics.median(t.hit_ratio for t in rounds.cold),
        hit_warm=statistics.median(t.hit_ratio for t in rounds.warm),
        metadata_bytes_cold=int(statistics.median(t.metadata_bytes for t in rounds.cold)),
        metadata_bytes_warm=int(statistics.median(t.metadata_bytes for t in rounds.warm)),
        ceiling=statistics.median(rounds.ceiling),
        ceiling_share=_median_ratio(warm, rounds.ceiling),
        peer_cold=statistics.median(rounds.peer_cold) if with_peer else None,
        peer_warm=statistics.median(rounds.peer_warm) if with_peer else None,
        peer_hit=peer_hit,
        ratio_cold=_median_ratio(cold, rounds.peer_cold) if with_peer else None,
        ratio_warm=_median_ratio(warm, rounds.peer_warm) if with_peer else None,
    )


def _median_ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
