"""The published tables over NBD: each cell served by us and by qemu-nbd, asked from outside, in turn.

It prints nothing. What must hold: a ratio compares two runs right after each other, by the same client, through caches
of the same size; QEMU reads in whichever way is faster for it in that cell.
"""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from tempfile import TemporaryDirectory
from typing import Any

from cowslice.errors import BadOption, StorageError
from cowslice.ops.bench.cells import CELLS, DISK, Cell, short_cells
from cowslice.ops.bench.engine import make_raw
from cowslice.ops.bench.nbdclients import copy_rate, fio_rate, has_fio, has_nbdcopy, load_rate
from cowslice.ops.bench.nbdcontent import write_compressed, write_plain
from cowslice.ops.bench.nbdserver import Served, image_options, our_server, peer_server, raw_options
from cowslice.ops.bench.table import default_directory, describe, machine
from cowslice.ops.layout import LAYOUTS, Layout, write_populated_image
from cowslice.units import MiB

WAYS = ("threads", "io_uring")
DEPTH = 32
_WARM_SEED = 1 << 32  # none that is measured

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class NbdTableOptions:
    """What to measure: disks of `size` bytes, each run `seconds` long; `content` bytes are read where bytes matter."""

    layout: Layout = "sequential"
    size: int = DISK
    cluster_bits: tuple[int, ...] = (16, 18)
    directory: str | None = None
    rounds: int = 5
    seconds: float = 1.0
    content: int = 512 * MiB
    short: bool = False
    aio: str = "best"
    peer: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        for name, known in (("layout", LAYOUTS), ("aio", ("best", *WAYS))):
            if getattr(self, name) not in known:
                raise BadOption(f"{name} is '{getattr(self, name)}', expected one of {', '.join(known)}")
        for name, least in (("rounds", 1), ("seconds", 0.01), ("content", MiB)):
            if getattr(self, name) < least:
                raise BadOption(f"{name} is {getattr(self, name)}, expected at least {least}")


@dataclass(frozen=True, slots=True)
class Figure:
    """Medians of the rounds for us, the peer and a raw file behind our server; None where that was not measured.

    `ratio` is ours to the peer's and `share` ours to the raw file's, medians of the rounds' own; of what is better when
    it is less (`unit` "s"), the other way round: above 1 is always better for us.
    """

    name: str
    unit: str
    ours: float
    peer: float | None
    raw: float | None
    ratio: float | None
    share: float | None


@dataclass(frozen=True, slots=True)
class NbdMeasured:
    """One cell, or one image of its own (`published` 0). `aio` is how QEMU read, '' without it."""

    what: str
    cluster_bits: int
    entry_bytes: int
    cache_bytes: int
    published: int
    covered: bool
    aio: str
    figures: tuple[Figure, ...]


@dataclass(frozen=True, slots=True)
class Summary:
    """One figure over several cells: least and median of the ratios to the peer and of the shares of the raw file."""

    name: str
    covered: bool
    ratio_least: float | None
    ratio_median: float | None
    share_least: float | None
    share_median: float | None


@dataclass(frozen=True, slots=True)
class NbdTable:
    """What was measured, on what, how, and where the peer is faster: (what, figure, ratio)."""

    options: dict[str, Any]
    machine: str
    peer: str
    missing: tuple[str, ...]
    measured: tuple[NbdMeasured, ...] = field(default_factory=tuple)

    @property
    def losses(self) -> tuple[tuple[str, str, float], ...]:
        """Every figure in which the peer is better, worst first."""
        lost = [(one.what, figure.name, figure.ratio) for one in self.measured for figure in one.figures
                if figure.ratio is not None and figure.ratio < 1]  # fmt: skip
        return tuple(sorted(lost, key=lambda loss: loss[2]))

    @property
    def summary(self) -> tuple[Summary, ...]:
        """Every figure over all cells whose map the cache covers in part, and over all that it covers whole."""
        found: dict[tuple[bool, str], list[Figure]] = {}
        for one in self.measured:
            for figure in one.figures if one.published else ():
                found.setdefault((one.covered, figure.name), []).append(figure)
        return tuple(_summary(name, covered, found[covered, name]) for covered, name in sorted(found))

    def as_json(self) -> dict[str, Any]:
        summary = [asdict(one) for one in self.summary]
        return {**asdict(self), "summary": summary, "losses": self.losses}


