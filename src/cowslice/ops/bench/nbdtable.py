"""The published tables over NBD: each cell served by us and by qemu-nbd, asked from outside, in turn.

It prints nothing. What must hold: a ratio compares two runs right after each other, by the same client, through caches
of the same size; QEMU reads in whichever way is faster for it in that cell. A server that does nothing is asked in the
same rounds, because a client that is slower than the servers cannot tell them apart.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from tempfile import TemporaryDirectory
from typing import Any

from cowslice.errors import BadOption, StorageError
from cowslice.ops.bench.cells import CELLS, DISK, Cell, short_cells
from cowslice.ops.bench.engine import make_raw
from cowslice.ops.bench.nbdclients import copy_rate, fio_rate, has_fio, has_nbdcopy, load_rate
from cowslice.ops.bench.nbdcontent import write_compressed, write_plain
from cowslice.ops.bench.nbdfigures import NbdMeasured, NbdTable, Round, figures_of
from cowslice.ops.bench.nbdserver import (
    Served,
    ceiling_server,
    image_options,
    our_server,
    peer_server,
    raw_options,
)
from cowslice.ops.bench.table import default_directory, describe, machine
from cowslice.ops.layout import LAYOUTS, Layout, write_populated_image
from cowslice.units import MiB

WAYS = ("threads", "io_uring")
DEPTH = 32
_WARM_SEED = 1 << 32  # none that is measured

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class NbdTableOptions:
    """What to measure: disks of `size` bytes, each run `seconds` long; `content` bytes are read where bytes matter.

    The first layout is measured in every cell, the others in those of 4 KiB slices.
    """

    layouts: tuple[Layout, ...] = ("sequential", "random")
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
        given = [("layouts", layout, LAYOUTS) for layout in self.layouts]
        for name, value, known in (*given, ("aio", self.aio, ("best", *WAYS))):
            if value not in known:
                raise BadOption(f"{name} is '{value}', expected one of {', '.join(known)}")
        for name, least in (("rounds", 1), ("seconds", 0.01), ("content", MiB)):
            if getattr(self, name) < least:
                raise BadOption(f"{name} is {getattr(self, name)}, expected at least {least}")


Measure = Callable[[Served, int], Mapping[str, float]]  # server and round to rates by name


def measure_nbd_table(options: NbdTableOptions, on_progress: Progress | None = None) -> NbdTable:
    """Make the images, serve and measure them, clean up. Raises BadOption, StorageError."""
    peer = _peer_version() if options.peer else ""
    images = list(_images(options))
    jobs = sum(len(cells) for *_, cells in images) + 2
    measured: list[NbdMeasured] = []

    def tell(what: str) -> None:
        if on_progress:
            on_progress(len(measured), jobs, what)

    with TemporaryDirectory(dir=options.directory or default_directory(), prefix="cowslice-bench-") as folder:
        raw = os.path.join(folder, "ceiling.raw")
        make_raw(raw, options.size)
        for layout, bits, cells in images:
            with _image(options, layout, bits, folder) as image:
                for cell in cells:
                    tell(f"{describe(cell)}, {layout}")
                    measured.append(_cell(options, layout, cell, image, raw, bool(peer)))
        for content in _contents(options):
            tell(content[0])
            measured.append(_content(options, content, folder, bool(peer)))
    return NbdTable(_shown(options), machine(), peer, _missing(peer, options), tuple(measured))


def _images(options: NbdTableOptions) -> Iterator[tuple[Layout, int, list[Cell]]]:
    """Every image to be made, by layout and cluster size, with the cells that are measured on it."""
    for layout in options.layouts:
        every = short_cells() if options.short or layout != options.layouts[0] else CELLS
        for bits in sorted(options.cluster_bits):
            yield layout, bits, [cell for cell in every if cell.cluster_bits == bits]


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
def _image(options: NbdTableOptions, layout: Layout, cluster_bits: int, folder: str) -> Iterator[str]:
    path = os.path.join(folder, f"{cluster_bits}.qcow2")
    write_populated_image(path, size=options.size, cluster_bits=cluster_bits, layout=layout, seed=options.seed)
    try:
        yield path
    finally:
        os.unlink(path)


# -- a cell ------------------------------------------------------------------------------------------------------------


def _cell(options: NbdTableOptions, layout: Layout, cell: Cell, image: str, raw: str, peer: bool) -> NbdMeasured:
    words = image_options(image, cell)
    clients = [_load(options), *(_fio(options, depth) for depth in (DEPTH, 1) if has_fio())]
    with ExitStack() as stack:
        servers, aio = _servers(options, words, stack, peer)
        servers["raw"] = stack.enter_context(our_server(raw_options(raw)))
        servers["nothing"] = stack.enter_context(ceiling_server(options.size))
        for served in servers.values():  # until the caches hold what they will hold
            load_rate(served, depth=DEPTH, seconds=options.seconds / 2, seed=_WARM_SEED)
        rounds = [_round(servers, clients, number) for number in range(options.rounds)]
    return NbdMeasured(
        describe(cell), cell.cluster_bits, cell.entry_bytes, cell.cache_bytes, cell.published,
        cell.covers(options.size), aio, figures_of(rounds), layout,
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
    return NbdMeasured(what, 16, 0, 0, 0, True, aio, figures_of(rounds))