Measure = Callable[[Served, int], Mapping[str, float]]  # server and round to rates by name
Round = Mapping[str, Mapping[str, float]]  # rates by server and name


def measure_nbd_table(options: NbdTableOptions, on_progress: Progress | None = None) -> NbdTable:
    """Make the images, serve and measure them, clean up. Raises BadOption, StorageError."""
    peer = _peer_version() if options.peer else ""
    cells = [cell for cell in (short_cells() if options.short else CELLS) if cell.cluster_bits in options.cluster_bits]
    jobs = len(cells) + 2
    measured: list[NbdMeasured] = []

    def tell(what: str) -> None:
        if on_progress:
            on_progress(len(measured), jobs, what)

    with TemporaryDirectory(dir=options.directory or default_directory(), prefix="cowslice-bench-") as folder:
        raw = os.path.join(folder, "ceiling.raw")
        make_raw(raw, options.size)
        for bits in sorted({cell.cluster_bits for cell in cells}):
            with _image(options, bits, folder) as image:
                for cell in (cell for cell in cells if cell.cluster_bits == bits):
                    tell(describe(cell))
                    measured.append(_cell(options, cell, image, raw, bool(peer)))
        for content in _contents(options):
            tell(content[0])
            measured.append(_content(options, content, folder, bool(peer)))
    return NbdTable(_shown(options), machine(), peer, _missing(peer, options), tuple(measured))


def _shown(options: NbdTableOptions) -> dict[str, Any]:
    return {name: value for name, value in asdict(options).items() if name != "directory"}


def _peer_version() -> str:
    if shutil.which("qemu-nbd") is None:
        return ""
    shown = subprocess.run(["qemu-nbd", "--version"], capture_output=True, text=True, check=False)
    return shown.stdout.split("\n", 1)[0]


def _missing(peer: str, options: NbdTableOptions) -> tuple[str, ...]:
    """What could not be measured for want of a program."""
    there = {"qemu-nbd": bool(peer) or not options.peer, "fio": has_fio(), "nbdcopy": has_nbdcopy(),
             "qemu-img": shutil.which("qemu-img") is not None}  # fmt: skip
    return tuple(name for name, found in there.items() if not found)


@contextmanager
def _image(options: NbdTableOptions, cluster_bits: int, folder: str) -> Iterator[str]:
    path = os.path.join(folder, f"{cluster_bits}.qcow2")
    write_populated_image(path, size=options.size, cluster_bits=cluster_bits, layout=options.layout, seed=options.seed)
    try:
        yield path
    finally:
        os.unlink(path)


# -- a cell ------------------------------------------------------------------------------------------------------------


def _cell(options: NbdTableOptions, cell: Cell, image: str, raw: str, peer: bool) -> NbdMeasured:
    words = image_options(image, cell)
    clients = [_load(options), *(_fio(options, depth) for depth in (DEPTH, 1) if has_fio())]
    with ExitStack() as stack:
        servers, aio = _servers(options, words, stack, peer)
        servers["raw"] = stack.enter_context(our_server(raw_options(raw)))
        for served in servers.values():  # until the caches hold what they will hold
            load_rate(served, depth=DEPTH, seconds=options.seconds / 2, seed=_WARM_SEED)
        rounds = [_round(servers, clients, number) for number in range(options.rounds)]
    return NbdMeasured(
        describe(cell), cell.cluster_bits, cell.entry_bytes, cell.cache_bytes, cell.published,
        cell.covers(options.size), aio, _figures(rounds),
    )  # fmt: skip


def _load(options: NbdTableOptions) -> Measure:
    """Our own client."""

    def measure(served: Served, number: int) -> dict[str, float]:
        rate, cpu = load_rate(served, depth=DEPTH, seconds=options.seconds, seed=options.seed + number)
        return {"generator, depth 32": rate, "CPU for a million": cpu}

    return measure


def _fio(options: NbdTableOptions, depth: int) -> Measure:
    def measure(served: Served, number: int) -> dict[str, float]:
        rate = fio_rate(served, depth=depth, seconds=options.seconds, seed=options.seed + number)
        return {f"fio, depth {depth}": rate}

    return measure


def _copy(options: NbdTableOptions) -> Measure:
    return lambda served, number: {"nbdcopy, 256 KiB": copy_rate(served, options.content)}


def _servers(
    options: NbdTableOptions, words: Sequence[str], stack: ExitStack, peer: bool
) -> tuple[dict[str, Served], str]:
    """Ours and the peer's, running until `stack` ends; and how the peer reads."""
    servers = {"ours": stack.enter_context(our_server(words))}
    if not peer:
        return servers, ""
    aio = options.aio if options.aio != "best" else _best_way(options, words)
    servers["peer"] = stack.enter_context(peer_server(words, aio))
    return servers, aio


def _best_way(options: NbdTableOptions, words: Sequence[str]) -> str:
    """The way in which QEMU answers more of our load, in two turns each. One that it cannot use counts as none."""
    rates = dict.fromkeys(WAYS, 0.0)
    with ExitStack() as stack:
        for way in WAYS:
            try:
                served = stack.enter_context(peer_server(words, way))
            except StorageError:
                continue
            for turn in range(2):
                rate = load_rate(served, depth=DEPTH, seconds=options.seconds / 2, seed=turn)[0]
                rates[way] = max(rates[way], rate)
    return max(WAYS, key=lambda way: rates[way])


def _round(servers: Mapping[str, Served], clients: Sequence[Measure], number: int) -> Round:
    """Every client at every server; the servers take turns at once, and in another order from round to round."""
    names = list(servers)
    first = number % len(names)
    found: dict[str, dict[str, float]] = {name: {} for name in names}
    for client in clients:
        for name in (*names[first:], *names[:first]):
            found[name] |= client(servers[name], number)
    return found


def _figures(rounds: Sequence[Round]) -> tuple[Figure, ...]:
    return tuple(_figure(name, rounds) for name in rounds[0]["ours"])


def _figure(name: str, rounds: Sequence[Round]) -> Figure:
    def of(server: str) -> list[float]:
        return [one[server][name] for one in rounds if server in one]

    ours, peer, raw = of("ours"), of("peer"), of("raw")
    less = name.startswith("CPU")
    unit = "s" if less else "bytes/s" if name.startswith("nbdcopy") else "reads/s"
    return Figure(
        name, unit, statistics.median(ours), _median(peer), _median(raw),
        _median_ratio(ours, peer, less=less), _median_ratio(ours, raw, less=less),
    )  # fmt: skip


def _median(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None


def _median_ratio(ours: Sequence[float], others: Sequence[float], *, less: bool) -> float | None:
    """How many times better we are. Times too short for the clock count as its tick."""
    if not others:
        return None
    pairs = [(max(a, 1e-9), max(b, 1e-9)) for a, b in zip(ours, others, strict=True)]
    return statistics.median(b / a if less else a / b for a, b in pairs)


def _summary(name: str, covered: bool, figures: Sequence[Figure]) -> Summary:
    ratios = [figure.ratio for figure in figures if figure.ratio is not None]
    shares = [figure.share for figure in figures if figure.share is not None]
    return Summary(
        name, covered, min(ratios, default=None), _median(ratios), min(shares, default=None), _median(shares)
    )  # fmt: skip


# -- images whose bytes matter -----------------------------------------------------------------------------------------

Content = tuple[str, Callable[[str, int, int], None], list[Measure]]


def _contents(options: NbdTableOptions) -> Iterator[Content]:
    """(what, who writes it to a path, the clients), as far as the programs are here."""
    copies = [_copy(options)] if has_nbdcopy() else []
    if copies:
        yield "a plain image", write_plain, copies
    if shutil.which("qemu-img"):
        yield "a deflate image", write_compressed, [_load(options), *copies]


def _content(options: NbdTableOptions, content: Content, folder: str, peer: bool) -> NbdMeasured:
    """One image with real content and the default cache."""
    what, write, clients = content
    path = os.path.join(folder, "content.qcow2")
    write(path, options.content, options.seed)
    with ExitStack() as stack:
        stack.callback(os.unlink, path)
        servers, aio = _servers(options, image_options(path, None), stack, peer)
        rounds = [_round(servers, clients, number) for number in range(options.rounds)]
    return NbdMeasured(what, 16, 0, 0, 0, True, aio, _figures(rounds))
